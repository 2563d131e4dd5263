# SPDX-License-Identifier: Apache-2.0
"""The attention slot for methods that scale the outputs of heads by what the picture changes in them.

The text of the prompt is read once without its pictures, aside of the forward; then the prompt runs as it is,
and layer by layer the outputs of the heads are multiplied, before the output projection. No attention is
computed again. The factors are attached to the KV cache and hold for all later tokens.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...core.budget import Budget
from ...core.method import Method
from ...errors import InvariantError, UnsupportedError
from ..attention_call import AttentionCall
from ..attention_tap import tap
from ..sequence.cache import Marks
from ..sequence.compaction import Compaction
from ..sequence.views import SequenceView
from ..state import ForwardState
from . import Attachment, Handle, all_or_none
from .attention import EDITS


class HeadScaleSlot:
    """Scales the heads of one model by one method."""

    in_tower: ClassVar[bool] = False

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        self.attachment, self.budget = attachment, budget
        self.language_model = attachment.adapter.language_model
        self.method = method.prepare(self.language_model)
        self.layers = list(self.method.acts_on(attachment.depth))
        self._text = threading.local()
        attachment.refuse_checkpointing(self.language_model, method, EDITS)

    def hooks(self) -> list[Handle]:
        """A tap on the attention of every chosen layer."""
        found: list[Handle] = []
        with all_or_none(found):
            for index in self.layers:
                layer = self.language_model.layers[index]
                found.append(tap(layer, index, self.method.name, partial(self._scale, index)))
        return found

    def missed(self, state: ForwardState) -> set[int]:
        return set(self.layers) - state.edited if state.placements else set()

    def enter(self, state: ForwardState) -> None:
        """Read the text of a prompt with pictures alone; factors of an earlier turn stay as they are."""
        if state.placements:
            self.attachment.refuse_checkpointing(self.language_model, self.method, EDITS)
        if state.placements and not state.held_marks:
            state.text_heads = self._read_text(state)

    @torch.no_grad()
    def _read_text(self, state: ForwardState) -> dict[int, Tensor]:
        """Per layer (B, H, d), outputs of the heads at the last token of the text without its pictures."""
        view = state.views.at(0)
        if view.held.shape[1]:
            raise UnsupportedError(
                f"{self.method.name} reads the conversation a second time without its pictures, and its "
                f"first {view.held.shape[1]} tokens are in the KV cache only; give all turns in one call"
            )
        text = view.new & ~state.views.follow(state.columns.pictures, 0)  # (B, n)
        text[:, text.shape[1] - state.generated :] = False
        counts = text.sum(dim=1).tolist()  # the one wait
        if min(counts) < 1:
            raise UnsupportedError(
                f"{self.method.name} compares with the prompt without its pictures, and a prompt of this "
                "call holds nothing else; ask something about the picture"
            )
        compaction = Compaction(text, view.new, max(counts))
        real = compaction.valid  # (B, T), the text at the right end
        rows = compaction.sequence(state.embeds)
        places = (real.cumsum(dim=1) - 1).clamp_min(0)
        types = None if view.types is None else view.types.cut(compaction)
        alone = SequenceView(0, real[:, :0], real, places, None, types=types)
        config, on_cpu = self.language_model.config, rows.device.type == "cpu"
        # whether a 2-D mask masks anything would be asked of a device
        mask = alone.mask_of_all(config, rows, None) if on_cpu else alone.masks(config, rows, None)
        state.aside, self._text.heads = True, {}
        try:
            # not the module itself: its hooks are for the prompt
            self.language_model.forward(
                inputs_embeds=rows, attention_mask=mask, position_ids=places, use_cache=False
            )
            found: dict[int, Tensor] = self._text.heads
        finally:
            state.aside, self._text.heads = False, None
        if missing := set(self.layers) - set(found):
            raise InvariantError(
                f"{self.method.name} scales heads of layers {sorted(missing)}, which ran without its hooks; "
                "was a part of the model compiled after attaching? Detach, and attach again"
            )
        return found

    @torch.compiler.disable
    def _scale(self, index: int, attended: AttentionCall, output: Tensor) -> Tensor | None:
        """The output (B, n, H, d) of a layer's attention with its heads scaled."""
        heads: dict[int, Tensor] | None = getattr(self._text, "heads", None)
        if heads is not None:
            heads[index] = output[:, -1].float()
            return None
        state = self.attachment.state()
        if state is None or not state.active:
            return None
        held = state.held_marks.get(index)
        if held is None and not state.placements:
            return None  # a conversation without pictures
        state.edited.add(index)
        if held is None or held.factors is None:
            held = self._found(state, index, output)
        if state.placements:
            state.marks[index] = held
        if held.factors is None:
            return None
        return output * held.factors[:, None, :, None].to(output.device, output.dtype)

    @torch.no_grad()
    def _found(self, state: ForwardState, index: int, output: Tensor) -> Marks:
        """The factors of a prompt, from its last token; rows without a picture are left alone."""
        new = state.views.at(index).new.to(output.device)
        new = new[:, : new.shape[1] - state.generated]
        place = torch.arange(1, new.shape[1] + 1, device=new.device)
        last = (new * place).argmax(dim=1)  # (B,)
        every = torch.arange(output.shape[0], device=output.device)
        with_image, without = output[every, last].float(), state.text_heads[index].to(output.device)
        factors = self.method.head_scales(with_image, without, index)  # (B, H)
        factors = torch.where(state.columns.with_pictures.to(output.device), factors, 1.0)
        none = torch.zeros(output.shape[0], 0, dtype=torch.bool, device=output.device)
        return Marks(none, none, factors)
