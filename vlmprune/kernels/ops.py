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

from . import checks
from .backends import implementation

# forward and backward may run in different threads, so that the forced backend travels as an argument
SCHEMAS = {
    "topk_select": "(Tensor scores, SymInt k, *, str backend='') -> Tensor",
    "prune": "(Tensor scores, SymInt k, Tensor[] xs, *, str backend='') -> (Tensor, Tensor[])",
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
    "zoo_sensitivity": "(Tensor slope, Tensor kernel, *, str backend='') -> Tensor",
    "ordered_indices": "(Tensor idx, SymInt least, SymInt n, *, str backend='') -> (Tensor, Tensor)",
    "host_slots": "(Tensor idx, SymInt n, *, str backend='') -> Tensor",
    "stretch": "(Tensor scores, float constant, *, str backend='') -> Tensor",
    "detrend": "(Tensor scores, Tensor? real, *, str backend='') -> Tensor",
    "contextual_groups": "(Tensor keys, Tensor kept, SymInt first, SymInt contextual, *, str "
    "backend='') -> (Tensor, Tensor)",
    "contextual_rows": "(Tensor features, Tensor slots, Tensor row, SymInt start, str combine, *, str "
    "backend='') -> Tensor",
    "crop_variance": "(Tensor features, Tensor members, *, str backend='') -> Tensor",
    "crop_scores": "(Tensor attention, Tensor? variance, Tensor members, float alpha, *, str "
    "backend='') -> (Tensor, Tensor)",
    "share_out": "(Tensor mass, Tensor members, SymInt k, float tau, str rule, *, str backend='') -> Tensor",
    "top_k_in_groups": "(Tensor scores, Tensor members, Tensor quota, SymInt k, *, str backend='') -> Tensor",
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
        return implementation(name, like, backend, ordered)(*args)

    return run


# --- shapes ---------------------------------------------------------------------------------------


def _indices(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def _kept(k: Any, n: Any) -> Any:
    # sizes may be symbols while compiling; min() would compare them, and so fix the smaller one for good
    return torch.sym_min(k, n)


def _topk_select(scores: Tensor, k: Any) -> Tensor:
    return _indices(scores, scores.shape[0], _kept(k, scores.shape[1]))


def _prune(scores: Tensor, k: Any, xs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    idx = _topk_select(scores, k)
    return idx, _gather_rows(xs, idx)


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


def _zoo_sensitivity(slope: Tensor, kernel: Tensor) -> Tensor:
    return slope.new_empty(slope.shape[:2])


def _ordered_indices(idx: Tensor, least: Any, n: Any) -> tuple[Tensor, Tensor]:
    return idx.new_empty(idx.shape, dtype=torch.int64), idx.new_empty(idx.shape, dtype=torch.float32)


def _host_slots(idx: Tensor, n: Any) -> Tensor:
    return idx.new_empty(idx.shape[0], _kept(idx.shape[1], n), dtype=torch.int64)


def _stretch(scores: Tensor, constant: float) -> Tensor:
    return scores.new_empty(scores.shape)


def _detrend(scores: Tensor, real: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32)


def _contextual_groups(keys: Tensor, kept: Tensor, first: Any, contextual: Any) -> tuple[Tensor, Tensor]:
    batch, n = keys.shape[:2]
    rows = first + kept.shape[1] + contextual
    return keys.new_empty(batch, rows, dtype=torch.int64), keys.new_empty(batch, n, dtype=torch.int64)


def _contextual_rows(features: Tensor, slots: Tensor, row: Tensor, start: Any, combine: str) -> Tensor:
    return features.new_empty(features.shape[0], slots.shape[1] - start, features.shape[2])


def _crop_variance(features: Tensor, members: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], *members.shape, dtype=torch.float32)


def _crop_scores(
    attention: Tensor, variance: Tensor | None, members: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    size = attention.shape[0], members.shape[0]
    return attention.new_empty(*size, members.shape[1]), attention.new_empty(size)


def _share_out(mass: Tensor, members: Tensor, k: Any, tau: float, rule: str) -> Tensor:
    return mass.new_empty(mass.shape, dtype=torch.int64)


def _top_k_in_groups(scores: Tensor, members: Tensor, quota: Tensor, k: Any) -> Tensor:
    return scores.new_empty(scores.shape[0], _kept(k, members.numel()), dtype=torch.int64)


_SHAPES: dict[str, Callable[..., Any]] = {
    "topk_select": _topk_select,
    "prune": _prune,
    "gather_rows": _gather_rows,
    "unprune": _unprune,
    "greedy_maxmin": _maxmin,
    "greedy_maxmin_features": _maxmin,
    "greedy_cover": _cover,
    "greedy_dpp": _dpp,
    "greedy_dpp_features": _dpp,
    "zoo_sensitivity": _zoo_sensitivity,
    "ordered_indices": _ordered_indices,
    "host_slots": _host_slots,
    "stretch": _stretch,
    "detrend": _detrend,
    "contextual_groups": _contextual_groups,
    "contextual_rows": _contextual_rows,
    "crop_variance": _crop_variance,
    "crop_scores": _crop_scores,
    "share_out": _share_out,
    "top_k_in_groups": _top_k_in_groups,
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
    idx, _ = output
    ctx.mark_non_differentiable(idx)
    ctx.save_for_backward(idx)
    # selected indices ascend, so that Triton can scatter the gradient
    ctx.n, ctx.options = inputs[0].shape[1], {"ordered": True, **keyword_only_inputs}


def _prune_backward(ctx: Any, _: Tensor, grads: list[Tensor | None]) -> tuple:
    (idx,) = ctx.saved_tensors
    return None, None, [_scatter(g, idx, ctx.n, ctx.options) for g in grads]


def _contextual_setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    _, slots, row, ctx.start, ctx.combine = inputs
    ctx.save_for_backward(slots, row)


def _contextual_backward(ctx: Any, grad: Tensor) -> tuple:
    slots, row = ctx.saved_tensors
    number = row - ctx.start  # (B, N) of the contextual row, below 0 for none
    at = number.clamp_min(0)
    # (B, c) patches of every row, its target among them
    count = (number[..., None] == torch.arange(grad.shape[1], device=row.device)).sum(1)
    count = count.to(torch.promote_types(grad.dtype, torch.float32))
    if ctx.combine == "mean":
        share = (1 / count).gather(1, at)
    else:  # a target is whole in its row, its members are averaged
        share = (1 / (count - 1).clamp_min(1)).gather(1, at).scatter(1, slots[:, ctx.start :], 1.0)
    share = torch.where(number < 0, 0.0, share).to(grad.dtype)[..., None]
    back = grad.gather(1, at[..., None].expand(-1, -1, grad.shape[2])) * share
    return back, None, None, None, None


def _plain_setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
    ctx.inputs = len(inputs)


def _no_gradient(ctx: Any, *grads: Any) -> tuple:
    return (None,) * ctx.inputs


_GRADIENTS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "gather_rows": (_gather_setup, _gather_backward),
    "unprune": (_unprune_setup, _unprune_backward),
    "prune": (_prune_setup, _prune_backward),
    "contextual_rows": (_contextual_setup, _contextual_backward),
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
