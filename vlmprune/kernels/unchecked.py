# SPDX-License-Identifier: Apache-2.0
"""The kernels for callers that have just built or looked at their input: nothing is checked a second time.

All other callers take ``dispatch``. An index that is not there reads other memory, or fails far from its
cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import forced, implementation
from .checks import PLAIN


def topk_select(scores: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    """(B, min(k, N)) ascending int32 indices of the k highest scores (B, N)."""
    # all kernels rank float32; half precision becomes that without loss
    scores = scores.float()
    idx: Tensor = run("topk_select", (scores, min(k, scores.shape[1])), (scores,), backend)
    return idx


def prune(
    scores: Tensor, k: int, xs: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """``topk_select``, and these rows (B, min(k, N), *) of each of xs (B, N, *)."""
    scores = scores.float()
    idx, ys = run("prune", (scores, min(k, scores.shape[1]), list(xs)), (scores, *xs), backend, xs)
    return idx, list(ys)


def gather_rows(
    xs: Sequence[Tensor], idx: Tensor, *, ordered: bool = False, backend: str | None = None
) -> list[Tensor]:
    """(B, K, *) rows of each of xs (B, N, *) at idx (B, K); ``ordered`` promises ascending, distinct ones."""
    return list(run("gather_rows", (list(xs), idx), (idx, *xs), backend, xs, ordered))


def run(
    name: str,
    args: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    backend: str | None,
    differentiable: Sequence[Tensor] = (),
    ordered: bool = False,
) -> Any:
    """Straight to the implementation, or through ``torch.ops`` for a compiler, autograd or a fake mode."""
    compiling, grad = torch.compiler.is_compiling(), torch.is_grad_enabled()
    # lists, not generators: this runs before every kernel, and has two or three entries to look at
    recorded = grad and any([x.requires_grad for x in differentiable])
    if not compiling and not recorded and all([x is None or type(x) in PLAIN for x in tensors]):
        like = args[0][0] if name == "gather_rows" else args[0]
        start = implementation(name, like, backend, ordered)
        if not (grad and any([x is not None and x.requires_grad for x in tensors])):
            return start(*args)
        with torch.no_grad():  # entering it takes as long as a small kernel
            return start(*args)
    # registers the ops, which only a compiler, autograd or a fake mode has a use for
    from . import ops

    # what use() says is read when a compiled function runs; a gradient runs elsewhere, so that it is told
    options: dict[str, Any] = {"backend": (backend or "") if compiling else forced(backend)}
    if name in ("gather_rows", "unprune"):
        options["ordered"] = ordered
    return getattr(ops.NAMESPACE, name)(*args, **options)
