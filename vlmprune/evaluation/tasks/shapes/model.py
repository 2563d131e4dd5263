# SPDX-License-Identifier: Apache-2.0
"""The small LLaVA of the benchmark, untrained: real HF classes, a word-level tokenizer, a chat template."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from .scene import CANVAS
from .vocabulary import SPECIAL, WORDS

PATCH = 12  # pixels of a side, as wide as a character of a sign
ROPE_THETA = 1e6  # angles so slow that contents compare alike near and far
GRID = CANVAS // PATCH  # patches along each side
# ids are places in WORDS; other lists of words begin with SPECIAL as well
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
    return build_llava(VISION, TEXT, WORDS, CANVAS, PATCH, ROPE_THETA, seed)


def build_llava(
    vision: dict[str, Any],
    text: dict[str, Any],
    words: Sequence[str],
    canvas: int,
    patch: int,
    rope_theta: float,
    seed: int = 0,
) -> Any:
    """The same with other sizes and words. ``words`` begin with ``SPECIAL``; pictures have ``canvas`` pixels
    on each side.
    """
    vision_config = transformers.CLIPVisionConfig(
        **vision, image_size=canvas, patch_size=patch, hidden_act="quick_gelu"
    )
    text_config = transformers.LlamaConfig(
        **text,
        vocab_size=len(words),
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **_rope(rope_theta),
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = transformers.LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(canvas // patch) ** 2,
        tie_word_embeddings=True,
    )
    # the constructor draws weights: seeded inside, and the global state is put back
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    )
    return model.eval()


def _rope(theta: float) -> dict[str, Any]:
    """Rotary angles of base ``theta``; the field's name depends on transformers."""
    if "rope_parameters" in inspect.signature(transformers.LlamaConfig).parameters:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    return {"rope_theta": theta}


def build_tokenizer(words: Sequence[str] = WORDS, **names: str) -> transformers.PreTrainedTokenizerFast:
    """One token per word; upper case and marks that stick to a word are understood.

    ``names`` gives special tokens the attributes that a processor reads, such as ``image_token="<image>"``.
    """
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[UNKNOWN])
    )
    # "sign?" becomes "sign ?"
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
        padding_side="left",  # generate goes on from the last column
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **({"extra_special_tokens": names} if names else {}),
    )


def build_processor(words: Sequence[str] = WORDS, canvas: int = CANVAS, patch: int = PATCH) -> Any:
    """Its LlavaProcessor: pictures are squared to ``canvas`` pixels; works without torchvision."""
    # where a class named ...Pil exists, the plain name needs torchvision; elsewhere that is the Pillow one
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    side = {"height": canvas, "width": canvas}
    return transformers.LlavaProcessor(
        image_processor=kind(size=side, crop_size=side),
        tokenizer=build_tokenizer(words),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # [CLS], which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )
