# SPDX-License-Identifier: Apache-2.0
"""PruneVid: average still places of a scene, cluster all places in space, then keep what the question reads.

Before the language model, with x_t,i token i of frame t, of T x n, and DPC-KNN as in ``clustering``:

    scenes  = DPC-KNN of the mean tokens of the frames; runs of frames, short ones given to their neighbours
    still   = places of a scene whose mean cosine between any two of its frames is above tau
    rows    = cluster means of the averages of still places, and, frame by frame, of the other places

Inside it, ``prunevid_inside`` keeps the rows with the largest attention from any head and any token of the
question.

Deviations: exactly k rows: every group of places (still ones of a scene, other ones of a frame) gets its
share by largest remainder, at least one while k allows, and where k is more than there are, scenes are cut
into shorter ones. A row stands at the place of its centre, in the first frame of its scene, in reading order.
No noise in the densities: the lower index counts as denser; short clips have fewer neighbours, where the code
crashes; float32. ``variant="official"`` takes no budget: half of every group above 14 places, rows by falling
prominence. Inside, the whole clip is ranked together and by the attention of the model itself, where the
authors rank scene by scene, and without rotary positions and mask.
Provenance: arXiv:2412.16117; written from a description of the official code (commit b12600c, CC BY-NC-SA
4.0, not for commercial use); no code copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..checks import check_int, check_number, one_of
from ..core.budget import Budget
from ..core.grid import shares_of
from ..core.method import CutPoint, Merged, Method, Need, Positions, SlotName, What
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register
from .clips import Averaged, clip_features, counts_by_itself, joins_of
from .clustering import cluster_sums, frame_peaks
from .holitom.windows import Window, shortened

PUBLISHED = 11 / 32  # the cut inside the language model of the authors, as a share of the depth


def runs_of(labels: Sequence[int | None]) -> list[tuple[int | None, int, int]]:
    """(label, start, stop) of every stretch of equal labels."""
    found, start = [], 0
    for label, members in groupby(labels):
        stop = start + len(list(members))
        found.append((label, start, stop))
        start = stop
    return found


def refined(labels: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of the scenes: contiguous runs of frames, from the cluster of every frame."""
    # cluster -> frames of its longest run
    longest: dict[int | None, int] = {}
    for label, start, stop in runs_of(labels):
        longest[label] = max(longest.get(label, 0), stop - start)
    # the longest runs of a cluster are scenes, unless it never has two frames in a row
    kept: list[int | None] = [None] * len(labels)
    for label, start, stop in runs_of(labels):
        if stop - start == longest[label] > 1:
            kept[start:stop] = [label] * (stop - start)
    # what is left goes to the longer scene beside it
    for label, start, stop in runs_of(list(kept)):
        if label is None:
            kept[start:stop] = [_neighbour(kept, start, stop)] * (stop - start)
    return [(start, stop) for _, start, stop in runs_of(kept)]


def _neighbour(kept: Sequence[int | None], start: int, stop: int) -> int:
    """The label of the longer run beside a stretch without label; the left one, where they are equal."""
    around = runs_of(kept)
    left = next((run for run in around if run[2] == start), None)
    right = next((run for run in around if run[1] == stop), None)
    beside = [run for run in (left, right) if run is not None]
    if not beside:
        # no run is long enough anywhere: the whole clip is one scene
        return 0
    return max(beside, key=lambda run: run[2] - run[1])[0] or 0


def sameness(x: Tensor) -> Tensor:
    """(n,) mean cosine between any two of w frames of x (w, n, D), -1 for a frame alone."""
    frames = x.shape[0]
    if frames == 1:
        return torch.full((x.shape[1],), -1.0, device=x.device)
    unit = normalize(x.float(), dim=-1, eps=1e-8)
    # of a sum of unit rows the square holds each pair twice, and each row with itself
    pairs = unit.sum(dim=0).square().sum(dim=-1) - unit.square().sum(dim=(0, 2))
    return pairs / (frames * (frames - 1))


@dataclass(frozen=True, eq=False)
class Places:
    """Places that are clustered together.

    Args:
        rows: (m, D) float32 their tokens, or averages.
        slots: (m,) the tokens of the clip whose places they have.
        still: whether they are averages over a scene.
        made_of: the tokens that they are, or are averages of.
    """

    rows: Tensor
    slots: Tensor
    still: bool
    made_of: Averaged


def groups_of(x: Tensor, scene: Window) -> list[Places]:
    """The still places of a scene, and of each frame the others, from x (T, n, D); empty ones as well."""
    n, places = x.shape[1], scene.places.to(x.device)
    # the same places in all frames of the scene
    at, others = places.nonzero()[:, 0], (~places).nonzero()[:, 0]
    mean = x[scene.start : scene.stop, at].float().mean(dim=0)  # (P, D)
    frames = range(scene.start, scene.stop)
    # an average stands at its place in the first frame of the scene
    found = [Places(mean, scene.start * n + at, True, Averaged(frames, at, len(at)))]
    for t in frames:
        own = Averaged(range(t, t + 1), others, len(others))
        found.append(Places(x[t, others], t * n + others, False, own))
    return found


def shares_with_one(sizes: Sequence[int], k: int) -> list[int]:
    """Shares of k by size; a group that has places gets at least one, which the largest share gives up."""
    shares = shares_of(sizes, k)
    filled = [i for i, size in enumerate(sizes) if size]
    # fewer rows than groups: some go without
    if k < len(filled):
        return shares
    for i in filled:
        if not shares[i]:
            # of equally large shares the first
            giver = max(filled, key=lambda j: (shares[j], -j))
            shares[giver], shares[i] = shares[giver] - 1, 1
    return shares


