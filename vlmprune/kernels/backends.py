# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: a forced one, else what device, dtype and size ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError, UnsupportedError, did_you_mean
from . import cpu, eager, reference
from .cpu_greedy import GRAM

BACKENDS = ("reference", "torch", "triton")
_COPIES = ("gather_rows", "unprune")  # move numbers and compute none, so any dtype will do
_NO_TRITON = ("greedy_cover",)
# a context variable, so that what one thread forces is not seen by others
_forced: ContextVar[str] = ContextVar("vlmprune_kernels", default="")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a backend inside the block, in this thread: "reference", "torch" (the fast path without Triton),
    or "triton".

    What is not there raises; nothing falls back to another one. Of a compiled function, the block around its
    *call* counts.
    """
    token = _forced.set(known(backend))
    try:
        yield
    finally:
        _forced.reset(token)


def known(backend: str) -> str:
    if backend not in BACKENDS:
        raise SpecError(
            f"backend={backend!r}; expected one of {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
        )
    return backend


def forced(backend: str | None) -> str:
    """The backend of an argument, else of the context, else "" for the automatic choice."""
    return known(backend) if backend else _forced.get()


def implementation(name: str, like: Tensor, backend: str | None, ordered: bool = False) -> Callable[..., Any]:
    """The function that does ``name`` to validated arguments such as ``like``."""
    wanted = forced(backend)
    if wanted == "triton" and (obstacle := _obstacle(name, like, ordered)):
        raise UnsupportedError(
            f"backend 'triton' cannot do {name}: {obstacle}. Use backend 'torch', or name none"
        )
    if wanted == "reference" or like.numel() == 0:  # a kernel needs something to do
        return getattr(reference, name)
    # not measured on a GPU yet: by the estimates, Triton is ahead wherever it can run
    if wanted == "triton" or (not wanted and like.is_cuda and not _obstacle(name, like, ordered)):
        return _launcher(name, like, wanted)
    found = getattr(cpu if like.is_cpu else eager, name)
    # unprune alone has two ways: distinct rows are copied, others must be added up
    return partial(found, ordered=ordered) if name == "unprune" else found


def _obstacle(name: str, like: Tensor, ordered: bool) -> str:
    """Why Triton cannot do it, or nothing."""
    if name in _NO_TRITON:
        return "it has no Triton kernel"
    if not _has_triton():
        return "Triton is not installed"
    if like.device.type != "cuda" and not (like.device.type == "cpu" and _interpreted()):
        return (
            f"the tensors are on {like.device.type}; it runs on GPUs, or with TRITON_INTERPRET=1 set from "
            "the start on the CPU"
        )
    if like.dtype == torch.float64 and name not in _COPIES:
        return "its kernels compute in float32, and the tensors are float64"
    if name == "unprune" and not ordered:
        return "it relies on ascending, distinct indices: promise them with ordered=True"
    return ""


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _launcher(name: str, like: Tensor, wanted: str) -> Callable[..., Any]:
    from . import triton

    # by estimate, one matrix product and lookups in it beat products row by row while the matrix stays in the
    # cache
    if not wanted and name.endswith("_features") and like.shape[1] <= GRAM:
        pick = getattr(triton, name.removesuffix("_features"))
        return lambda features, *rest: pick(features @ features.transpose(1, 2), *rest)
    return getattr(triton, name)
