# SPDX-License-Identifier: Apache-2.0
"""``Family``: all facts about one family of tiny models, and the parts of configs that families share.

Four layers everywhere, vision towers of width 32, language models of width 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

from ...errors import UnsupportedError
from ..backbones import BACKBONES as TEXTS
from .layouts import Layout
from .shared import BOS_ID, IMAGE_SIZE, PAD_ID, PATCH_SIZE, VOCABULARY, known

_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16}
# windows and full attention take turns
_KINDS = ["sliding_attention", "full_attention"]
# layers with a running state before and behind those with attention
_STATES = ["conv", "full_attention", "full_attention", "conv"]
# the languages of families that attend both ways; their windows are wider than any test unless told otherwise
GEMMA_TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3Text", _GEMMA),
    "gemma3_sliding": ("Gemma3Text", {**_GEMMA, "sliding_window": 8}),
}
_GEMMA4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,  # no embeddings per layer; gemma4_small has them
    "sliding_window": 64,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}
# embeddings per layer, there for all 261 ids
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 261}
# languages that one family alone has
OWN_TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hyperclovax": ("HyperCLOVAX", {"attention_multiplier": 0.3}),
    "lfm3": ("Lfm3", {"head_dim": 16, "sliding_window": None}),
    "aria": ("AriaText", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "gemma4": ("Gemma4Text", _GEMMA4 | {"use_bidirectional_attention": "vision"}),
    # last layers share keys and values
    "gemma4_small": ("Gemma4Text", _GEMMA4 | _PER_LAYER | {"num_kv_shared_layers": 2}),
    # as no released model is: every layer has keys of its own, so that methods can cut between layers
    "gemma4_unshared": ("Gemma4Text", _GEMMA4 | _PER_LAYER),
}
TOWERS = ("clip", "siglip")
OWN = ("own",)  # where a family has a tower, or a language model, of its own

# tower, text, decoder layers, fields of the text config
ConfigOf = Callable[[str, str, int, dict[str, Any]], dict[str, Any]]
Build = Callable[[str, str, int, dict[str, Any]], Any]


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        name: its model type.
        prefix: of the class names in transformers.
        model: the class of the model, where it is not the prefix with ...ForConditionalGeneration.
        build: makes the model from the same arguments, where its class is none of transformers.
        config_prefix: of the class of its config, where that has another one.
        layout: what it makes of pictures.
        variants: (tower, text) that the shared tests build; the first is how the family was released.
        config: (tower, text, layers, fields of the text config) to the fields of its config.
        processor: tower to the arguments of its processor, None where there is no tiny one.
        processor_prefix: of the class of its processor, where that is of another family.
        towers, texts: that it may have.
        refused: towers that cannot be, and why.
        reads_tower: something can be read of its tower.
        hybrid: layers of its language models keep a running state, which draft tokens cannot be taken out of.
    """

    name: str
    prefix: str
    layout: Layout
    variants: tuple[tuple[str, str], ...]
    config: ConfigOf
    processor: Callable[[str], dict[str, Any]] | None = None
    processor_prefix: str = ""
    config_prefix: str = ""
    model: str = ""
    build: Build | None = None
    towers: tuple[str, ...] = TOWERS
    texts: tuple[str, ...] = tuple(TEXTS)
    refused: dict[str, str] = field(default_factory=dict)
    hybrid: bool = False
    reads_tower: bool = True

    def tower(self, tower: str | None) -> str:
        """Check a vision tower, or give the one that the released models have."""
        tower = known("tower", tower or self.variants[0][0], self.towers)
        if tower in self.refused:
            raise UnsupportedError(f"{self.name} with a {tower} tower: {self.refused[tower]}")
        return tower

    def text(self, text: str | None) -> str:
        """Check a language model, or give the one that the released models have."""
        return known("text", text or self.variants[0][1], self.texts)


VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def vision_config(tower: str, merge: int = 1) -> Any:
    """A CLIP or SigLIP tower."""
    fields: dict[str, Any] = {**VISION, "image_size": IMAGE_SIZE * merge, "patch_size": PATCH_SIZE}
    if tower == "siglip":
        # without the head that pools, which no language model reads
        return transformers.SiglipVisionConfig(**fields, vision_use_head=False)
    return transformers.CLIPVisionConfig(**fields)


def text_fields(layers: int) -> dict[str, Any]:
    """What all language models share."""
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # fewer than heads: two queries share a key
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": None,  # generation never ends early
        "pad_token_id": PAD_ID,
    }


def text_config(text: str, layers: int, overrides: dict[str, Any]) -> Any:
    """A language model by its name."""
    prefix, special = (TEXTS | GEMMA_TEXTS | OWN_TEXTS)[text]
    if prefix in ("Gemma2", "Gemma3Text", "Gemma4Text"):
        # by default Gemma 3 attends fully in every sixth layer only, and there are four
        special = {**special, "layer_types": [_KINDS[i % 2] for i in range(layers)]}
    if prefix == "Lfm3":
        special = {**special, "layer_types": [_STATES[i % 4] for i in range(layers)]}
    # later fields win: what a test asks for comes last
    return getattr(transformers, prefix + "Config")(**text_fields(layers) | special | overrides)
