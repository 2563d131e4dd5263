# SPDX-License-Identifier: Apache-2.0
"""The small LLaVA of the benchmark, untrained: real HF classes, a word-level tokenizer, a chat template."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from .scene import CANVAS
from .vocabulary import SPECIAL, WORDS

PATCH = 12
ROPE_THETA = 1e6
GRID = CANVAS // PATCH  # patches along each side
PAD, BOS, EOS, UNKNOWN, IMAGE = (WORDS.index(word) for word in SPECIAL)
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Pictures come in the first turn; a content part is separated from the next by one space.
CHAT_TEMPLATE = (
    "<s> {% for message in messages %}{{ message['role'].upper() + ': ' }}{% if message['content'] is string "
    "%}{{ message['content'] + ' ' }}{% else %}{% for part in message['content'] %}{{ ('<image>' if "
    "part['type'] == 'image' else part['text']) + ' ' }}{% endfor %}{% endif %}{% if message['role'] == "
    "'assistant' %}{{ '</s> ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% "
    "endif %}"
)


def build_model(seed: int = 0) -> Any:
    """An untrained LlavaForConditionalGeneration; the global random state is neither read nor changed."""
    vision = transformers.CLIPVisionConfig(
        **VISION, image_size=CANVAS, patch_size=PATCH, hidden_act="quick_gelu"
    )
    text = transformers.LlamaConfig(
        **TEXT,
        vocab_size=len(WORDS),
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **_rope(),
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    )
    return model.eval()


def _rope() -> dict[str, Any]:
    """Angles so slow that contents compare alike near and far; the field's name depends on transformers."""
    if "rope_parameters" in inspect.signature(transformers.LlamaConfig).parameters:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}}
    return {"rope_theta": ROPE_THETA}


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word; upper case and marks that stick to a word are understood."""
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=SPECIAL[UNKNOWN])
    )
    marks = [normalizers.Replace(mark, f" {mark} ") for mark in ("?", ",")]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *marks])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNKNOWN],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_processor() -> Any:
    """Its LlavaProcessor: pictures are squared to CANVAS pixels; works without torchvision."""
    # where a class named ...Pil exists, the plain name needs torchvision; elsewhere that is the Pillow one
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    side = {"height": CANVAS, "width": CANVAS}
    return transformers.LlavaProcessor(
        image_processor=kind(size=side, crop_size=side),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
