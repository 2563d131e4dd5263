# SPDX-License-Identifier: Apache-2.0
"""Views: the sequence as a group of decoder layers sees it, with its masks and positions.

Without cuts inside the language model there is one view. A cut at layer L opens another one, for L and all
later layers. A view outlives its forward on the KV cache, where it tells the next call what is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from ...errors import InvariantError, UnsupportedError
from .compaction import Compaction, Positions
from .masks import LayerView, TokenTypes, angle_kind, causal_mask, layer_kind


@dataclass(eq=False)
class Ahead:
    """Positions of the tokens behind a cut, counted for many steps at once: a decode step only looks."""

    STEPS: ClassVar[int] = 256
    # tokens of the conversation before the first of them, and (1, STEPS): one attribute, since copies of a
    # cache share it and may be read in threads of their own
    _made: tuple[int, Tensor] | None = None

    def take(self, seen: int, position_ids: Tensor, lost: int) -> Tensor:
        """Position ids (B or 1, n) less ``lost``, after ``seen`` tokens; all rows of them are alike."""
        new = position_ids.shape[1]
        if new > self.STEPS:
            return position_ids - lost
        made = self._made
        # a new conversation, or one that ran out of the numbers that were made
        if made is None or not 0 <= seen - made[0] <= self.STEPS - new:
            steps = torch.arange(-lost, self.STEPS - lost, device=position_ids.device)
            made = self._made = (seen, position_ids[:1, :1] + steps)
        at = seen - made[0]
        return made[1][:, at : at + new].to(position_ids.device)


@dataclass(frozen=True, eq=False)
class SequenceView:
    """The sequence as the layers from ``start`` on see it.

    Args:
        start: first layer of the group.
        held: (B, P) bool, slots of the cache from before this call: False for dead slots and padding.
        new: (B, n) bool, the same for the columns of this call.
        position_ids: (B or 1, n); (3 or 4, B, n) for M-RoPE, four with the plain numbers first.
        lost: tokens cut so far in this group, earlier turns included, where positions are re-counted: (B,),
            or one number for all rows; None: nothing was.
        maskless: the mask may stay None: every slot is a token, which is known without asking a device.
        counted: position ids (B or 1, n) follow each other in every row.
        gaps: positions were not re-counted after a cut of this call.
        types: what each token is, where the model lets some tokens attend both ways.
        open_end: a static cache holds more slots than ``held`` lists, all of them tokens; how many was not
            asked.
    """

    start: int
    held: Tensor
    new: Tensor
    position_ids: Tensor
    lost: Tensor | int | None
    maskless: bool = False
    counted: bool = False
    gaps: bool = False
    types: TokenTypes | None = None
    open_end: bool = False
    _masks: dict[str, Any] = field(default_factory=dict)
    _angles: dict[str | None, Any] = field(default_factory=dict)
    _ahead: Ahead | None = None  # of views that a cache keeps

    @property
    def valid(self) -> Tensor:
        """(B, P + n) bool."""
        if self.open_end:
            self._refuse()
        if self.held.shape[1] == 0 or self.new.shape[1] == 0:
            return self.new if self.held.shape[1] == 0 else self.held
        return torch.cat([self.held, self.new], dim=1)

    @property
    def width(self) -> int:
        """P + n, slots held after this call."""
        if self.open_end:
            self._refuse()
        return self.held.shape[1] + self.new.shape[1]

    def _refuse(self) -> NoReturn:
        raise InvariantError(
            "this decode step did not ask the device how many slots its static cache holds; expected only "
            "slots that read none of them (reads_held)"
        )

    def cut(self, compaction: Compaction, policy: Positions) -> SequenceView:
        """This view after a cut."""
        lost = self.lost
        if policy == "compact" and self.position_ids.ndim > 2:
            raise UnsupportedError(
                f"position_ids has shape {tuple(self.position_ids.shape)}: tokens have 2-D (M-RoPE) "
                "positions, which cannot be counted anew; use positions='original'"
            )
        if policy == "compact":
            lost = compaction.lost if lost is None else _sum(lost, compaction.lost)
        types = None if self.types is None else self.types.cut(compaction)
        positions = compaction.positions(self.position_ids, policy)
        maskless = self.maskless and compaction.valid.shape[0] == 1  # more rows may be filled up
        counted, gaps = self.counted and compaction.slides, self.gaps or policy == "original"
        # without the masks and angles that were made: they are of the uncut sequence
        return SequenceView(
            self.start, self.held, compaction.valid, positions, lost, maskless, counted, gaps, types=types
        )

    def opened_at(self, layer: int) -> SequenceView:
        """The same view for a group that starts at a later layer."""
        return replace(self, start=layer, _masks={}, _angles={})

    def hiding(self, slots: Tensor) -> SequenceView:
        """This view without some of its held slots (B, P), for one forward."""
        return replace(self, held=self.held & ~slots, maskless=False, _masks={}, _angles={})

    # --- on the cache, between two forwards -------------------------------------------------------

    def frozen(self, tail: int) -> SequenceView:
        """What the next call must know: the slots without the last ``tail``, which all groups hold."""
        every = self.valid
        held = every[:, : every.shape[1] - tail]
        none = self.position_ids[..., :0]
        return SequenceView(self.start, held, held[:, :0], none, self.lost, _ahead=Ahead())

    def resumed(
        self,
        mask: Tensor,
        static: int,
        seen: int,
        position_ids: Tensor,
        types: TokenTypes | None,
        counted: bool = False,
    ) -> SequenceView:
        """This view in a later call.

        Args:
            mask: (B, seen + n) bool, padding mask of the whole conversation as the user sees it.
            static: tokens of the conversation that the frozen slots stand for.
            seen: tokens of the conversation before this call.
            position_ids: of the new columns in the uncut sequence.
        """
        # what the static part holds is fixed; behind it stands what the user says of later tokens
        held = self.held.to(mask.device)
        if seen > static:
            held = torch.cat([held, mask[:, static:seen]], dim=1)
        lost, position_ids = self._counted_on(seen, position_ids, counted)
        return SequenceView(self.start, held, mask[:, seen:], position_ids, lost, False, counted, types=types)

    def stepped(self, static: int, seen: int | None, position_ids: Tensor, counted: bool) -> SequenceView:
        """This view in a later call with one column, where all that is held are tokens: nothing is joined.

        Without a number of tokens ``seen`` the slots behind the frozen ones are not listed.
        """
        lost, position_ids = self._counted_on(seen, position_ids, counted)
        # a row of one True, expanded: nothing is written that grows with the conversation
        every = self.held[:, :1].to(position_ids.device)
        held = every.expand(-1, self.held.shape[1] + (0 if seen is None else seen - static))
        return SequenceView(self.start, held, every, position_ids, lost, True, counted, open_end=seen is None)

    def _counted_on(
        self, seen: int | None, position_ids: Tensor, counted: bool
    ) -> tuple[Tensor | int | None, Tensor]:
        """Tokens cut so far, and the position ids less these."""
        lost = self.lost
        if isinstance(lost, Tensor):
            lost = lost.to(position_ids.device)
            return lost, position_ids - lost[:, None]
        if lost is None:
            return lost, position_ids
        if counted and seen is not None and self._ahead is not None:
            return lost, self._ahead.take(seen, position_ids, lost)
        return lost, position_ids - lost

    def select(self, rows: Tensor) -> SequenceView:
        """The rows of a batch that beam search goes on with."""
        held = self.held[rows.to(self.held.device)]
        lost = self.lost
        if isinstance(lost, Tensor):
            lost = lost[rows.to(lost.device)]
        return SequenceView(self.start, held, held[:, :0], self.position_ids, lost, _ahead=self._ahead)

    # --- for the layers of the group --------------------------------------------------------------

    @property
    def plain_positions(self) -> Tensor | None:
        """(B or 1, n) position numbers, None where tokens have M-RoPE positions only."""
        if self.position_ids.ndim == 2:
            return self.position_ids
        return self.position_ids[0] if self.position_ids.shape[0] == 4 else None

    def angles(self, language_model: nn.Module, layer: int, hidden: Tensor) -> Any:
        """What the model's rotary module gives a layer: cos and sin, or one complex tensor (Llama 4)."""
        kind = angle_kind(language_model, layer)
        if kind not in self._angles:
            places = self.position_ids[1:] if self.position_ids.shape[:-2] == (4,) else self.position_ids
            options = () if kind is None else (kind,)
            rotary: Any = language_model.rotary_emb
            self._angles[kind] = rotary(hidden, places, *options)
        made = self._angles[kind]
        if isinstance(made, Tensor):
            return made.to(hidden.device)
        return tuple(angle.to(hidden.device) for angle in made)

    def last_of_prompt(self, generated: int) -> Tensor:
        """(B, 1) column of the last token of the prompt, or of the last that stays of it where a cut took it;
        ``generated`` columns at the end are no part of it.
        """
        prompt = self.new.shape[1] - generated
        if self.maskless:
            return torch.full((self.new.shape[0], 1), prompt - 1, device=self.new.device)
        columns = torch.arange(1, prompt + 1, device=self.new.device)
        return (self.new[:, :prompt] * columns).argmax(dim=1, keepdim=True)

    def take_angles(self, language_model: nn.Module, layer: int, angles: Sequence[Tensor]) -> None:
        """Use these as the angles of a layer and others of its kind: they were cut of those before."""
        self._angles[angle_kind(language_model, layer)] = tuple(angles)

    def mask(self, config: Any, layer: int, hidden: Tensor, cache: Any) -> Any:
        """What the model itself would hand to this layer as attention mask, made once per kind of layer."""
        # layers of a kind read the same mask, and a mask of n x S is not made twice
        kind = layer_kind(config, layer)
        if kind not in self._masks:
            if self.types is None:
                valid = None if self.maskless else self.valid
                made = causal_mask(config, kind, layer, hidden, valid, self.held.shape[1], cache)
            else:
                made = self.types.masks(
                    hidden, self.valid, None if cache is None else LayerView(cache, layer)
                )
                made = made[kind] if isinstance(made, dict) else made
            self._masks[kind] = made
        return self._masks[kind]

    def mask_of_all(self, config: Any, hidden: Tensor, cache: Any) -> Any:
        """The mask for the language model: 2-D, or 4-D per kind of layer where tokens have types."""
        # without mask and cache, gaps in plain positions would read as packed sequences
        packed = self.gaps and cache is None and self.plain_positions is not None
        if self.maskless and not packed:
            return None
        return self.valid.long() if self.types is None else self.masks(config, hidden, cache)

    def masks(self, config: Any, hidden: Tensor, cache: Any) -> Any:
        """The 4-D mask for the language model, or one per kind of layer where layers differ."""
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return self.mask(config, 0, hidden, cache)
        return {kind: self.mask(config, kinds.index(kind), hidden, cache) for kind in set(kinds)}


