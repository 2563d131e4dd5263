# SPDX-License-Identifier: Apache-2.0
"""How far a small change of a visual token moves what the language model receives, measured at the projector
M.

Over random unit directions u that all tokens share, a token x has

* ``finite_difference``: mean over u of |M(x + h u) - M(x - h u)| / 2h,
* ``directional``: mean over u of |J u|, the limit h -> 0,
* ``closed_form``: |J|_F / sqrt(C), the root mean square of |J u| over all directions, without drawing any.

For M(x) = W2 act(W1 x + b1) + b2 and g = act'(W1 x + b1), |J|_F^2 = g^T K g with K = (W2^T W2) * (W1 W1^T)
elementwise. A LayerNorm in front projects inputs orthogonally to 1 and to the normalised token; see
``closed_form``.

All run in at least float32: a step of h/sqrt(C) per coordinate is below the resolution of half precision.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...kernels import dispatch

Map = Callable[[Tensor], Tensor]

_VALUES = 2**24  # numbers per intermediate tensor held at a time
_HINT = "use estimator='zo' without rank, which works for every projector"


def unit_directions(m: int, width: int, seed: int) -> Tensor:
    """(m, C) directions of unit length, drawn on the CPU so that all devices use the same."""
    return unit(torch.randn(m, width, generator=torch.Generator().manual_seed(seed)))


def unit(directions: Tensor) -> Tensor:
    """Rows scaled to unit length."""
    return directions / (directions.norm(dim=-1, keepdim=True) + 1e-12)


class Layer(NamedTuple):
    """A linear layer whose matrix is the product of ``factors``, the first applied first: one, or two of low
    rank.
    """

    factors: tuple[Tensor, ...]
    bias: Tensor | None

    def linear(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = x @ factor.T
        return x

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.bias is None else self.linear(x) + self.bias

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
        return self.first(
            x
            if self.gain is None
            else nn.functional.layer_norm(x, self.gain.shape, self.gain, self.shift, self.eps)
        )

    def slope(self, x: Tensor) -> Tensor:
        """(..., H) derivative of the activation at x (..., C)."""
        pre = self._pre(x)
        with torch.enable_grad():
            return torch.autograd.grad(self.act(pre.requires_grad_()).sum(), pre)[0]

    def standardised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the LayerNorm makes of x (..., C) before gain and shift, and the (...) variances that it
        divides by.
        """
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps), x.var(-1, correction=0) + self.eps


# --- finding the form, and what is remembered of a projector --------------------------------------


