# SPDX-License-Identifier: Apache-2.0
"""Random models in the shape of LLaVA-1.5, and one prompt for them: what the timing scripts of this folder
run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vlmprune.errors import InvariantError
from vlmprune.speed.free import FreeSide
from vlmprune.speed.shapes import random_model

IMAGE_ID = 3
TEXT = (35, 25)  # text tokens before and after the image, as in the LLaVA-1.5 prompt with a short question


@dataclass(frozen=True)
class Size:
    """Shape of a model; patches are 14 x 14 pixels."""

    image: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int

    @property
    def tokens(self) -> int:
        return (self.image // 14) ** 2


SIZES = {
    "small": Size(336, 1024, 4096, 24, hidden=1024, intermediate=2752, layers=8, heads=16, vocab=32064),
    "7b": Size(336, 1024, 4096, 24, hidden=4096, intermediate=11008, layers=32, heads=32, vocab=32064),
    "tiny": Size(56, 128, 256, 3, hidden=64, intermediate=128, layers=2, heads=4, vocab=256),
}


def build(size: Size, device: str, dtype: torch.dtype, *, shallow: bool = False) -> nn.Module:
    """A random LLaVA; ``shallow`` has all that capture watches (attention of one block, projector) and little
    else.
    """
    vision = transformers.CLIPVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=64 if shallow else size.vision_intermediate,
        num_hidden_layers=1 if shallow else size.vision_layers,
        num_attention_heads=size.vision_hidden // 64,
        image_size=size.image,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=1 if shallow else size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocab,
        max_position_embeddings=4096,
    )
    layer = -1 if shallow else -2
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, vision_feature_layer=layer
    )
    return random_model(config, device, dtype)


class Prompt:
    """A prompt with one picture for one model, and the calls that are timed."""

    def __init__(self, model: nn.Module, size: Size) -> None:
        self.model = model
        weight = model.lm_head.weight
        random = torch.Generator().manual_seed(1)
        before, after = (
            torch.randint(IMAGE_ID + 1, size.vocab, (count,), generator=random) for count in TEXT
        )
        ids = torch.cat([before, torch.full((size.tokens,), IMAGE_ID), after])[None].to(weight.device)
        self.ids = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.pixels = torch.randn(1, 3, size.image, size.image, generator=random).to(
            weight.device, weight.dtype
        )
        self.encoded: Any = None
        self.free: FreeSide

    def prepare(self, session: Any) -> int:
        """Encode and run once attached, and set up the free side on what was kept; gives the visual tokens
        kept.
        """

        def call() -> Tensor:
            self.encoded = self.encode()
            return self.merged()

        self.free, report = FreeSide(session, call), session.last
        tokens, text = sum(report.dense_tokens), sum(TEXT)
        kept = sum(report.realised_tokens) or tokens
        if (
            "before_lm" in session.slots
            and report.keep
            and report.sequence != (tokens + text, kept + text)
            and kept < tokens
        ):
            raise InvariantError(
                f"{session.spec} made a sequence of {report.sequence}; expected {tokens + text, kept + text}"
            )
        return kept

    def difference(self) -> float:
        """How far apart the logits of the attached and of the free side are."""
        return (self.given() - self.free.logits).abs().max().item()

    def encode(self) -> Any:
        return self.model.model.get_image_features(pixel_values=self.pixels, return_dict=True)

    def first_token(self, **inputs: Any) -> Tensor:
        logits = self.model(**inputs, logits_to_keep=1, use_cache=True).logits[:, -1]
        logits.argmax(dim=-1).item()  # waits for the device
        return logits

    def merged(self) -> Tensor:
        return self.first_token(**self.ids, mm_encoder_outputs={"image": self.encoded})

    def given(self) -> Tensor:
        return self.free.first_token()

    def from_pixels(self) -> Tensor:
        return self.first_token(**self.ids, pixel_values=self.pixels)

    def given_from_pixels(self) -> Tensor:
        self.encode()
        return self.given()