@register("prunevid")
@dataclass(frozen=True)
class PruneVid(Method):
    """Rows: cluster means of what stands still in a scene, and of what else is in each frame.

    Args:
        variant: "exact" keeps the budget, "official" takes none and counts and orders as the authors do.
        tau: a place is still where the mean cosine between the frames of its scene is above it.
        scenes: clusters of frames, as a share of the frames.
        clusters: of the official count: clusters of a group, as a share of its places.
        above: of the official count: the most places that are not clustered.
        neighbours: frames, or tokens, that make the density of one.
    """

    variant: str = "exact"
    tau: float = 0.8
    scenes: float = 0.25
    clusters: float = 0.5
    above: int = 14
    neighbours: int = 7

    needs: ClassVar[tuple[What, ...]] = ("features",)
    nested: ClassVar[bool] = False
    clips: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2412.16117"
    licence: ClassVar[str] = "CC BY-NC-SA 4.0"

    def __post_init__(self) -> None:
        one_of("variant", self.variant, ("exact", "official"))
        check_number("tau", self.tau, -1, 1)
        check_number("scenes", self.scenes, 0, 1)
        check_number("clusters", self.clusters, 0, 1)
        check_int("above", self.above, 0)
        check_int("neighbours", self.neighbours, 1)
        if self.variant == "official":
            counts_by_itself(self)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        return Merged.batch(self._rows(tokens, k))

    def own(self, tokens: VisualTokens) -> list[Merged]:
        return self._rows(tokens, None)

    def _rows(self, tokens: VisualTokens, k: int | None) -> list[Merged]:
        return [self.clip(one, k) for one in clip_features(self, tokens)]

    def frame_clusters(self, x: Tensor) -> list[int]:
        """The cluster of every frame of x (T, n, D), numbered by falling prominence of its centre."""
        frames = x.shape[0]
        count = max(int(frames * self.scenes), 1)
        return frame_peaks(x.float().mean(dim=1), count, self.neighbours).assignment[0].tolist()

    def scenes_of(self, x: Tensor) -> list[Window]:
        """The scenes of a clip x (T, n, D), with their still places."""
        return [
            Window(start, stop, (sameness(x[start:stop]) > self.tau).cpu())
            for start, stop in refined(self.frame_clusters(x))
        ]

    def clip(self, x: Tensor, k: int | None) -> Merged:
        """Rows of one clip x (T, n, D)."""
        scenes = self.scenes_of(x)
        if k is not None:
            # long scenes may leave fewer tokens than there shall be rows
            scenes = shortened(scenes, x.shape[0] * x.shape[1], k)
        groups = [group for scene in scenes for group in groups_of(x, scene)]
        sizes = [len(group.slots) for group in groups]
        counts = [self.official_count(size) for size in sizes] if k is None else shares_with_one(sizes, k)
        found = [self.clustered(*one) for one in zip(groups, counts, strict=True) if one[1]]  # (group, count)
        rows = torch.cat([one.rows.to(x.dtype) for one in found])
        slots = torch.cat([one.slots for one in found])
        by_place = None
        # in reading order; the official code leaves them as they were made
        if k is not None:
            slots, by_place = slots.sort()
            rows = rows[by_place]
        parts, (frames, n, _) = [one.made_of for one in found], x.shape
        return Merged(rows[None], slots[None], joins=lambda: joins_of(parts, by_place, frames, n))

    def official_count(self, size: int) -> int:
        """Rows that the authors make of a group."""
        return size if size <= self.above else int(size * self.clusters)

    def clustered(self, group: Places, count: int) -> Places:
        """So many cluster means, by falling prominence of their centres."""
        # a row for each place: nothing to cluster
        if count == len(group.slots):
            return group
        x = group.rows.float()
        peaks = frame_peaks(x, count, self.neighbours)
        sums, members = cluster_sums(x, peaks.assignment[0], count)
        made_of = replace(group.made_of, count=count, row=peaks.assignment[0])
        return Places(sums / members, group.slots[peaks.centres[0]], group.still, made_of)


@register("prunevid_inside")
@dataclass(frozen=True)
class PruneVidInside(Method):
    """Keeps the tokens with the largest attention from any head and any token behind the clip.

    Args:
        layer: the first layer that reads the shorter sequence; None: 11 of 32, or as deep in others.
    """

    layer: int | None = None

    slot: ClassVar[SlotName] = "inside_lm"
    landing: ClassVar[tuple[str, int] | None] = ("layer", 1)
    query_aware: ClassVar[bool] = True
    positions: ClassVar[Positions] = "original"
    needs: ClassVar[tuple[Need, ...]] = (Need("text_attention", text="question"),)
    paper: ClassVar[str] = "arXiv:2412.16117"
    licence: ClassVar[str] = "CC BY-NC-SA 4.0"

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_int("layer", self.layer, least=1)

    def cuts(self, depth: int, budget: Budget | None, count: int) -> tuple[CutPoint, ...]:
        if budget is None:
            raise SpecError("prunevid_inside needs a budget; prunevid_inside@0.4 is published")
        layer = max(round(PUBLISHED * depth), 1) if self.layer is None else self.layer
        if layer >= depth:
            raise SpecError(
                f"layer={layer} but the language model has layers 0..{depth - 1}; choose a smaller one"
            )
        return (CutPoint(layer, budget.count(count), source=layer - 1),)

    def score(self, tokens: VisualTokens) -> Tensor:
        A = tokens.need("text_attention").float()  # (B, H, R, N)
        # padding of a short question does not rank
        if tokens.query_mask is not None:
            A = A.masked_fill(~tokens.query_mask[:, None, :, None], 0.0)
        return A.amax(dim=(1, 2))
