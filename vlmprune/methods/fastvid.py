# SPDX-License-Identifier: Apache-2.0
"""FastVID: cut the clip into segments, keep attended tokens, merge the rest into a few frames of each.

Neighbouring frames of a scene share tokens. With g_t a vector of frame t, a the attention that tokens
receive, and a budget of B tokens for each frame:

    cuts    = behind frame t where cos(g_t, g_t+1) < tau, and at the 7 lowest cosines
    anchors = the last frame of a segment and every 4th before it
    a segment of L frames has int(B L d) context tokens in its anchors; else the highest a of each frame stay
    context = density peaks among the other tokens of an anchor
    row     = w x + (1 - w) mean of its members,     w = max(1 / (members + 1), beta)

The members are all tokens of the segment that are not kept for their attention; each goes to the context
token that is most like it, once for every anchor. A context token is no member of its own anchor.

Deviations: exactly k tokens, the authors' LLaVA-Video rule with what division leaves over given to the first
frames; what an anchor has no room for goes to attended tokens; short clips have fewer cuts, where the code
crashes; no noise in the densities: the lower index counts as denser, and wins ties; float32. g is the mean of
the tokens of a frame and a the attention that a patch receives in the tower, as in the authors' Qwen file,
because released checkpoints have no pooling head; ``by="head"`` takes g and a of the head of a tower that has
one, as their other two files do. ``variant="official"`` takes no budget and keeps what the file of a family
does, ``rule``.
Provenance: arXiv:2503.11187; written from a description of the official code (commit a40a109, MIT), whose
three files differ; no code copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..checks import check_int, check_number, one_of
from ..core.merged import Merged
from ..core.method import Method, Positions, What
from ..core.select import ranked
from ..core.tokens import VisualTokens
from ..registry import register
from .clips import clip_features, counts_by_itself
from .clustering import cluster_sums, frame_peaks

RULES = ("onevision", "video", "qwen")  # the three files of the official code, which count differently


def transitions(g: Tensor) -> Tensor:
    """(T-1,) cosine of the vectors g (T, C) of neighbouring frames."""
    return cosine_similarity(g[:-1].float(), g[1:].float(), dim=-1)


def cuts(s: Tensor, segments: int, tau: float) -> list[int]:
    """Ascending frames that end a segment, but for the last of the clip: below ``tau``, and the lowest ones
    of s (T-1,) that make so many segments.
    """
    # a short clip has fewer places to cut than were asked for
    forced = ranked(-s[None])[0, : min(segments - 1, len(s))].tolist()
    return sorted({*forced, *(s < tau).nonzero()[:, 0].tolist()})


def segments_of(ends: Sequence[int], frames: int) -> list[range]:
    """The frames of every segment."""
    starts = [0, *(end + 1 for end in ends)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], frames], strict=True)]


def anchors(frames: Sequence[int], step: int) -> list[int]:
    """The last of the frames and every ``step``-th before it, ascending."""
    # backwards from the last frame, and then in order again
    return list(frames[::-1][::step][::-1])


def spread(total: int, places: int) -> list[int]:
    """``total`` over so many places, the first ones get one more."""
    return [total // places + (i < total % places) for i in range(places)]


class Joined(NamedTuple):
    """What the rows of an anchor are made of, beside their own context tokens."""

    first: int  # token of the segment, in the clip
    pool: Tensor  # (P,) tokens that may join, counted from it
    anchor: int  # first token of the anchor, in the clip
    context: Tensor  # (C,) its context tokens, counted from that
    nearest: Tensor  # (P,) which of these each token joins, C for none


def members_of(slots: Tensor, joined: Sequence[Joined], count: int) -> Tensor:
    """(count, J) the rows with ascending slots (k,) that each token of a clip is part of."""
    found = torch.full((count, 1 + len(joined)), -1, device=slots.device)
    found[slots, 0] = torch.arange(len(slots), device=slots.device)
    for number, one in enumerate(joined, start=1):
        part = one.nearest < len(one.context)
        place = one.anchor + one.context[one.nearest[part].long()]
        found[one.first + one.pool[part], number] = torch.searchsorted(slots, place)
    # a segment has few of the anchors of a clip, so that few columns are enough
    wide = int((found >= 0).sum(dim=1).max())
    return found.sort(dim=1, descending=True).values[:, :wide]


@dataclass
class PerFrame:
    """What every frame keeps.

    Args:
        salient: tokens kept for their attention, per frame.
        context: merged tokens, per frame; 0 in what is no anchor.
    """

    salient: list[int]
    context: list[int]

    def fit(self, n: int, total: int | None = None) -> PerFrame:
        """What frames of n tokens can hold, ``total`` of them: what is missing is filled up with
        salient tokens, from the first frames on.
        """
        # attended tokens first: context has what they leave
        self.salient = [min(s, n) for s in self.salient]
        self.context = [min(c, n - s) for s, c in zip(self.salient, self.context, strict=True)]
        missing = 0 if total is None else total - sum(self.salient) - sum(self.context)
        while missing > 0:
            # frames with room get one more in turn, until the budget is met
            for t, (s, c) in enumerate(zip(self.salient, self.context, strict=True)):
                if missing > 0 and s + c < n:
                    self.salient[t] += 1
                    missing -= 1
        return self


@register("fastvid")
@dataclass(frozen=True)
class FastVID(Method):
    """Rows: of every frame the most attended tokens, and in anchor frames what the others are merged into.

    Args:
        variant: "exact" keeps the budget, "official" takes none and keeps what the authors' file does.
        r: share that the official count starts from; not read by "exact".
        rule: whose file "official" follows: "onevision", "video" or "qwen".
        segments: the fewest segments of a clip that has as many frames.
        tau: a segment ends where the cosine of two neighbouring frames is below it.
        d: share of the budget for merged tokens.
        p: frames from one anchor to the next.
        beta: the least weight of a context token in its row.
        neighbours: tokens that make the density of one.
        iota: of the Qwen file: a frame that is as like the next one is left out.
        by: "tower": means of tokens, and the attention of a block; "head": vectors and attention of the
            pooling head of a tower that has one, as SigLIP.
    """

    variant: str = "exact"
    r: float = 0.25
    rule: str = "video"
    segments: int = 8
    tau: float = 0.9
    d: float = 0.4
    p: int = 4
    beta: float = 0.6
    neighbours: int = 4
    iota: float = 0.95
    by: str = "tower"

    nested: ClassVar[bool] = False
    positions: ClassVar[Positions] = "original"
    clips: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2503.11187"
    licence: ClassVar[str] = "MIT"

    def __post_init__(self) -> None:
        one_of("variant", self.variant, ("exact", "official"))
        one_of("rule", self.rule, RULES)
        one_of("by", self.by, ("tower", "head"))
        for name in ("r", "d", "beta"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("tau", "iota"):
            check_number(name, getattr(self, name), -1, 1)
        for name in ("segments", "p", "neighbours"):
            check_int(name, getattr(self, name), 1)
        if self.variant == "official":
            counts_by_itself(self)

    @property
    def needs(self) -> tuple[What, ...]:  # type: ignore[override]
        of_head: tuple[What, ...] = ("pooling_attention", "frame_vectors")
        return ("features", *of_head) if self.by == "head" else ("features", "received_attention")

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        return Merged.batch(self._rows(tokens, k))

    def own(self, tokens: VisualTokens) -> list[Merged]:
        return self._rows(tokens, None)

    def _rows(self, tokens: VisualTokens, k: int | None) -> list[Merged]:
        x = clip_features(self, tokens)  # (B, T, n, D)
        of_head = self.by == "head"
        a = tokens.need("pooling_attention" if of_head else "received_attention").view(x.shape[:3])
        # vectors that the caller has count for both, else means of tokens
        given = tokens.need("frame_vectors") if of_head else tokens.frame_vectors
        g = x.float().mean(dim=2) if given is None else given  # (B, T, C)
        return [self.clip(x[b], a[b], transitions(g[b]), k) for b in range(x.shape[0])]

    def clip(self, x: Tensor, a: Tensor, s: Tensor, k: int | None) -> Merged:
        """Rows of one clip x (T, n, D) with attention a (T, n) and cosines s (T-1,) of its frames."""
        frames, n = a.shape
        parts = segments_of(cuts(s, self.segments, self.tau), frames)
        counts = self.counts_of(parts, s, n, k)
        # tokens that stay for their attention
        salient = torch.zeros(frames, n, dtype=torch.bool, device=x.device)
        order = ranked(a)  # (T, n)
        for t, count in enumerate(counts.salient):
            salient[t, order[t, :count]] = True
        # context tokens of the anchors of each segment, and the rows that take their places
        kept, places, merged = salient.clone(), [], []
        joined: list[Joined] = []
        for part in parts:
            chosen = self.context(x, salient, part, counts.context)
            for t, index in chosen.items():
                kept[t, index] = True
                places.append(t * n + index)
            rows_of, joins = self.folded(x, salient, part, chosen)
            merged += rows_of
            joined += joins
        # all rows in reading order: attended tokens as they are, merged rows in place of context tokens
        slots = kept.flatten().nonzero()[:, 0]
        rows = x.flatten(0, 1)[slots]
        if places:
            # slots ascend, so this finds the row of each context token
            at = torch.searchsorted(slots, torch.cat(places))
            rows = rows.index_copy(0, at, torch.cat(merged).to(x.dtype))
        return Merged(rows[None], slots[None], joins=lambda: members_of(slots, joined, frames * n)[None])

    def counts_of(self, parts: Sequence[range], s: Tensor, n: int, k: int | None) -> PerFrame:
        """What every frame of n tokens keeps."""
        frames = parts[-1].stop
        each = int(n * self.r) if k is None else k // frames  # B, of a frame
        found = PerFrame([0] * frames, [0] * frames)
        # a budget is counted as LLaVA-Video does; what division leaves over is given out by ``fit``
        rule = "video" if k is not None else self.rule
        for part in parts:
            members: Sequence[int] = part
            # a frame that is as like the next one keeps nothing, unless the segment ends with it
            if rule == "qwen":
                members = [t for t in part if t == part[-1] or float(s[t]) < self.iota]
            held = anchors(members, self.p)
            if rule == "onevision":
                # a share of each frame is context, and the anchors hold that of the whole segment
                context = int(each * self.d)
                salient = [each - context] * len(part)
                contexts = [context * len(part) // len(held)] * len(held)
            else:
                # shares are taken of the budget of the whole segment
                total = each * len(part)
                context = int(total * self.d)
                if rule == "qwen":
                    context = max(context, 1)
                salient = spread(total - context, len(members))
                contexts = spread(context, len(held))[::-1]  # the last anchors get one more
            for t, count in zip(members, salient, strict=True):
                found.salient[t] = count
            for t, count in zip(held, contexts, strict=True):
                found.context[t] = count
                # in the Qwen file at most half of a frame is context
                if rule == "qwen":
                    found.context[t] = min(count, n // 2)
                    found.salient[t] = min(found.salient[t], n - found.context[t])
        return found.fit(n, k)

    def context(self, x: Tensor, salient: Tensor, part: range, counts: Sequence[int]) -> dict[int, Tensor]:
        """For every anchor of a segment the places (C,) of its context tokens, ascending."""
        found = {}
        for t in part:
            if counts[t]:
                others = (~salient[t]).nonzero()[:, 0]  # places
                peaks = frame_peaks(x[t, others], counts[t], self.neighbours)
                found[t] = others[peaks.centres[0]].sort().values
        return found

    def folded(
        self, x: Tensor, salient: Tensor, part: range, chosen: dict[int, Tensor]
    ) -> tuple[list[Tensor], list[Joined]]:
        """(C, D) float32 rows of every anchor of a segment, and what they are made of."""
        if not chosen:
            return [], []
        n = x.shape[1]
        # the pool: all tokens of the segment that are not kept for their attention, by number in it
        pool_at = (~salient[part.start : part.stop]).flatten().nonzero()[:, 0]
        pool = x[part.start : part.stop].flatten(0, 1)[pool_at].float()  # (P, D)
        unit, rows, joins = normalize(pool, dim=-1, eps=1e-8), [], []
        for t, index in chosen.items():
            own = x[t, index].float()  # (C, D)
            nearest = (normalize(own, dim=-1, eps=1e-8) @ unit.T).argmax(dim=0)  # (P,)
            if self.variant == "exact" or self.rule != "onevision":
                # an anchor's own context tokens join none: one more cluster takes them, and is dropped
                nearest[torch.searchsorted(pool_at, (t - part.start) * n + index)] = len(index)
            sums, members = (one[: len(index)] for one in cluster_sums(pool, nearest, len(index) + 1))
            # row = w x + (1 - w) mean; a context token that nothing joins stays as it is
            w = (1 / (members + 1)).clamp_min(self.beta)
            mean = sums / members.clamp_min(1)
            rows.append(torch.where(members > 0, w * own + (1 - w) * mean, own))
            # each anchor has one number for every token of the segment: small ones
            short = nearest.to(torch.int16 if n < 2**15 else torch.int32)
            joins.append(Joined(part.start * n, pool_at, t * n, index, short))
        return rows, joins
