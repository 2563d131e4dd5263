# SPDX-License-Identifier: Apache-2.0
"""How far a small change of a visual token moves what the language model receives, at the projector M.

Over random unit directions u that all tokens share, a token x has

    finite_difference: mean over u of |M(x + h u) - M(x - h u)| / 2h
    directional:       mean over u of |J u|, the limit h -> 0
    closed_form:       |J|_F / sqrt(C), the root mean square of |J u| over all directions, without drawing any

For M(x) = W2 act(W1 x + b1) and g = act'(W1 x + b1), |J|_F^2 = g^T K g with K = (W2^T W2) * (W1 W1^T).
All run in at least float32: a step of h / sqrt(C) per coordinate is below the resolution of half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import dispatch
from .cache import Compared, remember
from .projector import Map, TwoLayers, as_map, two_layers

_VALUES = 2**24  # numbers per intermediate tensor held at a time


def unit_directions(m: int, width: int, seed: int) -> Tensor:
    """(m, C) directions of unit length, drawn on the CPU so that all devices use the same."""
    return unit(torch.randn(m, width, generator=torch.Generator().manual_seed(seed)))


def unit(directions: Tensor) -> Tensor:
    """Rows scaled to unit length."""
    return directions / (directions.norm(dim=-1, keepdim=True) + 1e-12)


def finite_difference(
    projector: Any, x: Tensor, u: Tensor, h: float, rank: int | None = None, compared: Compared | None = None
) -> Tensor:
    """(B, N) mean |M(x + h u) - M(x - h u)| / 2h for x (B, P, C) and unit directions u (m, C)."""
    with _exactly(x) as x:
        M = as_map(projector, x.dtype, rank, compared)
        weights = projector.parameters() if isinstance(projector, nn.Module) else ()
        width = max((max(weight.shape) for weight in weights), default=1)
        step = h * u.to(x.dtype)
        ways = torch.stack([step, -step], dim=1).to(x.device)  # (m, 2, C)

        def change(ways: Tensor) -> Tensor:  # (m', 2, 1, 1, C)
            made = M(x + ways)  # (m', 2, B, N, D), or with axes flattened, as some mergers do
            ahead, behind = made.reshape(len(ways), 2, -1, made.shape[-1]).unbind(1)
            return ahead - behind

        return _mean_length(change, ways, x, 2 * max(x.shape[-1], width)) / (2 * h)


def directional(
    projector: Any, x: Tensor, u: Tensor, rank: int | None = None, compared: Compared | None = None
) -> Tensor:
    """(B, N) mean |J u| for x (B, N, C) and unit directions u (m, C)."""
    with _exactly(x) as x:
        layers = two_layers(projector, x.dtype, rank, compared)
        g = layers.slope(x)  # (B, N, H)
        z, power = layers.standardised(x)

        def change(u: Tensor) -> Tensor:  # (m', 1, 1, C)
            if layers.gain is not None:
                # LayerNorm lets no change of the mean through, and none along the token itself
                u = u - u.mean(-1, keepdim=True) - z * (z * u).mean(-1, keepdim=True)
                u = u * layers.gain / power[..., None].sqrt()
            return layers.second.linear(g * layers.first.linear(u))

        return _mean_length(change, u.to(x), x, max(x.shape[-1], g.shape[-1]))


def _mean_length(change: Map, directions: Tensor, x: Tensor, width: int) -> Tensor:
    """(B, N) mean length of ``change`` over directions (m, ..., C), which it gets some at a time.

    Args:
        width: numbers that one direction of one token takes.
    """
    total: list[Tensor] = []
    for chunk in directions.split(max(1, _VALUES // (x.shape[0] * x.shape[1] * width))):
        delta = change(chunk[..., None, None, :])
        length = delta.reshape(len(chunk), len(x), -1, delta.shape[-1]).norm(dim=-1)  # (m', B, N)
        total.append(length.sum(0))
    return sum(total[1:], total[0]) / len(directions)


def closed_form(
    projector: Any, x: Tensor, rank: int | None = None, compared: Compared | None = None
) -> Tensor:
    """(B, N) |J|_F / sqrt(C) for x (B, N, C).

    A LayerNorm with gain G and normalised token z = (x - mean) / s has the Jacobian

        G (I - 11^T / C - zz^T / C) / s.

    Its first part replaces W1 by W1 G less the mean of its columns; the second subtracts
    (2 - |z|^2 / C) / C |W2 (g * W1 G z)|^2 from g^T K g. The result is divided by s^2.
    """
    with _exactly(x) as x:
        layers = two_layers(projector, x.dtype, rank, compared)
        K = remember(projector, ("kernel", rank, x.dtype), lambda: _kernel(layers), compared)  # (H, H)
        parts = x.flatten(0, 1).split(max(1, _VALUES // K.shape[0]))
        found = [_frobenius(layers, K, part) for part in parts]
        return (found[0] if len(found) == 1 else torch.cat(found)).view(x.shape[:2])


def _kernel(layers: TwoLayers) -> Tensor:
    W1, W2 = layers.first.matrix, layers.second.matrix
    if layers.gain is not None:
        W1 = W1 * layers.gain
        W1 = W1 - W1.mean(1, keepdim=True)
    return (W2.T @ W2) * (W1 @ W1.T)


def _frobenius(layers: TwoLayers, K: Tensor, x: Tensor) -> Tensor:
    """(n,) |J|_F / sqrt(C) of tokens x (n, C)."""
    C, g = x.shape[-1], layers.slope(x)
    squared = dispatch.zoo_sensitivity(g[None], K)[0]  # g^T K g
    if layers.gain is not None:
        z, power = layers.standardised(x)
        along = layers.second.linear(g * layers.first.linear(z * layers.gain))
        squared = (squared - (2 - z.square().mean(-1)) / C * along.square().sum(-1)) / power
    # rounding can leave a trace below 0
    return (squared.clamp_min(0) / C).sqrt()


@contextmanager
def _exactly(x: Tensor) -> Iterator[Tensor]:
    """The tokens in at least float32, without autocast and without a graph."""
    # slopes need autograd, which inference_mode forbids
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield x.detach().to(torch.promote_types(x.dtype, torch.float32))
