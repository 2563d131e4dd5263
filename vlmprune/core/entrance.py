# SPDX-License-Identifier: Apache-2.0
"""What happens at the entrance and the exit of the language model in one call.

Entrance: the merged sequence is cut, and its mask and positions are put into the frame of the slots really held. Exit: the
output is expanded to the full length, and the cache learns what was cut. In between transformers sees a consistent, shorter
sequence and builds every mask itself, whatever the attention implementation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InvariantError, UnsupportedError
from .cache import CacheState, Group, adopt, held_length, state_of
from .compaction import Compaction
from .cutting import Cut, cut_pictures, keep_maps
from .pictures import Picture
from .report import Report


@dataclass(eq=False)
class Call:
    """State of one forward of the multimodal model; dies with it."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    report: Report
    continues: bool = False  # a cache holds earlier tokens
    pictures: dict[str, list[Picture]] = field(default_factory=dict)  # per modality, not expanded for beams
    entered: bool = False
    cache: Any = None
    compaction: Compaction | None = None
    past: Tensor | None = None  # (B, P) validity of the slots held before this call
    seen: int = 0  # tokens of the conversation before this call
    fed: int = 0  # tokens fed in this call
    masked: bool = False  # the caller gave a mask


def assign(lengths: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Pictures of every row: ``lengths`` of the pictures as encoded, ``counts`` of placeholders per (maybe expanded) row.

    With beams or several returned sequences each prompt is repeated ``E`` times in a row while its pictures are encoded once.
    """
    total, slots = sum(lengths), sum(counts)
    if total == 0 or slots == 0 or slots % total:
        raise InvariantError(
            f"{slots} placeholder tokens for pictures of {list(lengths)} tokens; expected a whole multiple of {total}"
        )
    expand = slots // total
    rows: list[list[int]] = []
    picture = 0
    for start in range(0, len(counts), expand):
        need, mine = counts[start], []
        while need > 0 and picture < len(lengths):
            mine.append(picture)
            need -= lengths[picture]
            picture += 1
        if need or any(count != counts[start] for count in counts[start : start + expand]):
            raise InvariantError(f"placeholders per row {list(counts)} do not line up with pictures of {list(lengths)} tokens")
        rows.extend([mine] * expand)
    return rows


class Entrance:
    """Cuts sequences at the language model for one session."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def enter(self, call: Call, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """New keyword arguments for the language model, or None to leave the call alone."""
        call.entered = True
        cache = call.cache = kwargs.get("past_key_values")
        state = state_of(cache)
        if state is not None:
            state.inside = True
        embeds: Tensor = kwargs["inputs_embeds"]  # (B, q, D)
        started = time.perf_counter()
        call.report.sequence = (embeds.shape[1], embeds.shape[1])
        cuts = self._cut(call, embeds) if self.session.enabled else None
        if cuts is None and state is None:
            return None
        mask, position_ids = self._frame(call, kwargs, state, embeds)
        if cuts is not None:
            keep, embeds = cuts
            call.compaction = compaction = Compaction(keep, mask[:, call.past.shape[1] :])
            if compaction.width == 0:
                raise InvariantError(f"attention_mask of shape {tuple(mask.shape)} masks every token; expected 1 for tokens")
            embeds = compaction.sequence(embeds)
            position_ids = compaction.positions(position_ids, self.session.positions)
            mask = torch.cat([call.past, compaction.valid], dim=1)
            call.report.sequence = (call.fed, compaction.width)
            call.report.fire("enter")
            call.report.seconds += time.perf_counter() - started
        kwargs = {**kwargs, "inputs_embeds": embeds, "position_ids": position_ids, "attention_mask": mask.long()}
        if cuts is None and state.all_valid and not call.masked:
            kwargs["attention_mask"] = None  # keeps decoding on the maskless fast path
        if "cache_position" in kwargs:  # transformers < 5.4 counts slots with it
            held = call.past.shape[1]
            kwargs["cache_position"] = torch.arange(held, held + embeds.shape[1], device=embeds.device)
        return kwargs

    def _frame(self, call: Call, kwargs: dict[str, Any], state: CacheState | None, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Mask (B, P + q) over held slots and positions (B or 1, q), both explicit."""
        batch, call.fed = embeds.shape[:2]
        held = held_length(call.cache)
        call.seen = held if state is None else held + state.seen - state.groups[0].held.shape[1]
        mask = kwargs.get("attention_mask")
        call.masked = mask is not None
        if mask is None:
            mask = torch.ones(batch, call.seen + call.fed, dtype=torch.bool, device=embeds.device)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedError(
                f"attention_mask is {shape}; with pruned images pass the 2-D padding mask (batch, tokens) "
                "and let the model expand it"
            )
        if mask.shape != (batch, call.seen + call.fed):
            raise InvariantError(
                f"attention_mask has shape {tuple(mask.shape)}; expected {(batch, call.seen + call.fed)}: "
                f"{call.seen} tokens seen before and {call.fed} fed now"
            )
        mask = mask.to(embeds.device, torch.bool)
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(call.seen, call.seen + call.fed, device=embeds.device)[None]
        if position_ids.shape[-1] != call.fed or position_ids.shape[-2:-1] not in ((1,), (batch,)):
            raise InvariantError(f"position_ids has shape {tuple(position_ids.shape)}; expected {(batch, call.fed)}, as fed")
        if state is None:
            call.past = mask[:, :held]
        else:
            group = state.groups[0]
            call.past = torch.cat([group.held.to(mask.device), mask[:, state.seen : call.seen]], dim=1)
            position_ids = position_ids - group.lost.to(position_ids.device)[:, None]
        return torch.cat([call.past, mask[:, call.seen :]], dim=1), position_ids

    def _cut(self, call: Call, embeds: Tensor) -> tuple[Tensor, Tensor] | None:
        """(keep (B, q) bool, embeds with merged rows) or None when nothing is dropped."""
        session, report = self.session, call.report
        if not call.pictures:
            return None
        keep = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        changed = False
        for modality in session.adapter.modalities:
            pictures = call.pictures.get(modality.name)
            if not pictures:
                continue
            visual = self._placeholders(call, embeds, modality)  # (B, q)
            rows = assign([p.length for p in pictures], visual.sum(dim=1).tolist())
            samples = list({tuple(row): None for row in rows})  # expanded rows share their pictures
            cuts = cut_pictures(pictures, samples, session.method, session.budget, session.adapter.projector, session.strict)
            self._note(report, pictures, cuts)
            if all(cut is None for cut in cuts):
                continue
            changed = True
            flat = [
                cuts[p].keep if cuts[p] is not None else torch.ones(pictures[p].length, dtype=torch.bool)
                for row in rows
                for p in row
            ]
            keep[visual] = torch.cat(flat).to(keep.device)
            embeds = _replace(embeds, visual, [(pictures[p].length, cuts[p]) for row in rows for p in row])
        return (keep, embeds) if changed else None

    def _placeholders(self, call: Call, embeds: Tensor, modality: Any) -> Tensor:
        token = self.session.adapter.token_id(modality)
        if call.input_ids is not None:
            return (call.input_ids == token).to(embeds.device)
        table = self.session.adapter.inner.get_input_embeddings()
        row = table(torch.tensor(token, device=call.inputs_embeds.device))
        return (call.inputs_embeds == row).all(dim=-1).to(embeds.device)

    def _note(self, report: Report, pictures: Sequence[Picture], cuts: Sequence[Cut | None]) -> None:
        report.keep += keep_maps(pictures, cuts, report.method)
        report.dense_tokens += [picture.count for picture in pictures]
        report.realised_tokens += [p.count if cut is None else cut.realised for p, cut in zip(pictures, cuts, strict=True)]
        mean = sum(report.realised_tokens) / len(report.realised_tokens)
        report.tokens_per_layer = [mean] * self.session.depth

    def leave(self, call: Call, output: Any) -> Any:
        """Expand the output to the full length and let the cache remember the cut."""
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            cache = call.cache
        compaction = call.compaction
        if compaction is None:
            return output
        if not hasattr(output, "last_hidden_state"):
            raise UnsupportedError(f"the language model returned a {type(output).__name__}; call the model with return_dict=True")
        output.last_hidden_state = compaction.expand(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(compaction.expand(hidden) for hidden in output.hidden_states)
        if cache is not None and int(cache.get_seq_length(0)) == call.past.shape[1] + compaction.width:
            self._remember(call, cache, compaction)
        call.report.fire("exit")
        return output

    def _remember(self, call: Call, cache: Any, compaction: Compaction) -> None:
        before = getattr(cache, "_vlmprune_state", None)
        # text after the last loss stands 1:1 in all layers, so drafts in it can be cropped away
        held = torch.cat([call.past, compaction.valid[:, : compaction.width - compaction.tail]], dim=1)
        lost = compaction.lost if self.session.positions == "compact" else torch.zeros_like(compaction.lost)
        if before is not None:
            lost = lost + before.groups[0].lost.to(lost.device)
        adopt(
            cache,
            CacheState(call.seen + call.fed - compaction.tail, [Group(0, held, lost)], self.session.reference, bool(held.all())),
        )


def _replace(embeds: Tensor, visual: Tensor, placed: Sequence[tuple[int, Cut | None]]) -> Tensor:
    """Put merged rows into the embeddings; ``placed`` lists the pictures of all rows in reading order."""
    if all(cut is None or cut.rows is None for _, cut in placed):
        return embeds
    slots, rows, start = [], [], 0
    for length, cut in placed:
        if cut is not None and cut.rows is not None:
            slots.append(cut.slots + start)
            rows.append(cut.rows.to(embeds.device, embeds.dtype))
        start += length
    where = visual.flatten().nonzero()[:, 0][torch.cat(slots).to(visual.device)]
    flat = embeds.flatten(0, 1).index_copy(0, where, torch.cat(rows))
    return flat.view_as(embeds)
