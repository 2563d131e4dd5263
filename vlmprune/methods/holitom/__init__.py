# SPDX-License-Identifier: Apache-2.0
"""HoliTom: average still places over the best windows of frames, thin the rest by clusters and attention.

With x_t,i token i of frame t, of T x n, a place i is still in a window of frames b..e where the cosine of
x_t,i and x_t+1,i is above tau for all t = b..e-1. A window saves (number of still places) (e - b) tokens:

    windows = those of the clip that save most together
    still places of a window     averages over its frames; density peaks among them as centres;
                                 row = beta centre + (1 - beta) mean of its members
    other places                 of every frame those with the highest attention, unmerged

Every block of rows, still ones of a window or other ones of a frame, gets the same share of the budget.

Deviations: exactly k tokens, by largest remainder over the blocks, where the authors round up in every frame;
where k is more than the windows leave, they are cut into shorter ones. A row stands at the place
of its centre in the first frame of its window, in reading order. No noise in the densities: the lower index
counts as denser, and wins ties; float32. ``variant="official"`` takes no budget and counts and orders as the
authors do. Their option D crashes in every setting but 0, which is this. The part inside the language model
is a method of its own, ``holitom_inner``.
Provenance: arXiv:2505.21334; written from a description of the official code (commit e9b2972, Apache-2.0);
no code copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_int, check_number, one_of
from ...core.grid import shares_of
from ...core.method import Merged, Method, What
from ...core.select import ranked
from ...core.tokens import VisualTokens
from ...registry import register
from ..clips import Averaged, clip_features, counts_by_itself, joins_of, neighbour_cosine
from ..clustering import cluster_sums, frame_peaks
from .windows import Window, best_windows, shortened


def effective_share(saved: int, count: int, r: float) -> float:
    """R, the share kept of what is left of ``count`` tokens, so that about r of all stay."""
    # averaging alone leaves (count - saved) / count, and r is a share of all
    return min(r / ((count - saved) / count), 1.0)


def blocks_of(windows: Sequence[Window], n: int) -> list[int]:
    """Rows of every block: of a window of several frames its still places, then of each frame the others."""
    # the order of these blocks is that in which ``HoliTom.clip`` makes rows
    return [size for w in windows for size in ([w.still] if w.length > 1 else []) + [n - w.still] * w.length]


def official_counts(windows: Sequence[Window], n: int, R: float) -> list[int]:
    """What the authors keep of every block."""
    found = []
    for w in windows:
        # rounded for a window, rounded up for a frame
        still = [round(w.still * R)] if w.length > 1 else []
        found += still + [math.ceil((n - w.still) * R)] * w.length
    return found


def clustered(x: Tensor, count: int, neighbours: int, beta: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(c,) ascending centres among x (n, D), their rows (c, D), and the row of each of x (n,)."""
    peaks = frame_peaks(x, count, min(neighbours, count))
    # clusters are numbered by the places of their centres
    centres, order = peaks.centres[0].sort()
    number = order.argsort()[peaks.assignment[0]]  # in the order of their places
    own = x[centres]
    sums, members = cluster_sums(x, number, count)
    if beta is None:
        return centres, sums / members, number
    # a centre is no member of its own
    mean = (sums - own) / (members - 1).clamp_min(1)
    return centres, torch.where(members > 1, beta * own + (1 - beta) * mean, own), number


@register("holitom")
@dataclass(frozen=True)
class HoliTom(Method):
    """Rows: averages of still places over windows of frames, clustered, and attended tokens of other places.

    Args:
        variant: "exact" keeps the budget, "official" takes none and counts and orders as the authors do.
        r: share that the official count starts from; not read by "exact".
        tau: a place is still where the cosine with the next frame is above it; the authors: 0.65 for 10 %.
        beta: weight of a centre in its row; None: the plain mean of its cluster.
        neighbours: tokens that make the density of one.
        longest: frames of the longest window.
    """

    variant: str = "exact"
    r: float = 0.15
    tau: float = 0.8
    beta: float | None = 0.6
    neighbours: int = 7
    longest: int = 1024

    needs: ClassVar[tuple[What, ...]] = ("features", "received_attention")
    nested: ClassVar[bool] = False
    clips: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2505.21334"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        one_of("variant", self.variant, ("exact", "official"))
        check_number("r", self.r, 0, 1)
        check_number("tau", self.tau, -1, 1)
        if self.beta is not None:
            check_number("beta", self.beta, 0, 1)
        check_int("neighbours", self.neighbours, 1)
        check_int("longest", self.longest, 1)
        if self.variant == "official":
            counts_by_itself(self)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        return Merged.batch(self._rows(tokens, k))

    def own(self, tokens: VisualTokens) -> list[Merged]:
        return self._rows(tokens, None)

    def _rows(self, tokens: VisualTokens, k: int | None) -> list[Merged]:
        x = clip_features(self, tokens)  # (B, T, n, D)
        a = tokens.need("received_attention").view(x.shape[:3])
        still = neighbour_cosine(x) > self.tau  # (B, T-1, n)
        return [self.clip(x[b], a[b], still[b], k) for b in range(x.shape[0])]

    def clip(self, x: Tensor, a: Tensor, still: Tensor, k: int | None) -> Merged:
        """Rows of one clip x (T, n, D) with attention a (T, n); ``still`` (T-1, n) does not change."""
        n = a.shape[1]
        # many small steps in Python, which would each wait for a device
        windows = best_windows(still.cpu(), n, self.longest)
        if k is None:
            saved = sum(w.saved for w in windows)
            counts = official_counts(windows, n, effective_share(saved, a.numel(), self.r))
        else:
            # long windows may leave fewer tokens than there shall be rows
            windows = shortened(windows, a.numel(), k)
            counts = shares_of(blocks_of(windows, n), k)
        order, rows, slots, made_of = ranked(a), [], [], []
        block = iter(counts)  # in the order of ``blocks_of``
        for w in windows:
            places = w.places.to(x.device)  # (n,) bool, still ones
            if w.length > 1:
                count, at = next(block), places.nonzero()[:, 0]
                if count:
                    mean = x[w.start : w.stop, at].float().mean(dim=0)  # (P, D)
                    centres, merged, row = clustered(mean, count, self.neighbours, self.beta)
                    rows.append(merged.to(x.dtype))
                    slots.append(w.start * n + at[centres])
                    made_of.append(Averaged(range(w.start, w.stop), at, count, row))
            for t in range(w.start, w.stop):
                others = order[t][~places[order[t]]]  # best first
                index = others[: next(block)].sort().values
                rows.append(x[t, index])
                slots.append(t * n + index)
                made_of.append(Averaged(range(t, t + 1), index, len(index)))
        joined, at = torch.cat(rows), torch.cat(slots)
        by_place, frames = None, x.shape[0]
        # in reading order; the official code leaves them as they were made
        if k is not None:
            at, by_place = at.sort()
            joined = joined[by_place]
        return Merged(joined[None], at[None], joins=lambda: joins_of(made_of, by_place, frames, n))
