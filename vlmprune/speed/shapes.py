# SPDX-License-Identifier: Apache-2.0
"""Random models in the shape of released ones, with inputs: speed depends on shapes, not on what the weights
are.

Nothing is downloaded. Where a real shape is too large for the machine, ``scale`` divides the width (hidden
and feed-forward size, heads) and the depth of both the vision tower and the decoder by the same number. The
size of a head, the vocabulary and all token counts stay real, and so does, nearly, the share of the tower in
the whole; what a scaled shape takes is no estimate of what the real one takes, and its speed-ups are a little
too small, since attention and launches weigh more in a narrow model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..checks import one_of
from ..errors import SpecError, UnsupportedError
from ..models import families

_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 8192,
}
_QWEN_VISION = {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "depth": 32,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 3584,
}
_QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    # pairs of a head that turn by time, height and width
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
# what a scale divides; all other fields stay real
_SCALED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "depth",
    "num_heads",
    "out_hidden_size",
)


@dataclass(frozen=True)
class Shape:
    """A model to build.

    Args:
        like: the checkpoint whose config these numbers are.
        family: model type as in HF configs.
        image: (height, width) of the one picture of a prompt.
        ids: image placeholder, and what stands before and after a picture, if anything.
    """

    like: str
    family: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    fields: Mapping[str, Any]
    image: tuple[int, int]
    around: tuple[int, ...] = ()


# (height, width) in pixels of what the tiles of a picture can form
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# the last layer but one, without [CLS]
_LLAVA = {"image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
SHAPES = {
    "llava-1.5-7b": Shape("llava-hf/llava-1.5-7b-hf", "llava", _CLIP_L, _LLAMA_7B, _LLAVA, (336, 336)),
    "llava-next-7b": Shape(
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava_next",
        _CLIP_L,
        _LLAMA_7B,
        {**_LLAVA, "image_grid_pinpoints": _PINPOINTS},
        (672, 672),
    ),
    "qwen2.5-vl-7b": Shape(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "qwen2_5_vl",
        _QWEN_VISION,
        _QWEN_7B,
        {"image_token_id": 151655, "vision_start_token_id": 151652},
        (896, 896),
        # <|vision_start|>, <|vision_end|>
        (151652, 151653),
    ),
}
_CONFIGS = {"llava": "LlavaConfig", "llava_next": "LlavaNextConfig", "qwen2_5_vl": "Qwen2_5_VLConfig"}


def unsupported() -> dict[str, str]:
    """Shapes whose family has no adapter here, with the reason."""
    return {
        name: f"model type {shape.family!r} has no adapter; families with one: {families()}"
        for name, shape in SHAPES.items()
        if shape.family not in families()
    }


def config_of(name: str, scale: int = 1) -> Any:
    """HF config of a shape, width and depth divided by ``scale``."""
    one_of("shape", name, tuple(SHAPES))
    shape = SHAPES[name]
    vision, text = (_divided(part, scale, name) for part in (shape.vision, shape.text))
    if "fullatt_block_indexes" in vision:  # the last of every quarter of the tower
        quarter = vision["depth"] // 4
        vision["fullatt_block_indexes"] = [quarter * (i + 1) - 1 for i in range(4)]
    # this config makes its nested ones of dicts itself
    if shape.family == "qwen2_5_vl":
        return transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **shape.fields)
    make = getattr(transformers, _CONFIGS[shape.family])
    return make(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**text),
        **shape.fields,
    )


def build(name: str, device: str, dtype: torch.dtype, scale: int = 1) -> nn.Module:
    """A random model of a shape; families without an adapter are refused before anything is built."""
    one_of("shape", name, tuple(SHAPES))
    if name in unsupported():
        raise UnsupportedError(f"{name}: {unsupported()[name]}")
    return random_model(config_of(name, scale), device, dtype)


@torch.inference_mode(False)
def random_model(config: Any, device: str, dtype: torch.dtype) -> nn.Module:
    """A model with random weights, drawn where and in the precision in which they stay, in eval mode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # nothing of full size is ever made elsewhere or in float32: a 7B model might not fit twice
        with torch.random.fork_rng(), torch.device(device):
            # within the fork: random numbers of the caller go on as if none was drawn here
            torch.manual_seed(0)
            model = transformers.AutoModelForImageTextToText.from_config(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id = 0
    return model.to(device, dtype).eval()


def inputs_of(name: str, model: Any, batch: int = 1, text: int = 60) -> dict[str, Tensor]:
    """A batch of equal prompts: one picture of random pixels, with ``text`` text tokens around it."""
    # drawn on the CPU, so that every device gets the same
    random = torch.Generator().manual_seed(1)
    return prompt_of(name, model, _pixels(SHAPES[name], model.config, batch, random), batch, text)


def prompt_of(name: str, model: Any, given: Mapping[str, Tensor], batch: int, text: int) -> dict[str, Tensor]:
    """The same about given pixels, on the device and in the dtype of the model."""
    shape, weight = SHAPES[name], model.get_input_embeddings().weight
    random = torch.Generator().manual_seed(1)
    pixels = {key: value.to(weight.device) for key, value in given.items()}
    pixels["pixel_values"] = pixels["pixel_values"].to(weight.dtype)
    # as in the prompt of LLaVA-1.5: system text before the picture, a short question behind it
    first = 3 * text // 5
    # no special tokens of the vocabularies here: those come before 100 or from 32000 on
    before, after = (torch.randint(100, 30000, (count,), generator=random) for count in (first, text - first))
    slots = _placeholders(shape, model.config, given.get("image_grid_thw"))
    image = torch.full((slots,), model.config.image_token_id)
    start, end = (torch.tensor(shape.around[i : i + 1], dtype=torch.long) for i in (0, 1))
    ids = (
        torch.cat([before, start, image, end, after]).to(weight.device).expand(batch, -1).contiguous()
    )  # (B, L)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    # 0 for text, 1 for pictures: M-RoPE counts positions by them
    if shape.family == "qwen2_5_vl":
        made["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    return made


def _pixels(shape: Shape, config: Any, batch: int, random: torch.Generator) -> dict[str, Tensor]:
    height, width = shape.image
    vision = config.vision_config
    if shape.family == "qwen2_5_vl":
        # patches, of which spatial_merge_size squared make one token
        rows, cols = height // vision.patch_size, width // vision.patch_size
        # a patch is one flat row that holds it twice in time, as the processor packs a still picture
        flat = 3 * vision.temporal_patch_size * vision.patch_size**2
        values = torch.randn(batch * rows * cols, flat, generator=random)
        return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, rows, cols]] * batch)}
    side = vision.image_size
    if shape.family == "llava":
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=random)}
    tiles = 1 + (height // side) * (width // side)  # the whole picture, and its tiles
    return {
        "pixel_values": torch.randn(batch, tiles, 3, side, side, generator=random),
        "image_sizes": torch.tensor([shape.image] * batch),
    }


def _placeholders(shape: Shape, config: Any, patches: Tensor | None = None) -> int:
    """Slots that one picture takes in the prompt: its tokens, and newlines where the family has them.

    Args:
        patches: (B, 3) times, rows and columns of patches, where a processor made them.
    """
    side, vision = config.vision_config.patch_size, config.vision_config
    if patches is not None:
        return int(patches[0].prod()) // vision.spatial_merge_size**2
    if shape.family == "qwen2_5_vl":
        merged = side * vision.spatial_merge_size
        return (shape.image[0] // merged) * (shape.image[1] // merged)
    overview = (vision.image_size // side) ** 2  # of the whole picture
    return (
        overview
        if shape.family == "llava"
        # of the tiles: a newline ends each row
        else overview + (shape.image[0] // side) * (shape.image[1] // side + 1)
    )


def _divided(fields: Mapping[str, Any], scale: int, name: str) -> dict[str, Any]:
    made = dict(fields)
    for key in _SCALED:
        if key in made:
            if scale < 1 or made[key] % scale:
                raise SpecError(f"scale={scale} does not divide {key}={made[key]} of {name}; use 1, 2 or 4")
            made[key] //= scale
    return made
