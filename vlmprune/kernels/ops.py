# SPDX-License-Identifier: Apache-2.0
"""The kernels as ``torch.ops.vlmprune.*``: what torch.compile, torch.export and autograd see. Registered when
first imported.

Each is opaque: its implementation is chosen while it runs. Rows are differentiable, indices and scores are
not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .backends import implementation

# forward and backward may run in different threads, so that the forced backend travels as an argument
SCHEMAS = {
    "topk_select": "(Tensor scores, SymInt k, *, str backend='') -> Tensor",
    "topk_select_varlen": "(Tensor scores, Tensor cu_n, Tensor k, Tensor cu_k, SymInt total_k, SymInt "
    "max_n, *, str backend='')"
    " -> Tensor",
    "prune": "(Tensor scores, SymInt k, Tensor[] xs, SymInt pre, SymInt post, *, str backend='') -> "
    "(Tensor, Tensor[])",
    "prune_varlen": "(Tensor scores, Tensor cu_n, Tensor k, Tensor cu_k, SymInt total_k, SymInt max_n, "
    "Tensor[] xs, *,"
    " str backend='') -> (Tensor, Tensor[])",
    "gather_rows": "(Tensor[] xs, Tensor idx, *, bool ordered=False, str backend='') -> Tensor[]",
    "unprune": "(Tensor g, Tensor idx, SymInt n, *, bool ordered=False, str backend='') -> Tensor",
    "greedy_maxmin": "(Tensor sim, SymInt k, Tensor? weight, str first, *, str backend='') -> (Tensor, "
    "Tensor)",
    "greedy_maxmin_features": "(Tensor features, SymInt k, Tensor? weight, str first, *, str "
    "backend='') -> (Tensor, Tensor)",
    "greedy_cover": "(Tensor rows, SymInt k, Tensor? weight, str combine, *, str backend='') -> (Tensor, "
    "Tensor)",
    "greedy_dpp": "(Tensor sim, Tensor relevance, SymInt k, *, str backend='') -> (Tensor, Tensor)",
    "greedy_dpp_features": "(Tensor features, Tensor relevance, SymInt k, *, str backend='') -> "
    "(Tensor, Tensor)",
    "attn_row_scores": "(Tensor q, Tensor k, Tensor? lse, SymInt v0, SymInt nv, float scale, *, str "
    "backend='') -> Tensor",
    "zoo_sensitivity": "(Tensor slope, Tensor kernel, *, str backend='') -> Tensor",
}

# held by the module: ops vanish when this object does
LIBRARY = torch.library.Library("vlmprune", "DEF")
NAMESPACE = torch.ops.vlmprune


def _runner(name: str) -> Callable[..., Any]:
    def run(*args: Any, backend: str = "", ordered: bool = False) -> Any:
        like = args[0]
        if name == "gather_rows":
            xs, idx = args
            # without a tensor there is no device to choose an implementation by
            if not xs:
                return []
            checks.inside(idx, xs[0].shape[1])
            like = xs[0]
        elif name == "unprune":
            checks.inside(args[1], args[2])
        made = implementation(name, like, backend, ordered)(*args)
        # one part whatever splits the heads: a compiler was promised the shape (1, B, nv)
        return reference.added(made)[None] if name == "attn_row_scores" else made

    return run


# --- shapes ---------------------------------------------------------------------------------------


def _indices(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def _kept(k: Any, n: Any) -> Any:
    # sizes may be symbols while compiling; min() would compare them, and so fix the smaller one for good
    return torch.sym_min(k, n)


def _topk_select(scores: Tensor, k: Any) -> Tensor:
    # the axis of samples of (B, N) and of (R, B, N) alike
    return _indices(scores, scores.shape[-2], _kept(k, scores.shape[-1]))


def _topk_select_varlen(
    scores: Tensor, cu_n: Tensor, k: Tensor, cu_k: Tensor, total_k: Any, max_n: Any
) -> Tensor:
    return _indices(scores, total_k)


def _prune(scores: Tensor, k: Any, xs: list[Tensor], pre: Any, post: Any) -> tuple[Tensor, list[Tensor]]:
    idx = _topk_select(scores, k)
    return idx, [x.new_empty(x.shape[0], pre + idx.shape[1] + post, *x.shape[2:]) for x in xs]


def _prune_varlen(
    scores: Tensor, cu_n: Tensor, k: Tensor, cu_k: Tensor, total_k: Any, max_n: Any, xs: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    return _indices(scores, total_k), [x.new_empty(total_k, *x.shape[1:]) for x in xs]


def _gather_rows(xs: list[Tensor], idx: Tensor) -> list[Tensor]:
    return [x.new_empty(*idx.shape, *x.shape[2:]) for x in xs]


def _unprune(g: Tensor, idx: Tensor, n: Any) -> Tensor:
    return g.new_empty(g.shape[0], n, *g.shape[2:])


def _maxmin(like: Tensor, k: Any, weight: Tensor | None, first: str) -> tuple[Tensor, Tensor]:
    k = _kept(k, like.shape[1])
    return _indices(like, like.shape[0], k), like.new_empty(like.shape[0], k)


def _cover(rows: Tensor, k: Any, weight: Tensor | None, combine: str) -> tuple[Tensor, Tensor]:
    k = _kept(k, rows.shape[2])
    return _indices(rows, rows.shape[0], k), rows.new_empty(rows.shape[0], k)


def _dpp(like: Tensor, relevance: Tensor, k: Any) -> tuple[Tensor, Tensor]:
    return _maxmin(like, k, None, "nn")


def _attn_row_scores(q: Tensor, k: Tensor, lse: Tensor | None, v0: Any, nv: Any, scale: float) -> Tensor:
    return q.new_empty(1, q.shape[0], nv, dtype=torch.float32)


def _zoo_sensitivity(slope: Tensor, kernel: Tensor) -> Tensor:
    return slope.new_empty(slope.shape[:2])


_SHAPES: dict[str, Callable[..., Any]] = {
    "topk_select": _topk_select,
    "topk_select_varlen": _topk_select_varlen,
    "prune": _prune,
    "prune_varlen": _prune_varlen,
    "gather_rows": _gather_rows,
    "unprune": _unprune,
    "greedy_maxmin": _maxmin,
    "greedy_maxmin_features": _maxmin,
    "greedy_cover": _cover,
    "greedy_dpp": _dpp,
    "greedy_dpp_features": _dpp,
    "attn_row_scores": _attn_row_scores,
    "zoo_sensitivity": _zoo_sensitivity,
}


# --- gradients ------------------------------------------------------------------------------------


def _gather_setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    xs, idx = inputs
    ctx.save_for_backward(idx)
    ctx.sizes, ctx.options = [x.shape[1] for x in xs], keyword_only_inputs


def _gather_backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    (idx,) = ctx.saved_tensors
    # without a promise about the order of idx Triton cannot scatter, whoever has forced it
    options = ctx.options if ctx.options["ordered"] else {"backend": "torch"}
    back = [_scatter(g, idx, n, options) for g, n in zip(grads, ctx.sizes, strict=True)]
    return back, None


def _scatter(g: Tensor | None, idx: Tensor, n: int, options: dict[str, Any]) -> Tensor | None:
    return None if g is None else torch.ops.vlmprune.unprune(g, idx, n, **options)


def _unprune_setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.options = keyword_only_inputs


def _unprune_backward(ctx: Any, grad: Tensor) -> tuple:
    (idx,) = ctx.saved_tensors
    return torch.ops.vlmprune.gather_rows([grad], idx, **ctx.options)[0], None, None


def _prune_setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    scores, _, xs, pre, post = inputs
    idx = output[0]
    ctx.mark_non_differentiable(idx)
    ctx.save_for_backward(idx)
    ctx.ends = scores.shape[-1], pre, post
    ctx.sizes = [x.shape[1] for x in xs]
    ctx.options = {"ordered": True, **keyword_only_inputs}


def _prune_backward(ctx: Any, _: Tensor, grads: list[Tensor | None]) -> tuple:
    (idx,) = ctx.saved_tensors
    # the rows before and behind the tokens have gradients, too
    rows = reference.with_ends(idx, *ctx.ends)
    return (
        None,
        None,
        [_scatter(g, rows, n, ctx.options) for g, n in zip(grads, ctx.sizes, strict=True)],
        None,
        None,
    )


def _prune_varlen_setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    scores, cu_n, _, cu_k, total_k, _, _ = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(output[0], cu_n, cu_k)
    ctx.sizes = scores.shape[0], total_k
    ctx.options = {"ordered": True, **keyword_only_inputs}


def _prune_varlen_backward(ctx: Any, _: Tensor, grads: list[Tensor | None]) -> tuple:
    idx, cu_n, cu_k = ctx.saved_tensors
    total, total_k = ctx.sizes
    # a packed batch goes back as one long sample (1, T, *)
    rows = reference.packed_rows(idx, cu_n, cu_k, total_k).int()[None]
    back = [_scatter(None if g is None else g[None], rows, total, ctx.options) for g in grads]
    return None, None, None, None, None, None, [full if full is None else full[0] for full in back]


def _plain_setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
    ctx.inputs = len(inputs)


def _no_gradient(ctx: Any, *grads: Any) -> tuple:
    return (None,) * ctx.inputs


_GRADIENTS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "gather_rows": (_gather_setup, _gather_backward),
    "unprune": (_unprune_setup, _unprune_backward),
    "prune": (_prune_setup, _prune_backward),
    "prune_varlen": (_prune_varlen_setup, _prune_varlen_backward),
}


def _register() -> None:
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + schema)
        # one function for all devices, below autograd: which implementation runs is decided in the call
        LIBRARY.impl(name, _runner(name), "CompositeExplicitAutograd")
        shapes = _SHAPES[name]
        torch.library.register_fake(
            f"vlmprune::{name}",
            # a default binds the value of this round, where a closure would see that of the last
            lambda *args, shapes=shapes, backend="", ordered=False: shapes(*args),
            lib=LIBRARY,
        )
        setup, backward = _GRADIENTS.get(name, (_plain_setup, _no_gradient))
        torch.library.register_autograd(f"vlmprune::{name}", backward, setup_context=setup, lib=LIBRARY)


_register()
