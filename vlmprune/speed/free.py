# SPDX-License-Identifier: Apache-2.0
"""The ideal baseline: the same model given only the tokens that the method keeps.

One call is watched while the method is attached: what the language model is given after a cut before it, and
which rows stay where it is cut between its layers. Replaying that on the bare model costs neither scoring nor
selecting, neither gathering nor merging text and picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import InvariantError, UnsupportedError
from ..hooks.sequence.cache import cache_name
from ..kernels import dispatch


class FreeSide:
    """The language model on what one attached call left of its input.

    Args:
        session: not attached yet; it is while ``call`` runs once here.
        call: runs the model to the logits (B, V) of the first token.

    Attributes:
        logits: what ``call`` returned.
        embeds, positions, mask: (B, L, D), position ids and, unless it is causal, the mask that the language
            model was given.
        cuts: layer -> (B, n) rows of its input that stay, and their position ids.
    """

    def __init__(self, session: Any, call: Callable[[], Tensor]) -> None:
        self.session, self.model = session, session.adapter.model
        self.lm: Any = session.adapter.language_model  # of transformers: has layers, norm, rotary_emb
        self.cuts: dict[int, tuple[Tensor, Tensor]] = {}
        given: dict[str, Any] = {}
        self._given = given
        with session, ExitStack() as stack:
            watch = self.lm.register_forward_pre_hook(
                lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
            )
            # on a stack, so that hooks also go where the call fails
            stack.callback(watch.remove)
            for index, layer in enumerate(self.lm.layers):
                stack.callback(layer.register_forward_pre_hook(partial(self._note, index)).remove)
            self.logits = call()
        if "inputs_embeds" not in given:
            raise InvariantError(
                f"{type(self.lm).__name__} was not given inputs_embeds while {session.spec!r} was attached"
            )
        self.embeds, self.positions = given["inputs_embeds"], given.get("position_ids")
        typed = session.adapter.text_type is not None
        if typed and self.cuts:
            raise UnsupportedError(
                f"cuts inside {session.adapter.model_type}, whose tokens attend both ways, cannot be "
                "replayed for free; measure a method that cuts before the language model, e.g. 'divprune@64'"
            )
        self.mask = given.get("attention_mask") if typed else None  # others are causal, and need none
        self._given = {}

    def _note(self, index: int, module: nn.Module, args: tuple) -> None:
        state = self.session.state
        if state is None:  # a pass over the text alone, which some methods add: nothing is cut there
            return
        for start, compaction in state.views.cuts:
            # a cut before the language model is listed at layer 0 too; its parent was longer than the input
            if start == index and not (
                start == 0 and compaction.length > self._given["inputs_embeds"].shape[1]
            ):
                self.cuts[index] = (
                    compaction.index.long().clone(),
                    state.views.at(index).position_ids.clone(),
                )

    def first_token(self) -> Tensor:
        """Logits (B, V) of the first token, which is on the host then; rows of equal length, no padding."""
        # the language model runs itself, unless something is cut between its layers
        hidden = self._layers() if self.cuts else self._whole()
        logits = self.model.get_output_embeddings()(hidden[:, -1])
        logits.argmax(dim=-1).tolist()  # waits for the device
        return logits

    def _whole(self) -> Tensor:
        given = {"inputs_embeds": self.embeds, "position_ids": self.positions, "attention_mask": self.mask}
        return self.lm(**given, use_cache=True).last_hidden_state

    def _layers(self) -> Tensor:
        """A plain loop over the layers, whose cuts are given; without a mask attention is causal."""
        hidden, positions = self.embeds, self.positions
        # new in every call and filled by it: that is a part of a real prefill
        cache = {
            cache_name(inspect.signature(self.lm.layers[0].forward).parameters): DynamicCache(
                config=self.lm.config
            )
        }
        if positions is None:
            # what the model does when it is given none
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        angles, mask = self.lm.rotary_emb(hidden, positions), self._mask(hidden)
        for index, layer in enumerate(self.lm.layers):
            if index in self.cuts:
                rows, positions = self.cuts[index]
                (hidden,) = dispatch.gather_rows([hidden], rows)
                # both were made for the longer sequence
                angles, mask = self.lm.rotary_emb(hidden, positions), self._mask(hidden)
            # a layer returns a tuple or the tensor alone, by version
            output = layer(hidden, attention_mask=mask, position_embeddings=angles, use_cache=True, **cache)
            hidden = output[0] if isinstance(output, tuple) else output
        return self.lm.norm(hidden)

    def _mask(self, hidden: Tensor) -> Tensor | None:
        """Eager attention knows no causality of its own."""
        if self.lm.config._attn_implementation != "eager":
            return None
        length = hidden.shape[1]
        lowest = torch.finfo(hidden.dtype).min
        return torch.full((1, 1, length, length), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)
