# SPDX-License-Identifier: Apache-2.0
"""A bare decoder in the shape of a vision-language model: its pictures are embeddings that the caller gives.

For recorded answers of decoders without a vision tower, and for tests of cuts inside the language model on
sequences written by hand.

    model = given_decoder(config, state)
    with attach_to_decoder(model, FastV(), keep=12) as run:
        output = model.read(embeds, [(5, 45)])
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vlmprune.core.budget import Budget
from vlmprune.core.method import Method, SlotName
from vlmprune.hooks.adapter import Modality
from vlmprune.hooks.session import Session
from vlmprune.hooks.vision.pictures import Picture

IMAGE_ID = 1  # marks the columns of pictures; no other column may have it


class GivenPictures(nn.Module):
    """A decoder that reads embeddings; the columns whose id is ``IMAGE_ID`` are those of its pictures, in
    order.
    """

    def __init__(self, language_model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.language_model, self.lm_head = language_model, head

    def get_image_features(self, pixel_values: list[Tensor]) -> Any:
        """Nothing to encode: (n, D) of every picture as given."""
        return SimpleNamespace(pooler_output=pixel_values)

    def forward(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor,
        pixel_values: list[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Any:
        if pixel_values is not None:
            self.get_image_features(pixel_values=pixel_values)
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=True,
        )
        return SimpleNamespace(
            logits=self.lm_head(output.last_hidden_state), past_key_values=output.past_key_values
        )

    def read(self, embeds: Tensor, spans: list[tuple[int, int]], **options: Any) -> Any:
        """Forward of a prompt (1, L, D) with a picture in every span (first column, end)."""
        ids = torch.zeros(1, embeds.shape[1], dtype=torch.long)
        for first, end in spans:
            ids[0, first:end] = IMAGE_ID
        return self(ids, embeds, [embeds[0, first:end] for first, end in spans] or None, **options)

    def generate(self) -> None:
        """There is no tokenizer to generate for."""
        raise NotImplementedError

    def step(self, embed: Tensor, cache: Any) -> Any:
        """Forward of one more token (1, 1, D)."""
        return self(torch.zeros(1, 1, dtype=torch.long), embed, past_key_values=cache)


class _Nothing:
    """A capture for a model without a vision tower."""

    def running(self) -> None:
        pass

    def install(self) -> None:
        pass

    def remove(self) -> None:
        pass

    def recording(self, checks: Any) -> Any:
        return nullcontext(SimpleNamespace(take=dict, hosts=None))


class _Adapter:
    modalities: ClassVar[tuple[Modality, ...]] = (
        Modality("image", "get_image_features", "pixel_values", ""),
    )
    projector = staticmethod(lambda rows: rows)
    positions: ClassVar[tuple[str, ...]] = ("compact", "original")
    deepstack = text_type = added = None
    numbers_padding = False
    aligned: ClassVar[tuple[str, ...]] = ()
    beside: ClassVar[tuple[str, ...]] = ()
    closed: ClassVar[dict[SlotName, str]] = {}
    compresses: ClassVar[tuple[str, ...]] = ()
    checks_features, note = False, ""

    def __init__(self, model: GivenPictures) -> None:
        self.model = self.inner = model
        self.language_model = model.language_model
        self.depth = len(model.language_model.layers)

    def capture(self, needs: Any) -> _Nothing:
        return _Nothing()

    def check(self, arguments: Any, modality: Modality) -> None:
        pass

    def token_id(self, modality: Modality) -> int:
        return IMAGE_ID

    def pictures(
        self, modality: Modality, output: Any, arguments: Any, found: Any, checks: Any
    ) -> list[Picture]:
        return [Picture(rows, ((1, rows.shape[0]),)) for rows in output.pooler_output]


def given_decoder(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> GivenPictures:
    """A Llama with the given config and weights, in float32."""
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return GivenPictures(model.model, model.lm_head).eval()


def attach_to_decoder(
    model: GivenPictures, method: Method, keep: int | float | None = None, positions: str | None = None
) -> Session:
    """A session of the real hooks on a bare decoder; a context manager."""
    budget = None if keep is None else Budget(keep)
    return Session(_Adapter(model), [(method, budget)], method.name, positions=positions)
