# SPDX-License-Identifier: Apache-2.0
"""Kernels compile, for GPUs that need not be there, into code without spills, with wide accesses, once for
all budgets.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.compile_gate
SCRIPT = Path(__file__).parents[2] / "kernels" / "compile_gate.py"


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """The script that writes the published table, with a cache of its own: nothing compiled earlier may hide
    a failure.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        spec = importlib.util.spec_from_file_location("compile_gate", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "compile_gate", module)
        spec.loader.exec_module(module)
        yield module  # the stub driver stays: this process compiles and does nothing else


@pytest.mark.parametrize("target", ["sm_90", "gfx942", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_usual_launches_compile_well(gate, target):
    quick = [case for case in gate.CASES if case.quick]
    assert len(quick) > 10
    wrong = [fault for case in quick for row in gate.rows(case, target) for fault in gate.faults(row, case)]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_launch_compiles_well(gate, target):
    wrong = [
        fault for case in gate.CASES for row in gate.rows(case, target) for fault in gate.faults(row, case)
    ]
    assert wrong == []


@pytest.fixture(scope="module")
def ops():
    from vlmprune.kernels import triton

    return triton


def hashes(gate, call):
    return [launch.compiled.hash for launch in gate.compile_calls(call, gate.TARGETS["sm_90"])]


def test_no_budget_compiles_anew(gate, ops):
    x, sim = torch.empty(1, 640, 1024, dtype=torch.bfloat16), torch.empty(1, 200, 200)
    calls = {
        "select": lambda k: ops.topk_select(torch.empty(1, 640), k),
        "prune": lambda k: ops.prune(torch.empty(1, 640), k, [x]),
        "prune apart": lambda k: ops.prune(torch.empty(1, 640), k, [x], form="two"),
        "unprune": lambda k: ops.unprune(x[:, :k], torch.empty(1, k, dtype=torch.int32), 640),
        "maxmin": lambda k: ops.greedy_maxmin(sim, k, None, "argmax"),
        "dpp": lambda k: ops.greedy_dpp(sim, torch.empty(1, 200), k),
    }
    for name, call in calls.items():
        found = {tuple(hashes(gate, lambda call=call, k=k: call(k))) for k in (1, 7, 16, 64, 65, 128)}
        assert len(found) == 1, name


def test_no_step_compiles_anew(gate, ops):
    features = torch.empty(1, 100, 64)
    assert len(set(hashes(gate, lambda: ops.greedy_maxmin_features(features, 17, None, "argmax")))) == 1


def test_launches_with_the_same_facts_are_the_same_kernel(gate, ops):
    wide = torch.empty(1, 641, 2048, dtype=torch.bfloat16)
    views = (
        wide[:, 1:],
        wide[:, :640],
        wide[..., 1:1025],
        wide[..., :1000],
        wide[..., :1024],
        wide.float()[:, 1:],
    )
    found = {}
    for x in views:
        for k in (1, 16, 64):
            idx = torch.empty(1, k, dtype=torch.int32)
            for launch in gate.compile_calls(
                lambda x=x, idx=idx: ops.gather_rows([x], idx), gate.TARGETS["sm_90"]
            ):
                found.setdefault(launch.facts, set()).add(launch.compiled.hash)
    assert len(found) > 2
    assert all(len(names) == 1 for names in found.values())


def test_the_gate_sees_what_it_looks_for(gate):
    import triton

    from vlmprune.kernels.triton import gather

    case = next(case for case in gate.CASES if case.name.startswith("gather"))
    kernel = gather.gather_kernel
    blind = triton.jit(do_not_specialize=["d0", "b0", "r0", "k", "blocks", "split"])(kernel.fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "gather_kernel", blind)
        (row,) = gate.rows(case, "sm_90")
    assert any("two-byte accesses" in fault for fault in gate.faults(row, case))
