# SPDX-License-Identifier: Apache-2.0
"""Compile every launch of the launch table for GPUs that need not be there, and read what the compilers made
of it.

    python kernels/compile_gate.py                # writes its rows into kernels/compile_gate.csv, and
    kernels/compile_gate.md python kernels/compile_gate.py --check        # compiles, compares with the
    limits, writes nothing

A stub driver stands for the GPU. The launchers run as they are, on real CPU tensors, so pointer alignment and
what is specialised are those of a launch; instead of being started, each kernel is compiled. Rows of other
Triton versions in the CSV stay.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from vlmprune.kernels.triton import launch as launches

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not the root, see CONTRIBUTING.md
from launch_table import CASES, Case  # noqa: E402

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


class Launch(NamedTuple):
    kernel: str
    warps: int
    compiled: Any
    facts: tuple  # the key of the launch cache


def compile_calls(call: Callable[[], object], target: GPUTarget) -> list[Launch]:
    """All launches of ``call``, compiled for ``target``."""
    found, kernels = [], set()

    def record(kernel, grid, args, device, num_warps):
        compiled = kernel.warmup(*args, grid=(grid,), num_warps=num_warps, **launches.OPTIONS)
        found.append(Launch(kernel.fn.__name__, num_warps, compiled, launches.facts(kernel, args)))
        kernels.add(kernel)

    original = launches.start
    triton.runtime.driver.set_active(StubDriver(target))
    launches.start = record
    try:
        call()
    finally:
        launches.start = original
        for kernel in kernels:
            kernel.device_caches.clear()  # they do not know that the target can change
    return found


def tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise SystemExit(f"{path} is missing; a wheel of Triton holds it")
    return str(path)


def nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [tool("cuobjdump"), "--dump-resource-usage"], [tool("nvdisasm"), "-c"]
        usage, code = (
            subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
            for command in commands
        )
    count = lambda pattern: len(re.findall(pattern, code))  # noqa: E731
    # LOCAL stays 0 even where registers spill through the stack
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
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
    """One per kernel that the case launches; launches of a kernel with other constants are numbered."""
    found = {}
    for launch in compile_calls(case.call, TARGETS[target]):
        asm = launch.compiled.asm
        found.setdefault(
            launch.compiled.hash, (launch, nvidia(asm["cubin"]) if "cubin" in asm else amd(asm["amdgcn"]))
        )
    names = Counter()
    table = []
    for launch, used in found.values():
        names[launch.kernel] += 1
        name = launch.kernel if names[launch.kernel] == 1 else f"{launch.kernel} ({names[launch.kernel]})"
        shared = launch.compiled.metadata.shared
        table.append(Row(triton.__version__, target, case.name, name, launch.warps, shared=shared, **used))
    return table


# most registers of a thread of each kernel; more would leave fewer programs on the GPU, or spill next
CEILINGS = {"histogram_kernel": 208, "compact_kernel": 192}
CEILING = 160


def faults(row: Row, case: Case) -> list[str]:
    kernel = row.kernel.partition(" ")[0]
    ceiling = CEILINGS.get(kernel, CEILING)
    found = []
    if row.stack:
        found.append(f"spills {row.stack}")
    if row.registers > (ceiling if case.vector else 255):
        found.append(f"takes {row.registers} registers; at most {ceiling}")
    if kernel in COPIES and case.vector and not (row.loads_128 and row.stores_128 and not row.accesses_16):
        found.append(
            f"copies by {row.loads_128} + {row.stores_128} wide and {row.accesses_16} two-byte accesses"
        )
    return [f"{row.target}, {case.name}, {row.kernel}: {fault}" for fault in found]


# --- what is published ----------------------------------------------------------------------------


def stored() -> list[Row]:
    path = HERE / "compile_gate.csv"
    if not path.exists():
        return []
    types = {field.name: str if field.type in ("str", str) else int for field in fields(Row)}
    with path.open(newline="") as file:
        return [
            Row(**{name: types[name](value) for name, value in line.items()}) for line in csv.DictReader(file)
        ]


def write(new: list[Row]) -> None:
    order = {case.name: at for at, case in enumerate(CASES)}
    rows = [row for row in stored() if row.triton != triton.__version__ and row.case in order] + new
    rows.sort(key=lambda row: (order[row.case], row.kernel, row.triton, list(TARGETS).index(row.target)))
    with (HERE / "compile_gate.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(map(asdict, rows))
    columns = sorted(
        {(row.triton, row.target) for row in rows},
        key=lambda column: (column[0], list(TARGETS).index(column[1])),
    )
    lines = {}
    for row in rows:
        wide = f", {row.loads_128}+{row.stores_128}" if row.loads_128 or row.stores_128 else ""
        spills = f", {row.stack} spilled" if row.stack else ""
        scalars = f", {row.scalar_spills} scalar" if row.scalar_spills else ""
        cells = lines.setdefault((row.case, row.kernel, row.warps), {})
        cells[row.triton, row.target] = f"{row.registers}, {row.shared}{wide}{spills}{scalars}"
    text = [
        "# What the compilers make of every launch",
        "",
        "Written by `python kernels/compile_gate.py`, once per Triton version; the raw rows are in "
        "`compile_gate.csv`.",
        "Static evidence: nothing here was run on a GPU. Each cell: registers of a thread, bytes of shared "
        "memory, 128-bit",
        "loads + stores in the code, and spills where there are any (`scalar`: scalar registers of AMD, kept "
        "in vector",
        "registers, not in memory).",
        "",
        "| Case | Kernel | Warps | "
        + " | ".join(f"{version}, {target}" for version, target in columns)
        + " |",
        "|---" * (3 + len(columns)) + "|",
        *(
            f"| {case} | {kernel} | {warps} | "
            + " | ".join(cells.get(column, "") for column in columns)
            + " |"
            for (case, kernel, warps), cells in lines.items()
        ),
    ]
    (HERE / "compile_gate.md").write_text("\n".join(text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    new, wrong = [], []
    for case in CASES:
        for target in TARGETS:
            found = rows(case, target)
            new += found
            wrong += [fault for row in found for fault in faults(row, case)]
        print(f"{case.name}: {len(new)} kernels so far, {len(wrong)} faults", flush=True)
    print(*wrong, sep="\n")
    if not check:
        write(new)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
