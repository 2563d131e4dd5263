# SPDX-License-Identifier: Apache-2.0
"""DyCoke: thin three of four frames to what is new in them; then let every new token choose what it reads.

Before the language model (``dycoke``) frames are taken in groups of four, g to g + 3:

    g stays whole;  of g + 1 and g + 2 the tokens with the lowest cosine to the same place of g stay,
    of g + 3 those with the lowest cosine to the same place of g + 2

Nothing is averaged. While decoding (``dycoke_decode``), a is the attention of the new token to the visual
tokens in layer L - 1, mean over heads, and b that of the step before:

    cos(a, b) < threshold: layers from L on see the visual tokens with the highest a, a share 1 - P of them
    else:                  they see those of the step before

What is hidden stays in the cache and may come back.

Deviations: exactly k tokens, thinned frames share what the whole ones leave; an incomplete last group
follows the same rules, where the authors keep the third frame of the last group whole, lose an odd last frame
and crash on four frames or fewer (``variant="official"``, which takes no budget); reading order, where the
code orders a thinned frame by cosine; the lower place wins ties; float32. While decoding, a step whose
attention did not move keeps the choice of the step before, where the code hides nothing (``reuse=False``).
Provenance: arXiv:2411.15024; written from a description of the official code (commit dd74634, Apache-2.0);
no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checks import check_int, check_number, one_of
from ..core.grid import shares_of
from ..core.method import Look, Method, SlotName, What
from ..core.select import highest
from ..core.tokens import VisualTokens
from ..errors import SpecError, UnsupportedError
from ..registry import register
from .clips import clip_features, counts_by_itself, frames_of, same_place_cosine

GROUP = 4  # frames, of which the first stays whole


class Thinned(NamedTuple):
    """A frame that keeps what is unlike another one."""

    frame: int
    like: int


def thinned(frames: int) -> list[Thinned]:
    """The frames of a clip that are thinned, in order, and what they are compared with."""
    # frames 1 and 2 of a group are compared with 0, frame 3 with 2
    return [Thinned(t, t - (2 if t % GROUP == 2 else 1)) for t in range(frames) if t % GROUP]


def official_thinned(frames: int) -> list[Thinned]:
    """The same as the authors do it: the third frame of the last group stays whole."""
    # an odd last frame is gone; the third of a group (t % 4 == 2) is thinned unless the group is the last
    return [one for one in thinned(frames - frames % 2) if one.frame % 2 or one.like < frames - GROUP]


@register("dycoke")
@dataclass(frozen=True)
class DyCoke(Method):
    """Keeps every fourth frame whole, and of the others the tokens that are unlike an earlier frame.

    Args:
        variant: "exact" keeps the budget, "official" takes none and counts as the authors do.
        drop: share that the official count drops of a thinned frame; not read by "exact".
    """

    variant: str = "exact"
    drop: float = 0.7

    needs: ClassVar[tuple[What, ...]] = ("features",)
    clips: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2411.15024"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        one_of("variant", self.variant, ("exact", "official"))
        check_number("drop", self.drop, 0, 1)
        if self.variant == "official":
            counts_by_itself(self)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        frames, n = frames_of(self, tokens)
        pairs = thinned(frames)
        # what the whole frames leave to all thinned ones together
        left = k - (frames - len(pairs)) * n
        if left < len(pairs):
            least = k - left + len(pairs)
            raise SpecError(
                f"keep: {k} tokens of {frames} frames are too few for {self.name}, which keeps every fourth "
                f"whole and a token of each other one; keep at least {least}"
            )
        counts = [n] * frames  # by frame
        for pair, count in zip(pairs, shares_of([n] * len(pairs), left), strict=True):
            counts[pair.frame] = count
        return self._kept(tokens, pairs, counts).nonzero()[:, 1].view(tokens.batch, k)

    def own(self, tokens: VisualTokens) -> Tensor:
        frames, n = frames_of(self, tokens)
        if frames <= GROUP:
            raise UnsupportedError(
                f"{self.name}(variant=official) has no answer for {frames} frames, where the authors' code "
                f"fails; give more than {GROUP}, or a budget to variant=exact, as in {self.name}@0.5"
            )
        pairs = official_thinned(frames)
        counts = [n] * (frames - frames % 2) + [0] * (frames % 2)  # an odd last frame keeps nothing
        for pair in pairs:
            counts[pair.frame] = int((1 - self.drop) * n)
        return self._kept(tokens, pairs, counts)

    def _kept(self, tokens: VisualTokens, pairs: list[Thinned], counts: list[int]) -> Tensor:
        """(B, N) bool: of every frame as many tokens as ``counts``, of thinned ones the least alike."""
        x = clip_features(self, tokens)  # (B, T, n, D)
        # 0 in frames that stay whole, where every token is kept and no order is needed
        unlike = torch.zeros(x.shape[:3], device=x.device)
        if pairs:
            frames, others = [one.frame for one in pairs], [one.like for one in pairs]
            unlike[:, frames] = -same_place_cosine(x, frames, others)
        count = torch.tensor(counts, device=x.device).expand(x.shape[0], -1)
        every = torch.ones_like(unlike, dtype=torch.bool)
        # as rows of all frames of the batch: (B * T, n)
        return highest(unlike.flatten(0, 1), count.flatten(), every.flatten(0, 1)).view(x.shape[0], -1)


@register("dycoke_decode")
@dataclass(frozen=True)
class DyCokeDecode(Method):
    """Every new token sees the visual tokens that it looked at one layer before; the others stay held.

    Args:
        layer: L, the first layer that sees fewer.
        drop: P, share of the visual tokens that is hidden.
        threshold: the choice changes where the attention of two steps is less alike than this.
        reuse: a step whose attention did not move keeps the choice of the step before; False, as published:
            it sees everything.
    """

    layer: int = 3
    drop: float = 0.7
    threshold: float = 0.9
    reuse: bool = True

    slot: ClassVar[SlotName] = "decode"
    budgeted: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2411.15024"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_int("layer", self.layer, least=1)
        check_number("drop", self.drop, 0, 1)
        check_number("threshold", self.threshold, -1, 1)
        one_of("reuse", self.reuse, (True, False))

    def looks_from(self, depth: int) -> int:
        if self.layer >= depth:
            raise SpecError(
                f"layer={self.layer} but the language model has layers 0..{depth - 1}; choose a smaller one"
            )
        return self.layer

    def look(self, attention: Tensor, visual: Tensor, before: Look | None) -> Tensor:
        # in double precision, and truncated, as the authors count
        count = (visual.sum(dim=1).double() * (1 - self.drop)).long()
        chosen = highest(attention, count, visual)
        if before is None:
            return chosen
        moved = likeness(attention, before.attention) < self.threshold  # (B,)
        return torch.where(moved[:, None], chosen, before.visible if self.reuse else visual)


def likeness(attention: Tensor, before: Tensor) -> Tensor:
    """(B,) cosine of the attention (B, S) of two steps."""
    return torch.nn.functional.cosine_similarity(attention, before, dim=1)
