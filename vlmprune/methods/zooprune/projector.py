# SPDX-License-Identifier: Apache-2.0
"""The projector as layers whose derivatives can be written down: [LayerNorm] Linear act Linear.

The form is found by the structure of the module and checked by value. What has another form is a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from .cache import Compared, readable, remember

Map = Callable[[Tensor], Tensor]

_HINT = "use estimator='zo' without rank, which works for every projector"


class Layer(NamedTuple):
    """A linear layer whose matrix is one factor, or a product of two of low rank, first applied first."""

    factors: tuple[Tensor, ...]
    bias: Tensor | None

    def linear(self, x: Tensor) -> Tensor:
        return self._product(x, None)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        *inner, last = self.factors
        for factor in inner:
            x = nn.functional.linear(x, factor)
        return nn.functional.linear(x, last, bias)  # one launch with the bias

    @property
    def matrix(self) -> Tensor:
        return self.factors[0] if len(self.factors) == 1 else self.factors[1] @ self.factors[0]


@dataclass(frozen=True, eq=False)
class TwoLayers:
    """A projector of the form [LayerNorm] Linear act Linear, in the dtype of the probe."""

    gain: Tensor | None  # None: no LayerNorm
    shift: Tensor | None
    eps: float
    first: Layer
    act: Map
    second: Layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(self.act(self._pre(x)))

    def _pre(self, x: Tensor) -> Tensor:
        if self.gain is None:
            return self.first(x)
        return self.first(nn.functional.layer_norm(x, self.gain.shape, self.gain, self.shift, self.eps))

    def slope(self, x: Tensor) -> Tensor:
        """(..., H) derivative of the activation at x (..., C)."""
        pre = self._pre(x)
        # the activation acts on every entry alone, so that ones give the derivative of each
        with torch.enable_grad():
            return torch.autograd.grad(self.act(pre.requires_grad_()), pre, torch.ones_like(pre))[0]

    def standardised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised x (..., C) before gain and shift, and the (...) variances that it was divided by."""
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps), x.var(-1, correction=0) + self.eps


class _Parts(NamedTuple):
    """The modules of a projector of the known form."""

    norm: nn.LayerNorm | None
    first: nn.Linear
    act: nn.Module
    second: nn.Linear

    def read(self, dtype: torch.dtype) -> TwoLayers:
        first, second = _layer(self.first, dtype), _layer(self.second, dtype)
        norm = self.norm
        if norm is None:
            return TwoLayers(None, None, 0.0, first, self.act, second)
        gain = torch.ones(norm.normalized_shape).to(self.first.weight) if norm.weight is None else norm.weight
        shift = None if norm.bias is None else norm.bias.detach().to(dtype)
        return TwoLayers(gain.detach().to(dtype), shift, norm.eps, first, self.act, second)


def _layer(linear: nn.Linear, dtype: torch.dtype) -> Layer:
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    return Layer((readable(linear.weight).to(dtype),), bias)


def two_layers(
    projector: Any,
    dtype: torch.dtype = torch.float32,
    rank: int | None = None,
    compared: Compared | None = None,
) -> TwoLayers:
    """The projector as [LayerNorm] Linear act Linear, or UnsupportedError.

    Args:
        projector: a module.
        dtype: of the weights.
        rank: both matrices are cut to their best approximation of this rank; None: the full ones.
        compared: of the method that asks.
    """
    if not isinstance(projector, nn.Module):
        raise UnsupportedError(
            f"the projector is a {type(projector).__name__}, not a module whose layers can be read; {_HINT}"
        )
    parts = _find_parts(projector)
    # the check runs the projector, once for each state of its weights
    if parts is None or not remember(
        projector, "same map", lambda: _same_map(projector, parts.read(torch.float32)), compared
    ):
        refuse_packed(projector)
        raise UnsupportedError(
            f"the projector {type(projector).__name__} is not of the form [LayerNorm] Linear act Linear; "
            f"{_HINT}"
        )
    full = parts.read(dtype)
    if rank is None:
        return full

    def cut(name: str, layer: Layer, rank: int) -> Layer:
        factors = remember(
            projector, (name, rank, dtype), lambda: _low_rank(layer.factors[0], rank), compared
        )
        return Layer(factors, layer.bias)

    return replace(full, first=cut("first", full.first, rank), second=cut("second", full.second, rank))


def refuse_packed(projector: nn.Module) -> None:
    """Refuse weights in a packed form, as those of bitsandbytes are."""
    packed = [
        name
        for name, value in chain(projector.named_parameters(), projector.named_buffers())
        if name.endswith("weight") and not value.is_floating_point()
    ]
    if packed:
        raise UnsupportedError(
            f"{packed} of {type(projector).__name__} are quantised and cannot be read as numbers; keep the "
            "projector unquantised"
        )


def _find_parts(projector: nn.Module) -> _Parts | None:
    leaves = [
        m for m in projector.modules() if next(m.children(), None) is None and not isinstance(m, nn.Dropout)
    ]
    head = leaves[0] if leaves else None
    norm = head if isinstance(head, nn.LayerNorm) else None
    leaves = leaves if norm is None else leaves[1:]
    if len(leaves) != 3:
        return None
    first, second = leaves[0], leaves[2]
    if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear):
        return None
    legible = all(  # packed weights have other shapes
        layer.weight.shape == (layer.out_features, layer.in_features)
        and layer.weight.is_floating_point()
        and not layer.weight.is_meta
        for layer in (first, second)
    )
    # a gate takes half of what the first one gives
    if (
        not legible
        or first.out_features != second.in_features
        or (norm is not None and norm.normalized_shape != (first.in_features,))
    ):
        return None
    return _Parts(norm, first, leaves[1], second)


def _same_map(projector: nn.Module, layers: TwoLayers) -> bool:
    """Whether the layers do what the projector does; their order in the module was a guess."""
    like = next(projector.parameters())
    width = layers.first.matrix.shape[1]
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
    x = x.to(like.device, like.dtype)
    try:
        expected = projector(x).detach().float()
    except RuntimeError:  # mergers refuse tokens of the width of their first linear layer
        return False
    found = layers(x.float())
    if expected.shape != found.shape:
        return False
    return bool((found - expected).norm() <= 0.02 * expected.norm())  # bfloat16 may round


def _low_rank(weight: Tensor, rank: int) -> tuple[Tensor, ...]:
    if rank >= min(weight.shape):
        return (weight,)
    left, scale, right = torch.linalg.svd(weight, full_matrices=False)
    # in the order in which they are applied: to C, then from rank to the output
    return right[:rank], left[:, :rank] * scale[:rank]


def as_map(projector: Any, dtype: torch.dtype, rank: int | None, compared: Compared | None = None) -> Map:
    """The projector, computing in ``dtype``."""
    if rank is not None:
        return two_layers(projector, dtype, rank, compared)
    if not isinstance(projector, nn.Module):
        return projector
    try:
        return two_layers(projector, dtype, compared=compared)
    except UnsupportedError:  # any other module runs as it is
        state = dict(chain(projector.named_parameters(), projector.named_buffers()))
    refuse_packed(projector)
    if all(value.dtype == dtype for value in state.values() if value.is_floating_point()):
        return projector
    # trap: functional_call swaps the weights while it runs, so this path is not for threads on one model
    cast = {
        name: value.detach().to(dtype) if value.is_floating_point() else value
        for name, value in state.items()
    }
    return lambda x: torch.func.functional_call(projector, cast, (x,))