class _Known(NamedTuple):
    stamp: tuple[Any, ...]
    sample: Tensor
    facts: dict[Any, Any]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _remember(projector: nn.Module, key: Any, make: Callable[[], Any]) -> Any:
    """``make()``, once per projector and state of its weights."""
    weights = [weight.detach() for weight in projector.parameters()]
    # tensors made under inference_mode have no version, and writing through .data does not raise it: hence
    # the sample
    stamp = tuple(
        (w.data_ptr(), w.shape, w.dtype, None if w.is_inference() else w._version)
        for w in projector.parameters()
    )
    sample = torch.cat([w.flatten()[:: max(1, w.numel() // 64)].double() for w in weights])
    known = _KNOWN.get(projector)
    if known is None or known.stamp != stamp or not torch.equal(known.sample, sample):
        known = _KNOWN[projector] = _Known(stamp, sample, {})
    if key not in known.facts:
        known.facts[key] = make()
    return known.facts[key]


def two_layers(projector: Any, dtype: torch.dtype = torch.float32, rank: int | None = None) -> TwoLayers:
    """The projector as [LayerNorm] Linear act Linear, or UnsupportedError; ``rank``: both matrices cut to
    their best rank r.
    """
    if not isinstance(projector, nn.Module):
        raise UnsupportedError(
            f"the projector is a {type(projector).__name__}, not a module whose layers can be read; {_HINT}"
        )
    leaves = [
        m for m in projector.modules() if next(m.children(), None) is None and not isinstance(m, nn.Dropout)
    ]
    norm = leaves.pop(0) if leaves and isinstance(leaves[0], nn.LayerNorm) else None
    if not (
        _fits(leaves, norm)
        and _remember(projector, "same map", lambda: _same_map(projector, _read(norm, leaves, torch.float32)))
    ):
        raise UnsupportedError(
            f"the projector {type(projector).__name__} is not of the form [LayerNorm] Linear act Linear; "
            f"{_HINT}"
        )
    full = _read(norm, leaves, dtype)
    if rank is None:
        return full
    first, second = (
        _remember(projector, (name, rank, dtype), lambda layer=layer: _low_rank(layer.factors[0], rank))
        for name, layer in (("first", full.first), ("second", full.second))
    )
    return TwoLayers(
        full.gain,
        full.shift,
        full.eps,
        Layer(first, full.first.bias),
        full.act,
        Layer(second, full.second.bias),
    )


def _fits(leaves: list[nn.Module], norm: nn.LayerNorm | None) -> bool:
    if len(leaves) != 3 or not (isinstance(leaves[0], nn.Linear) and isinstance(leaves[2], nn.Linear)):
        return False
    weights = [leaves[0].weight, leaves[2].weight]
    shapes = [
        (leaf.out_features, leaf.in_features) for leaf in (leaves[0], leaves[2])
    ]  # packed weights have other shapes
    readable = all(
        w.shape == shape and w.is_floating_point() and not w.is_meta
        for w, shape in zip(weights, shapes, strict=True)
    )
    return readable and (norm is None or norm.normalized_shape == (leaves[0].in_features,))


def _read(norm: nn.LayerNorm | None, leaves: list[nn.Module], dtype: torch.dtype) -> TwoLayers:
    def cast(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.detach().to(dtype)

    first, act, second = leaves
    layers = [Layer((cast(layer.weight),), cast(layer.bias)) for layer in (first, second)]
    if norm is None:
        return TwoLayers(None, None, 0.0, layers[0], act, layers[1])
    gain = torch.ones_like(first.weight[0], dtype=dtype) if norm.weight is None else cast(norm.weight)
    return TwoLayers(gain, cast(norm.bias), norm.eps, layers[0], act, layers[1])


def _same_map(projector: nn.Module, layers: TwoLayers) -> bool:
    """Whether the layers that were found do what the projector does; their order in the module is only a
    guess.
    """
    like = next(projector.parameters())
    width = layers.first.matrix.shape[1]
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        expected = projector(x).detach().float()
    except RuntimeError:  # mergers refuse tokens of the width of their first linear layer
        return False
    found = layers(x.float())
    return expected.shape == found.shape and bool(
        (found - expected).norm() <= 0.02 * expected.norm()
    )  # bfloat16 may round


def _low_rank(weight: Tensor, rank: int) -> tuple[Tensor, ...]:
    if rank >= min(weight.shape):
        return (weight,)
    left, scale, right = torch.linalg.svd(weight, full_matrices=False)
    return right[:rank], left[:, :rank] * scale[:rank]


def _as_map(projector: Any, dtype: torch.dtype, rank: int | None) -> Map:
    """The projector, computing in ``dtype``."""
    if rank is not None:
        return two_layers(projector, dtype, rank)
    if not isinstance(projector, nn.Module):
        return projector
    try:
        return two_layers(projector, dtype)
    except UnsupportedError:  # any other module runs as it is
        state = dict(chain(projector.named_parameters(), projector.named_buffers()))
    packed = [
        name for name, value in state.items() if name.endswith("weight") and not value.is_floating_point()
    ]
    if packed:
        raise UnsupportedError(
            f"{packed} of {type(projector).__name__} are quantised and have no {dtype} form; keep the "
            "projector unquantised"
        )
    if all(value.dtype == dtype for value in state.values() if value.is_floating_point()):
        return projector
    # trap: functional_call swaps the weights while it runs, so this one path is not for several threads on
    # one model
    cast = {
        name: value.detach().to(dtype) if value.is_floating_point() else value
        for name, value in state.items()
    }
    return lambda x: torch.func.functional_call(projector, cast, (x,))


# --- the estimators -------------------------------------------------------------------------------


def finite_difference(
    projector: Any, x: Tensor, directions: Tensor, h: float, rank: int | None = None
) -> Tensor:
    """(B, N) mean |M(x + h u) - M(x - h u)| / 2h for x (B, P, C) and unit directions (m, C)."""
    with _exactly(x) as x:
        f = _as_map(projector, x.dtype, rank)
        sizes = (
            [max(weight.shape) for weight in projector.parameters()]
            if isinstance(projector, nn.Module)
            else []
        )
        return _mean_length(
            lambda u: (f(x + h * u) - f(x - h * u)) / (2 * h), directions.to(x), x, max(sizes, default=1)
        )


def directional(projector: Any, x: Tensor, directions: Tensor, rank: int | None = None) -> Tensor:
    """(B, N) mean |J u| for x (B, N, C) and unit directions (m, C)."""
    with _exactly(x) as x:
        layers = two_layers(projector, x.dtype, rank)
        slope = layers.slope(x)  # (B, N, H)
        z, power = layers.standardised(x)

        def change(u: Tensor) -> Tensor:  # (m', 1, 1, C)
            if layers.gain is not None:
                u = u - u.mean(-1, keepdim=True) - z * (z * u).mean(-1, keepdim=True)
                u = u * layers.gain / power[..., None].sqrt()
            return layers.second.linear(slope * layers.first.linear(u))

        return _mean_length(change, directions.to(x), x, slope.shape[-1])


def _mean_length(change: Map, directions: Tensor, x: Tensor, width: int) -> Tensor:
    """(B, N) mean length of what ``change`` makes of directions (m', 1, 1, C), some at a time."""
    total = 0
    for chunk in directions.split(max(1, _VALUES // (x.shape[0] * x.shape[1] * max(x.shape[2], width)))):
        delta = change(chunk[:, None, None])  # (m', B, N, D), or with axes flattened, as some mergers do
        total = total + delta.reshape(len(chunk), len(x), -1, delta.shape[-1]).norm(dim=-1).sum(0)
    return total / len(directions)


def closed_form(projector: Any, x: Tensor, rank: int | None = None) -> Tensor:
    """(B, N) |J|_F / sqrt(C) for x (B, N, C).

    A LayerNorm with gain G and normalised token z = (x - mean)/s has the Jacobian G (I - 11^T/C - zz^T/C) /
    s. Its first part replaces W1 by W1 G less the mean of its columns; the second subtracts (2 - |z|^2/C)/C
    |W2 (g * W1 G z)|^2. Divide by s^2.
    """
    with _exactly(x) as x:
        layers = two_layers(projector, x.dtype, rank)
        kernel = _remember(projector, ("kernel", rank, x.dtype), lambda: _kernel(layers))  # (H, H)
        rows = x.flatten(0, 1).split(max(1, _VALUES // kernel.shape[0]))
        return torch.cat([_frobenius(layers, kernel, part) for part in rows]).view(x.shape[:2])


def _kernel(layers: TwoLayers) -> Tensor:
    first, second = layers.first.matrix, layers.second.matrix
    if layers.gain is not None:
        first = first * layers.gain
        first = first - first.mean(1, keepdim=True)
    return (second.T @ second) * (first @ first.T)


def _frobenius(layers: TwoLayers, kernel: Tensor, x: Tensor) -> Tensor:
    """(n,) for tokens (n, C)."""
    width, slope = x.shape[-1], layers.slope(x)
    squared = dispatch.zoo_sensitivity(slope[None], kernel)[0]
    if layers.gain is not None:
        z, power = layers.standardised(x)
        along = layers.second.linear(slope * layers.first.linear(z * layers.gain))
        squared = (squared - (2 - z.square().mean(-1)) / width * along.square().sum(-1)) / power
    return (squared.clamp_min(0) / width).sqrt()


@contextmanager
def _exactly(x: Tensor) -> Iterator[Tensor]:
    """The tokens in at least float32, and a place to compute with them: without autocast and without a
    graph."""
    # slopes need autograd, which inference_mode forbids
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield x.detach().to(torch.promote_types(x.dtype, torch.float32))
