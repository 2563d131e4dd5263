# SPDX-License-Identifier: Apache-2.0
"""Configs of the tiny models: four layers everywhere, vision towers of width 32, language models of width
64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers.utils import is_timm_available

from ..errors import UnsupportedError
from ..models import too_old
from .backbones import BACKBONES as TEXTS
from .processors import (
    BOS_ID,
    EOS_ID,
    GRID,
    IMAGE_ID,
    IMAGE_SIZE,
    OWN_TOWER,
    PAD_ID,
    PATCH_SIZE,
    PINPOINTS,
    VIDEO_ID,
    VOCABULARY,
    family_prefix,
    known,
)
from .tiny_pictures import MERGE

_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16}
_KINDS = ["sliding_attention", "full_attention"]
# the languages of families that attend both ways; their windows are wider than any test unless told otherwise
_GEMMA_TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3Text", _GEMMA),
    "gemma3_sliding": ("Gemma3Text", {**_GEMMA, "sliding_window": 8}),
}
_TEXTS_OF = {"paligemma": ("gemma", "gemma2"), "gemma3": ("gemma3", "gemma3_sliding")}


def text_of(family: str, text: str | None) -> str:
    """Check a language model, or give the one that the released models of the family have."""
    if family in _QWEN:
        return known("text", text or "own", ("own",))
    if family in _TEXTS_OF:
        return known("text", text or _TEXTS_OF[family][0], _TEXTS_OF[family])
    return known(
        "text",
        text or ("qwen2" if family in ("llava_onevision", "internvl", "fast_vlm") else "llama"),
        tuple(TEXTS),
    )


def tiny_config(family: str, tower: str, text: str, layers: int, overrides: dict[str, Any]) -> Any:
    """The config of a whole model."""
    config = model_class(family, "Config")
    if family in _QWEN:
        return config(**_qwen(family, layers, overrides))
    vision = (
        _OWN_VISION[family]()
        if family in OWN_TOWER
        else _vision_config(tower, MERGE if family == "gemma3" else 1)
    )
    return config(
        vision_config=vision,
        text_config=_text_config(text, layers, overrides),
        **_family_fields(family, tower),
    )


def missing(family: str) -> str | None:
    """Why a family has no tiny model here: this transformers does not know it, or timm is not installed."""
    name = family_prefix(family) + "ForConditionalGeneration"
    if not hasattr(transformers, name):
        return f"transformers {transformers.__version__} has no {name}; install a newer one"
    if too_old(family, getattr(transformers, name)):
        return f"{family} needs a newer transformers than {transformers.__version__}; install the newest"
    if family == "fast_vlm" and not is_timm_available():
        return "fast_vlm needs timm and torchvision: pip install timm torchvision"
    return None


def model_class(family: str, suffix: str = "ForConditionalGeneration") -> Any:
    """A class of a family, or a clear error where it cannot be had."""
    reason = missing(family)
    if reason is not None:
        raise UnsupportedError(reason)
    return getattr(transformers, family_prefix(family) + suffix)


def _vision_config(tower: str, merge: int) -> Any:
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE * merge,
        "patch_size": PATCH_SIZE,
    }
    if tower == "siglip":
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
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": None,
        "pad_token_id": PAD_ID,
    }


def _text_config(text: str, layers: int, overrides: dict[str, Any]) -> Any:
    prefix, special = (TEXTS | _GEMMA_TEXTS)[text]
    if prefix in ("Gemma2", "Gemma3Text"):
        special = {**special, "layer_types": [_KINDS[i % 2] for i in range(layers)]}
    return getattr(transformers, prefix + "Config")(**text_fields(layers) | special | overrides)


def _family_fields(family: str, tower: str) -> dict[str, Any]:
    if family in ("idefics3", "smolvlm"):
        return {"image_token_id": IMAGE_ID, "scale_factor": MERGE, "pad_token_id": PAD_ID}
    if family == "fast_vlm":
        return {"image_token_index": IMAGE_ID, "image_seq_length": GRID**2}
    if family == "paligemma":
        return {"image_token_index": IMAGE_ID, "projection_dim": 64, "tie_word_embeddings": False}
    if family == "gemma3":
        return {"image_token_index": IMAGE_ID, "mm_tokens_per_image": GRID**2, "tie_word_embeddings": False}
    if family == "internvl":
        return {"image_token_id": IMAGE_ID, "downsample_ratio": 1 / MERGE}
    fields: dict[str, Any] = {"image_token_index": IMAGE_ID}
    if family == "vipllava":
        plural = "vision_feature_layers"  # what older transformers call it
        names = inspect.signature(transformers.VipLlavaConfig).parameters
        return fields | {plural if plural in names else plural[:-1]: [-2, -3, 1]}
    fields["vision_feature_layer"] = -1 if family == "llava_onevision" else -2
    fields["vision_feature_select_strategy"] = "default" if tower == "clip" else "full"
    if family in PINPOINTS:
        fields["image_grid_pinpoints"] = PINPOINTS[family]
    if family in ("llava_onevision", "llava_next_video", "video_llava"):
        fields["video_token_index"] = VIDEO_ID
    if family == "llava_onevision":
        fields["vision_aspect_ratio"] = "anyres_max_9"
    return fields


def _internvl_vision() -> Any:
    side = IMAGE_SIZE * MERGE
    return transformers.InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=[side, side],
        patch_size=[PATCH_SIZE, PATCH_SIZE],
        use_qk_norm=True,
        norm_type="rms_norm",
    )


def _idefics_vision(prefix: str) -> Any:
    return getattr(transformers, prefix + "VisionConfig")(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE * MERGE,
        patch_size=PATCH_SIZE,
    )


def _fastvit() -> Any:
    args = {
        "layers": [1, 1, 1, 2],
        "embed_dims": [8, 8, 16, 64],
        "inference_mode": True,
    }  # two heads, 32 pixels to a token
    return transformers.TimmWrapperConfig(
        architecture="fastvit_mci0", model_args=args, hidden_size=128, do_pooling=True
    )


_OWN_VISION: dict[str, Callable[[], Any]] = {
    "internvl": _internvl_vision,
    "fast_vlm": _fastvit,
    "idefics3": lambda: _idefics_vision("Idefics3"),
    "smolvlm": lambda: _idefics_vision("SmolVLM"),
}

# what differs between the towers; every second block of 2.5 attends to the whole picture, the others inside 2
# x 2 tokens
_QWEN: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "window_size": 4 * PATCH_SIZE,
        "fullatt_block_indexes": [1, 3],
    },
    "qwen3_vl": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0, 1, 2],
    },
}


def _qwen(family: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    vision = {
        "depth": 4,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    key = "rope_parameters" if hasattr(transformers.LlamaConfig(), "rope_parameters") else "rope_scaling"
    text = text_fields(layers) | {key: rope} | overrides
    if family == "qwen3_vl":
        text["head_dim"] = 16
        rope["mrope_interleaved"] = True
    return {
        "vision_config": vision | _QWEN[family],
        "text_config": text,
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": BOS_ID,
        "vision_end_token_id": EOS_ID,
    }
