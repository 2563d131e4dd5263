# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled kernels, with kernels that only note how they are started: no GPU, no interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from vlmprune.kernels.triton import launch

GPU = SimpleNamespace(type="cuda", index=0)


class Kernel:
    """(x, n specialised, k not specialised, BLOCK constant); as the launcher sees a kernel and what it
    compiles to.
    """

    arg_names = ("x", "n", "k", "BLOCK")
    params = tuple(
        SimpleNamespace(num=i, is_constexpr=name == "BLOCK", do_not_specialize=name == "k")
        for i, name in enumerate(arg_names)
    )

    def __init__(self):
        self.calls = []
        self.fn = lambda: None  # what the cache knows it by: to hash a kernel takes Triton long

    def __getitem__(self, grid):
        def compile_and_start(*args, **options):
            self.calls.append(("compiled", grid, args[1:], options))
            return {(*grid, 1, 1): lambda *args: self.calls.append(("again", grid, args[1:]))}

        return compile_and_start


def how(kernel):
    return [call[0] for call in kernel.calls]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch.version, "hip", None)
    return Kernel()


def test_a_kernel_is_compiled_once_per_set_of_facts(kernel):
    x = torch.zeros(64, dtype=torch.bfloat16)
    for args in ((x, 32, 5, 128), (x, 48, 6, 128), (x[8:], 64, 1, 128)):
        launch.start(kernel, 2, args, GPU, 4)
    assert how(kernel) == ["compiled", "again", "again"]
    assert kernel.calls[1][1:] == ((2,), (48, 6, 128))  # constants are passed on too


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"k": 16}, True),
        ({"k": 1}, True),
        ({"k": 2**31}, False),  # 64 bits wide
        ({"n": 1}, False),
        ({"n": 33}, False),
        ({"n": 2**35}, False),
        ({"BLOCK": 256}, False),
        ({"x": torch.zeros(64)}, False),
        ({"x": torch.zeros(64, dtype=torch.bfloat16)[1:]}, False),  # not aligned
        ({"num_warps": 8}, False),
        ({"device": SimpleNamespace(type="cuda", index=1)}, False),
    ],
    ids=str,
)
def test_what_a_compiled_kernel_depends_on(kernel, change, again):
    usual = {
        "x": torch.zeros(64, dtype=torch.bfloat16),
        "n": 32,
        "k": 5,
        "BLOCK": 128,
        "num_warps": 4,
        "device": GPU,
    }
    for given in (usual, usual | change):
        args = tuple(given[name] for name in Kernel.arg_names)
        launch.start(kernel, 1, args, given["device"], given["num_warps"])
    assert how(kernel) == ["compiled", "again" if again else "compiled"]


def test_amd_and_the_cpu_go_through_the_launcher_of_triton(kernel, monkeypatch):
    args = (torch.zeros(8), 1, 1, 1)
    for _ in range(2):
        launch.start(kernel, 1, args, torch.device("cpu"), 4)
    monkeypatch.setattr(torch.version, "hip", "7")
    launch.start(kernel, 1, args, GPU, 4)
    assert how(kernel) == ["compiled"] * 3


def test_options_that_differ_between_versions_are_set(kernel):
    launch.start(kernel, 1, (torch.zeros(8), 1, 1, 1), GPU, 4)
    assert kernel.calls[0][3] == {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def test_an_empty_grid_starts_nothing(kernel):
    launch.launch(kernel, 0, torch.zeros(8), 1, 1, 1, num_warps=4)
    launch.launch_steps(kernel, 0, 3, "k", torch.zeros(8), 1, 0, 1, num_warps=4)
    assert kernel.calls == []


def test_steps_count_up(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_on", lambda device: launch.nullcontext())
    start = launch.start
    monkeypatch.setattr(
        launch, "start", lambda kernel, grid, args, _, warps: start(kernel, grid, args, GPU, warps)
    )
    launch.launch_steps(kernel, 1, 3, "k", torch.zeros(8), 16, 0, 128, num_warps=4)
    assert [(call[0], call[2][1]) for call in kernel.calls] == [("compiled", 0), ("again", 1), ("again", 2)]


def test_the_launch_table():
    assert [launch.block_of(n) for n in (0, 1, 128, 129, 576, 8192)] == [
        128,
        128,
        128,
        256,
        1024,
        8192,
    ]
    assert [launch.warps(block) for block in (128, 1024, 2048, 4096, 8192)] == [4, 4, 8, 8, 16]
