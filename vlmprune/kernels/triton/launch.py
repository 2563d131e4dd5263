# SPDX-License-Identifier: Apache-2.0
"""How kernels are started: the static launch table, and a cache of compiled kernels.

Triton's own launcher binds and inspects every argument anew, which takes longer than most kernels here run. A
compiled kernel found under the facts that it was compiled for is started without that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MAX_BLOCK = 8192  # tokens that one program holds in registers; beyond it, selection takes several launches
PROGRAMS = 132 * 12  # of one launch: what is resident on a large GPU, a few times over
SLICE = 32 * 1024  # bytes that one program copies; larger slices leave the GPU waiting for the slowest
TILE = 16 * 1024  # bytes of a tile of rows in registers
# fusing a * b + c is off, or results would differ between Triton versions, whose defaults differ
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}

Kernel = Any  # triton.JITFunction, or what stands in for one: Triton has no types
Start = Callable[..., None]
_compiled: dict[tuple[object, ...], Kernel] = {}
# of a kernel: which arguments are constants, and on which it specialises
_kinds: dict[object, tuple[frozenset[int], frozenset[int]]] = {}


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def block_of(n: int) -> int:
    """Keys that a program holds for ``n`` tokens; small ones share a variant."""
    return max(128, next_power_of_2(n))


def warps(block: int) -> int:
    """Warps of a program that holds ``block`` keys."""
    if block <= 1024:
        return 4
    return 8 if block <= 4096 else 16


def launch(kernel: Kernel, grid: int, *args: Any, num_warps: int) -> None:
    """Start ``grid`` programs; constants are positional too, and the first argument is a tensor there."""
    if grid:
        with _on(args[0].device):
            start(kernel, grid, args, args[0].device, num_warps)


def launch_steps(kernel: Kernel, grid: int, count: int, step: str, *args: Any, num_warps: int) -> None:
    """``launch`` ``count`` times; the argument named ``step``, not a specialised one, counts up from 0."""
    at = kernel.arg_names.index(step)
    device = args[0].device
    again = None
    with _on(device):
        for i in range(count if grid else 0):
            # a specialised argument would compile a variant of its own for the 1
            args = (*args[:at], i, *args[at + 1 :])
            if again is None:
                again = start(kernel, grid, args, device, num_warps)
            else:
                again(*args)


def _on(device: torch.device) -> AbstractContextManager:
    # a launch goes to the current device, wherever its tensors are
    foreign = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if foreign else nullcontext()


def start(
    kernel: Kernel, grid: int, args: tuple[Any, ...], device: torch.device, num_warps: int
) -> Start | None:
    """Through the cache on an NVIDIA GPU; by Triton's launcher elsewhere.

    That is the interpreter, and AMD, where the launcher looks at sizes of tensors too.

    Returns:
        What starts the same kernel again, where that is known.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        kernel[(grid,)](*args, num_warps=num_warps, **OPTIONS)
        return None
    key = (kernel.fn, device.index, num_warps, facts(kernel, args))
    found = _compiled.get(key)
    if found is None:
        # compiles the kernel and starts it
        found = _compiled[key] = kernel[(grid,)](*args, num_warps=num_warps, **OPTIONS)
        return on_grid(found, grid)
    again = on_grid(found, grid)
    again(*args)
    return again


def on_grid(compiled: Kernel, grid: int) -> Start:
    starts: Start = compiled[(grid, 1, 1)]
    return starts


def facts(kernel: Kernel, args: tuple[Any, ...]) -> tuple[object, ...]:
    """All of the arguments that a compiled kernel depends on: at least what Triton specialises on."""
    if kernel.fn not in _kinds:
        constant = frozenset(p.num for p in kernel.params if p.is_constexpr)
        _kinds[kernel.fn] = constant, frozenset(p.num for p in kernel.params if not p.do_not_specialize)
    constant, special = _kinds[kernel.fn]
    found: list[object] = []
    for at, arg in enumerate(args):
        if at in constant:
            found.append(arg)
        elif isinstance(arg, Tensor):
            # Triton emits wide loads where an address is a multiple of 16 bytes
            found.append((arg.dtype, arg.data_ptr() % 16 == 0))
        elif isinstance(arg, int):
            # passed as 64 bits then
            wide = arg.bit_length() > 31
            found.append((wide, arg % 16 == 0, arg == 1) if at in special else wide)
        else:
            found.append(type(arg))
    return tuple(found)
