# SPDX-License-Identifier: Apache-2.0
"""Compile every launch of the launch table for GPUs that need not be there, and read what the compilers made of it.

    python kernels/compile_gate.py                # writes its rows into kernels/compile_gate.csv, and kernels/compile_gate.md
    python kernels/compile_gate.py --check        # compiles, compares with the limits, writes nothing

A stub driver stands for the GPU. The launchers run as they are, on real CPU tensors, so pointer alignment and what is specialised
are those of a launch; instead of being started, each kernel is compiled. Rows of other Triton versions in the CSV stay.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from vlmprune.kernels import triton_launch
from vlmprune.kernels import triton_ops as ops

HERE = Path(__file__).resolve().parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COPIES = ("prune_kernel", "gather_kernel", "unprune_kernel")


class StubDriver:
    """Just enough of a driver for ``warmup``: it answers which GPU to compile for, and can start nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name):
        return name

    def is_active(self):
        return True


@dataclass(frozen=True)
class Row:
    triton: str
    target: str
    case: str
    kernel: str
    warps: int
    registers: int
    stack: int  # bytes of spills, on AMD spilled vector registers
    scalar_spills: int  # AMD only
    shared: int
    loads_128: int
    stores_128: int
    accesses_16: int

    @property
    def key(self) -> tuple[str, ...]:
        return self.triton, self.target, self.case, self.kernel


@dataclass(frozen=True)
class Case:
    """One call of a launcher. Memory of large inputs is never touched."""

    name: str
    call: Callable[[], object]
    quick: bool = False  # of the subset for every run
    vector: bool = True  # its copies must be 16 bytes wide


def compile_calls(call: Callable[[], object], target: GPUTarget) -> Iterator[tuple[object, int, object]]:
    """(kernel, warps, compiled) of all launches of ``call``, compiled for ``target``."""
    found = []

    def record(kernel, grid, args, device, num_warps):
        compiled = kernel.warmup(*args, grid=(grid,), num_warps=num_warps, **triton_launch.OPTIONS)
        found.append((kernel, num_warps, compiled))

    original = triton_launch.start
    triton.runtime.driver.set_active(StubDriver(target))
    triton_launch.start = record
    try:
        call()
    finally:
        triton_launch.start = original
    for kernel, *_ in found:
        kernel.device_caches.clear()  # they do not know that the target can change
    return iter(found)


def tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise SystemExit(f"{path} is missing; a wheel of Triton holds it")
    return str(path)


def nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
        code = subprocess.run([tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True).stdout
    count = lambda pattern: len(re.findall(pattern, code))  # noqa: E731
    # LOCAL stays 0 even where registers spill through the stack
    stack = int(re.search(r"STACK:(\d+)", usage.stdout)[1])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage.stdout)[1]),
        "stack": max(stack, count(r"\b(?:LDL|STL)\b")),
        "scalar_spills": 0,
        "loads_128": count(r"\bLDG\.E[.\w]*\.128"),
        "stores_128": count(r"\bSTG\.E[.\w]*\.128"),
        "accesses_16": count(r"\b(?:LDG|STG)\.E[.\w]*\.U16"),
    }


def amd(code: str) -> dict[str, int]:
    number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # noqa: E731
    count = lambda pattern: len(re.findall(pattern, code))  # noqa: E731
    return {
        "registers": number("vgpr_count"),
        "stack": number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"),
        "loads_128": count(r"\b(?:global|buffer)_load_dwordx4\b"),
        "stores_128": count(r"\b(?:global|buffer)_store_dwordx4\b"),
        "accesses_16": count(r"\b(?:global|buffer)_(?:load_[us]?short|load_short_d16|store_short)"),
    }


def rows(case: Case, target: str) -> list[Row]:
    found = {}
    for kernel, warps, compiled in compile_calls(case.call, TARGETS[target]):
        used = nvidia(compiled.asm["cubin"]) if "cubin" in compiled.asm else amd(compiled.asm["amdgcn"])
        name = kernel.__name__ if hasattr(kernel, "__name__") else kernel.fn.__name__
        if name in found:  # launched again with other constants: a name of its own
            name = f"{name} ({sum(other.startswith(name) for other in found) + 1})"
        found[name] = Row(triton.__version__, target, case.name, name, warps, shared=compiled.metadata.shared, **used)
    return list(found.values())