def _sum(one: Tensor | int, other: Tensor | int) -> Tensor | int:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        other = other.to(one.device)
    return one + other


class Views:
    """All views of one forward, by first layer, and the cuts that made them, in order."""

    def __init__(self, views: Sequence[SequenceView]) -> None:
        self.all = list(views)
        self.cuts: list[tuple[int, Compaction]] = []  # (layer at whose input it was made, cut)
        self.columns = self.all[0].new.shape[1]  # of the uncut sequence

    def at(self, layer: int) -> SequenceView:
        """The view of a layer."""
        return next(view for view in reversed(self.all) if view.start <= layer)

    def cut(self, layer: int, compaction: Compaction, policy: Positions) -> None:
        """Record a cut at the input of ``layer``: it opens a view there and shortens all later ones."""
        # views ascend by first layer, which `at` relies on
        if not any(view.start == layer for view in self.all):
            later = [number for number, view in enumerate(self.all) if view.start > layer]
            self.all.insert(later[0] if later else len(self.all), self.at(layer).opened_at(layer))
        self.all = [view.cut(compaction, policy) if view.start >= layer else view for view in self.all]
        self.cuts.append((layer, compaction))

    def angles(self, language_model: nn.Module, layer: int, hidden: Tensor) -> Any:
        """What the rotary module gives a layer, asked once for all views with as many new columns."""
        view, kind = self.at(layer), angle_kind(language_model, layer)
        shape = view.position_ids.shape
        alike = [one for one in self.all if one.start and one.position_ids.shape == shape]
        if kind not in view._angles and len(shape) == 2 and len(alike) > 1:
            every = replace(view, position_ids=torch.cat([one.position_ids for one in alike]), _angles={})
            made = every.angles(language_model, layer, hidden)
            parts = [made] if isinstance(made, Tensor) else list(made)
            if all(part.shape[0] == shape[0] * len(alike) for part in parts):  # a row of angles per position
                for one, *own in zip(alike, *(part.split(shape[0]) for part in parts), strict=True):
                    one._angles[kind] = own[0] if isinstance(made, Tensor) else tuple(own)
        return view.angles(language_model, layer, hidden)

    @property
    def tail(self) -> int:
        """Columns at the end of this call that every row keeps in every layer: so many may be cropped of a
        cache.
        """
        if self.cuts and self.all[0].new.device.type != "cpu":
            return 0  # not worth asking the device for
        return min([compaction.tail for _, compaction in self.cuts], default=self.columns)

    def follow(self, mask: Tensor, layer: int) -> Tensor:
        """(B, L) bool marks of the uncut columns -> (B, n) of those that a layer reads."""
        for start, compaction in self.cuts:
            if start <= layer:
                mask = compaction.follow(mask)
        return mask

    def expand(self, hidden: Tensor, layer: int | None = None) -> Tensor:
        """(B, n, D) back to the full length; ``layer`` is the one whose output this is (None: the last)."""
        # the last cut is undone first: each speaks of the sequence that the one before it left
        for start, compaction in reversed(self.cuts):
            if layer is None or start <= max(layer, 0):
                hidden = compaction.expand(hidden)
        return hidden
