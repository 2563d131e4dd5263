# SPDX-License-Identifier: Apache-2.0
"""What happens at the entrance and the exit of the language model in one call.

Entrance: the merged sequence is cut, and its mask and positions are put into the frame of the slots really held. Exit: the
output is expanded to the full length, and the cache learns what was cut. In between transformers sees a consistent, shorter
sequence and builds every mask itself, whatever the attention implementation.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ..errors import InvariantError, UnsupportedError
from .cache import CacheState, Group, adopt, cache_in, counting_layer, has_running_states, held_length, state_of
from .call import Call, Placed, assign
from .compaction import Compaction
from .cutting import Cut, cut_pictures, keep_maps
from .frames import Frame, TokenTypes
from .pictures import Picture


class Entrance:
    """Cuts sequences at the language model for one session."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def enter(self, call: Call, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """New keyword arguments for the language model, or None to leave the call alone."""
        call.entered = True
        cache = call.cache = cache_in(kwargs)
        state = state_of(cache)
        if state is not None:
            state.inside = True
        embeds: Tensor = kwargs["inputs_embeds"]  # (B, q, D)
        call.report.sequence = (embeds.shape[1], embeds.shape[1])
        started = time.perf_counter()
        if self.session.enabled:
            self._place(call, embeds)
        cut = any(c is not None for placed in call.placed for c in placed.cuts)
        if state is not None:
            call.marks_before = state.marks
        if not cut and state is None and not (call.placed and (self.session.inside or self.session.reweight)):
            return None
        if kwargs.get("output_attentions") or getattr(self.session.adapter.language_model.config, "output_attentions", False):
            raise UnsupportedError(
                "output_attentions: the maps would speak of the sequence after the cut, and edited rows would be missing; read what "
                "was kept from run.last.keep, or ask for attention maps without pruning"
            )
        call.frames = self._frames(call, kwargs, state, embeds)
        if not cut and state is None:
            return None  # cuts inside the language model start from the untouched call
        if cut:
            embeds = self._cut(call, embeds)
            call.report.seconds += time.perf_counter() - started
        frame = call.frames[0]
        kwargs = {**kwargs, "inputs_embeds": embeds, "position_ids": frame.position_ids}
        # a cut sequence needs its mask spelled out: gaps in positions would read as packed sequences
        kwargs["attention_mask"] = frame.mask_of_all(self.session.adapter.language_model.config, embeds, cache)
        if "cache_position" in kwargs:  # transformers < 5.4 counts slots with it
            kwargs["cache_position"] = frame.cache_position()
        return kwargs

    def _frames(self, call: Call, kwargs: dict[str, Any], state: CacheState | None, embeds: Tensor) -> list[Frame]:
        """One frame per group of layers, all explicit: masks over held slots and positions."""
        batch, fed = embeds.shape[:2]
        held = held_length(call.cache)
        call.fed = fed
        call.seen = seen = held if state is None else state.seen_with(call.cache)
        typed = self.session.adapter.text_type is not None
        mask = call.mask if typed else kwargs.get("attention_mask")
        maskless = mask is None and fed == 1 and state is not None and state.all_valid
        if mask is None:
            mask = torch.ones(batch, seen + fed, dtype=torch.bool, device=embeds.device)
        if isinstance(mask, dict) or not isinstance(mask, Tensor) or mask.ndim != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedError(
                f"attention_mask is {shape}; with pruned images pass the 2-D padding mask (batch, tokens) "
                "and let the model expand it"
            )
        if mask.shape != (batch, seen + fed):
            raise InvariantError(
                f"attention_mask has shape {tuple(mask.shape)}; expected {(batch, seen + fed)}: "
                f"{seen} tokens seen before and {fed} fed now"
            )
        mask = mask.to(embeds.device, torch.bool)
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(seen, seen + fed, device=embeds.device)[None]
        if position_ids.shape[-1] != fed or position_ids.shape[-2:-1] not in ((1,), (batch,)):
            raise InvariantError(f"position_ids has shape {tuple(position_ids.shape)}; expected {(batch, fed)}, as fed")
        types = self._types(call, fed) if typed and call.placed else None
        if state is None:
            none = torch.zeros(batch, dtype=torch.long, device=embeds.device)
            return [Frame(0, mask[:, :held], mask[:, seen:], position_ids, none, types=types)]
        frames = []
        for group in state.groups:
            past = torch.cat([group.held.to(mask.device), mask[:, state.seen : seen]], dim=1)
            lost = group.lost.to(position_ids.device)
            frames.append(Frame(group.start, past, mask[:, seen:], position_ids - lost[:, None], lost, maskless, types))
        return frames

    def _types(self, call: Call, fed: int) -> TokenTypes | None:
        """Types of the fed tokens; families give those of the whole conversation or of what is fed."""
        if call.types is None:
            return None
        if call.types.ndim != 2 or call.types.shape[1] < fed:
            raise InvariantError(f"token_type_ids has shape {tuple(call.types.shape)}; expected a type for each of {fed} tokens")
        model, text = self.session.adapter.model, self.session.adapter.text_type
        # the class's own: on the instance a session's wrapper stands in its place
        return TokenTypes(call.types[:, -fed:], text, type(model).create_masks_for_generate, model.config)

    @torch.compiler.disable
    def _place(self, call: Call, embeds: Tensor) -> None:
        """Find where the pictures of this call stand, and choose what stays of them before the language model."""
        session, report = self.session, call.report
        pictures: list[Picture] = []
        samples: list[list[int]] = [[] for _ in embeds]
        for modality in session.adapter.modalities:
            here = call.pictures.get(modality.name)
            if not here:
                continue
            visual = self._placeholders(call, embeds, modality)  # (B, q)
            rows = assign([p.length for p in here], visual.sum(dim=1).tolist())
            call.placed.append(Placed(visual, rows, here, [None] * len(here)))
            for sample, row in zip(samples, rows, strict=True):
                sample.extend(len(pictures) + p for p in row)
            pictures += here
        if not pictures:
            return
        cuts: list[Cut | None] = [None] * len(pictures)
        if session.before is not None:
            distinct = list({tuple(sample): None for sample in samples})  # expanded rows share their pictures
            method, budget = session.before
            cuts = cut_pictures(pictures, distinct, method, budget, session.adapter.projector, session.strict)
        start = 0
        for placed in call.placed:
            placed.cuts = cuts[start : start + len(placed.pictures)]
            start += len(placed.pictures)
        report.keep = keep_maps(pictures, cuts, report.method)
        report.dense_tokens = [picture.count for picture in pictures]
        report.realised_tokens = [p.count if cut is None else cut.realised for p, cut in zip(pictures, cuts, strict=True)]
        report.layer_tokens = [[count] * session.depth for count in report.realised_tokens]

    def _placeholders(self, call: Call, embeds: Tensor, modality: Any) -> Tensor:
        token = self.session.adapter.token_id(modality)
        if call.input_ids is not None:
            return (call.input_ids == token).to(embeds.device)
        table = self.session.adapter.inner.get_input_embeddings()
        row = table(torch.tensor(token, device=call.inputs_embeds.device))
        return (call.inputs_embeds == row).all(dim=-1).to(embeds.device)

    @torch.compiler.disable
    def _cut(self, call: Call, embeds: Tensor) -> Tensor:
        """Drop what the cuts drop; returns the child embeddings (B, N, D)."""
        keep = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        for placed in call.placed:
            keep[placed.visual] = placed.kept_slots().to(keep.device)
            embeds = placed.replace(embeds)
        compaction = Compaction(keep, call.frames[0].fed)
        if compaction.width == 0:
            raise InvariantError(f"attention_mask of shape {tuple(keep.shape)} masks every token; expected 1 for tokens")
        refuse_dead_slots_in_states(call, compaction, self.session.spec)
        call.frames = [frame.cut(compaction, self.session.policy(self.session.before[0])) for frame in call.frames]
        call.compactions.append((0, compaction))
        call.report.sequence = (call.fed, compaction.width)
        call.report.fire("enter")
        return compaction.sequence(embeds)

    @torch.compiler.disable
    def leave(self, call: Call, output: Any) -> Any:
        """Expand the output to the full length and let the cache remember the cut."""
        if not call.compactions and not call.marks:
            return output
        if not hasattr(output, "last_hidden_state"):
            raise UnsupportedError(f"the language model returned a {type(output).__name__}; call the model with return_dict=True")
        output.last_hidden_state = call.expand(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            last = len(output.hidden_states) - 1
            output.hidden_states = tuple(
                call.expand(hidden, None if number == last else number - 1) for number, hidden in enumerate(output.hidden_states)
            )
        cache = cache_in(output)
        cache = call.cache if cache is None else cache
        if cache is not None and held_length(cache) == call.frame(counting_layer(cache)).width:
            # text after the last loss stands 1:1 in all layers, so drafts in it can be cropped away
            static = [frame.valid[:, : frame.width - call.tail_kept] for frame in call.frames]
            groups = [Group(frame.start, held, frame.lost) for frame, held in zip(call.frames, static, strict=True)]
            all_valid = all(bool(group.held.all()) for group in groups)
            state = CacheState(call.seen + call.fed - call.tail_kept, groups, self.session.reference, all_valid, call.marks)
            adopt(cache, state)
        call.report.fire("exit")
        return output


def refuse_dead_slots_in_states(call: Call, compaction: Compaction, spec: str) -> None:
    """Layers with a running state cannot skip dead slots in the middle of a conversation; at its beginning the state is empty."""
    if call.frames[0].past.shape[1] and has_running_states(call.cache) and bool((compaction.count != compaction.width).any()):
        raise UnsupportedError(
            f"{spec!r} keeps {compaction.count.tolist()} tokens in the rows of this batch, and layers of this language model keep a "
            "running state that the filling of shorter rows would change in a later turn; continue the conversations one by one"
        )
