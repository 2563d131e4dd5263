# SPDX-License-Identifier: Apache-2.0
"""For methods that read clips: frames of equal size, compared place by place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Method
from ..core.tokens import VisualTokens
from ..errors import UnsupportedError

_FRAMES_AT_ONCE = 8  # bounds the float32 copies held beside the features


@dataclass(frozen=True, eq=False)
class Averaged:
    """Rows of a clip, and the tokens that they are averages of: those of some places in each of some frames.

    Args:
        frames: numbers of the frames.
        places: (P,) in a frame.
        count: rows that are made of them.
        row: (P,) the row of each place; None where each has its own.
    """

    frames: range
    places: Tensor
    count: int
    row: Tensor | None = None


def joins_of(parts: Sequence[Averaged], order: Tensor | None, frames: int, n: int) -> Tensor:
    """(1, frames * n) the row that each token of a clip is part of, -1 for none.

    Args:
        parts: in the order in which their rows were made.
        order: (k,) the rows as they are listed, by number; None where they are listed as they were made.
    """
    device = parts[0].places.device
    # (frames, n) number of the row that each token is part of; rows of earlier parts come before ``first``
    found, first = torch.full((frames, n), -1, device=device), 0
    for part in parts:
        row = torch.arange(len(part.places), device=device) if part.row is None else part.row
        found[part.frames.start : part.frames.stop, part.places] = first + row
        first += part.count
    flat = found.flatten()
    if order is not None:
        # argsort of an order is its inverse: where in the list a row stands
        flat = torch.where(flat < 0, -1, order.argsort()[flat.clamp_min(0)])
    return flat[None]


def frames_of(method: Method, tokens: VisualTokens) -> tuple[int, int]:
    """(T, n): frames of the clip and tokens of each; what is no clip is refused."""
    grids = tokens.need("grids")
    if not tokens.frames:
        raise UnsupportedError(
            f"{method.name} compares the frames of one clip, but these {tokens.count} tokens are an image, "
            "tiles of one, or no single clip; give clips only, with one budget for each, or use a method for "
            "images, e.g. 'divprune@0.25'. Frames that are images to the model need prune(..., frames=True), "
            "plain tensors of a clip frames=True and a block per frame in grid"
        )
    if len(set(grids)) > 1:
        raise UnsupportedError(
            f"{method.name} compares frames place by place, but they have the grids {sorted(set(grids))}; "
            "expected one size for all frames of a clip"
        )
    return len(grids), grids[0][0] * grids[0][1]


def clip_features(method: Method, tokens: VisualTokens) -> Tensor:
    """(B, T, n, D) features of clips, frame by frame."""
    return tokens.need("features").unflatten(1, frames_of(method, tokens))


def counts_by_itself(method: Method) -> None:
    """Make a method take no budget: its authors' rule says how many tokens stay."""
    # on this instance alone: other variants of the class take a budget
    object.__setattr__(method, "counts", "own")
    object.__setattr__(method, "budgeted", False)


def same_place_cosine(x: Tensor, first: Sequence[int], second: Sequence[int]) -> Tensor:
    """(B, P, n) cosine of the tokens of P pairs of frames of x (B, T, n, D), place by place, in float32.

    A token that did not change at all has a cosine of exactly 1, so that such tokens tie.
    """
    found = []
    for start in range(0, len(first), _FRAMES_AT_ONCE):
        a = frames_at(x, first[start : start + _FRAMES_AT_ONCE]).float()
        b = frames_at(x, second[start : start + _FRAMES_AT_ONCE]).float()
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        # rows of zeros stay unlike each other
        found.append(cosine.masked_fill((a == b).all(dim=-1) & (cosine > 0), 1.0))
    return torch.cat(found, dim=1) if found else x.new_empty(x.shape[0], 0, x.shape[2], dtype=torch.float32)


def frames_at(x: Tensor, frames: Sequence[int]) -> Tensor:
    """(B, P, n, D) frames of x (B, T, n, D), a view where they follow each other at equal steps."""
    if list(frames) == list(range(frames[0], frames[-1] + 1)):
        return x[:, frames[0] : frames[-1] + 1]
    return x[:, list(frames)]


def neighbour_cosine(x: Tensor) -> Tensor:
    """(B, T-1, n) cosine of every token of x (B, T, n, D) with the one at its place in the next frame."""
    last = x.shape[1] - 1
    return same_place_cosine(x, range(last), range(1, last + 1))
