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


def _plain_setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
    ctx.inputs = len(inputs)


def _no_gradient(ctx: Any, *grads: Any) -> tuple:
    return (None,) * ctx.inputs


_GRADIENTS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "gather_rows": (_gather_setup, _gather_backward),
    "unprune": (_unprune_setup, _unprune_backward),
    "prune": (_prune_setup, _prune_backward),
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
