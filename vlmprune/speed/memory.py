# SPDX-License-Identifier: Apache-2.0
"""Memory of a call, in total and from one module to the next, on CPU and CUDA."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Counts the live bytes of storages that ops make meanwhile, and their peak since the last ``take``."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):  # weights and inputs were there before
                self._known.setdefault(value.untyped_storage(), True)
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._known:
                self._known[storage] = True
                self.live += storage.nbytes()
                # views share a storage, which dies with the last of them
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def _free(self, count: int) -> None:
        self.live -= count

    def take(self) -> int:
        # the next peak starts from what is alive now
        peak, self.peak = self.peak, self.live
        return peak


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that a call holds beyond what was there; on the CPU without scratch memory of kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    # not inference mode: see memory_profile
    with torch.inference_mode(False), torch.no_grad(), LiveBytes() as live:
        call()
    return live.peak


def memory_profile(call: Callable[[], Any], root: nn.Module, device: str = "cpu") -> list[int]:
    """Peak bytes between one leaf module of ``root`` and the next, then what the result holds."""
    live = LiveBytes()

    def take(*_: object) -> None:
        if device == "cuda":
            peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        else:
            peaks.append(live.take())

    peaks: list[int] = []
    leaves = [module for module in root.modules() if not list(module.children())]
    # before and after every leaf: each peak is of the stretch between two of these moments
    handles = [leaf.register_forward_pre_hook(take) for leaf in leaves] + [
        leaf.register_forward_hook(take) for leaf in leaves
    ]
    try:
        # no inference mode: in it composite ops come whole and hide their temporaries
        with torch.inference_mode(False), torch.no_grad(), nullcontext() if device == "cuda" else live:
            result = call()
            take()
            # the result is still alive here, and is what is left
            peaks.append(torch.cuda.memory_allocated() if device == "cuda" else live.live)
            del result
    finally:
        for handle in handles:
            handle.remove()
    return peaks
