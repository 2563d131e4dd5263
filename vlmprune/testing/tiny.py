# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision-language models of the real HF classes, with inputs that fit them; for tests, yours and ours.

Everything is built from a config and a seed in well under a second: no download, no GPU. All models have 36 patches per crop
(6 x 6), a vision tower of width 32 and a language model of width 64.

    model = tiny_model("llava_next")
    inputs = tiny_inputs("llava_next", images=(1, 2, 0))
    ids = model.generate(**inputs, max_new_tokens=4)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.image_processing_utils import select_best_resolution

from ..errors import SpecError, UnsupportedError
from .picture import picture
from .processors import (
    BOS_ID,
    FAMILY_PREFIX,
    GRID,
    IMAGE_ID,
    IMAGE_SIZE,
    PAD_ID,
    PATCH_SIZE,
    PINPOINTS,
    SPECIAL_IDS,
    VIDEO_ID,
    VOCABULARY,
    family_prefix,
    known,
    tiny_processor,
    tower_of,
)

__all__ = ["FAMILIES", "VARIANTS", "picture", "tiny_bundle", "tiny_inputs", "tiny_model", "tiny_processor", "tiny_row"]

FAMILIES: tuple[str, ...] = tuple(FAMILY_PREFIX)
VARIANTS: tuple[tuple[str, str, str], ...] = (
    ("llava", "clip", "llama"),
    ("llava", "clip", "mistral"),
    ("llava", "clip", "mistral_sliding"),
    ("llava", "clip", "qwen2"),
    ("llava", "siglip", "llama"),
    ("llava_next", "clip", "llama"),
    ("llava_next", "clip", "mistral"),
    ("llava_next", "siglip", "qwen2"),
    ("llava_onevision", "siglip", "qwen2"),
    ("llava_onevision", "clip", "llama"),
    ("vipllava", "clip", "llama"),
)
_TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_sliding": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
}
LAYERS = 4  # decoder layers
_VIDEO_FRAMES = 3
_SIZES = ((100, 190), (190, 100), (168, 160), (70, 250), (84, 84))  # (height, width) of images 0, 1, 2, ... of a batch


def tiny_model(
    family: str = "llava", tower: str | None = None, text: str | None = None, *, seed: int = 0, layers: int = LAYERS,
    dtype: torch.dtype = torch.float32, **text_overrides: Any,
) -> Any:
    """Build a tiny random model, in eval mode on the CPU.

    Args:
        family: one of ``FAMILIES``.
        tower: ``"clip"`` ([CLS] dropped) or ``"siglip"`` (no [CLS]); default is what the family was released with.
        text: ``"llama"``, ``"mistral"``, ``"mistral_sliding"`` (a window of 8) or ``"qwen2"``; default as released.
        seed: of the weights; the global random state is neither read nor changed.
        layers: decoder layers of the language model; the vision tower always has 4.
        dtype: of the parameters; the same seed gives the same weights up to rounding.
        text_overrides: fields of the text config, such as ``sliding_window=8`` or ``num_key_value_heads=4``.

    Generation never stops early (no end-of-text id is set) and never yields a special id.
    """
    prefix, tower = family_prefix(family), tower_of(family, tower)
    text = known("text", text or ("qwen2" if family == "llava_onevision" else "llama"), tuple(_TEXTS))
    config = getattr(transformers, prefix + "Config")(
        vision_config=_vision_config(tower), text_config=_text_config(text, layers, text_overrides),
        image_token_index=IMAGE_ID, **_family_fields(family, tower),
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are overwritten below
        model = getattr(transformers, prefix + "ForConditionalGeneration")(config)
    _enliven(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_ID
    model.generation_config.suppress_tokens = list(SPECIAL_IDS)
    return model.to(dtype).eval()


def tiny_bundle(family: str = "llava", **options: Any) -> tuple[Any, Any]:
    """``(model, processor)`` that fit each other; options go to ``tiny_model``."""
    return tiny_model(family, **options), tiny_processor(family, options.get("tower"))


def tiny_inputs(
    family: str = "llava", *, images: Sequence[int] = (1,), seed: int = 0, size: tuple[int, int] | None = None, text_len: int = 5,
    video: bool = False,
) -> dict[str, Tensor]:
    """A left-padded batch of random text and random pixels, built without a processor.

    Args:
        family: one of ``FAMILIES``; the batch fits every tower and language model of it.
        images: images per row, 0 allowed.
        seed: of text and pixels.
        size: (height, width) of all images before they were tiled; by default sizes alternate between wide, tall and square.
            Families that see one square crop per image have no sizes.
        text_len: text ids before, between and after the images; row i has ``i % 3`` more, so that equal rows are ragged too.
        video: end every row with a video of 3 frames (llava_onevision only).
    """
    family_prefix(family)
    if video and family != "llava_onevision":
        raise UnsupportedError(f"{family} takes no video here; use family='llava_onevision'")
    if not images or min(images) < 0 or text_len < 1:
        raise SpecError(f"images={tuple(images)}, text_len={text_len}; expected at least one row, counts >= 0 and text_len >= 1")
    random = torch.Generator().manual_seed(seed)
    sizes = [size or _SIZES[j % len(_SIZES)] for j in range(sum(images))]
    pixels = [torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random) for n in _tiles(family, sizes, images)]
    rows, first = [], 0
    for i, count in enumerate(images):
        blocks = [[IMAGE_ID] * _tokens(family, s, alone=count == 1) for s in sizes[first : first + count]]
        blocks += [[VIDEO_ID] * (_VIDEO_FRAMES * math.ceil(GRID / 2) ** 2 + 1)] * video
        row = [BOS_ID, *_words(text_len + i % 3, random)]
        for block in blocks:
            row += block + _words(text_len + i % 3, random)
        rows.append(row)
        first += count
    length = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[PAD_ID] * (length - len(row)) + row for row in rows]),  # (B, L)
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
    if pixels and family in PINPOINTS:
        inputs["pixel_values"] = nn.utils.rnn.pad_sequence(pixels, batch_first=True)  # (images, most tiles, 3, H, W)
        inputs["image_sizes"] = torch.tensor(sizes)
    elif pixels:
        inputs["pixel_values"] = torch.cat(pixels)  # (images, 3, H, W)
    if pixels and family == "llava_onevision":
        inputs["batch_num_images"] = torch.tensor([n for n in images if n])  # no entry for rows without images
    if video:
        inputs["pixel_values_videos"] = torch.randn(len(rows), _VIDEO_FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random)
    return inputs


def tiny_row(inputs: dict[str, Tensor], family: str, i: int, images: Sequence[int]) -> dict[str, Tensor]:
    """Row ``i`` of a batch of ``tiny_inputs(family, images=images)``, alone and without padding: a batch of one.

    A plain forward of the batch counts padding as positions. Give it ``position_ids`` that start at the first real token before
    you compare closely: rotary angles round differently at other positions, which costs up to 3e-5 in the logits.
    """
    real = inputs["attention_mask"][i].bool()
    row = {key: inputs[key][i : i + 1, real] for key in ("input_ids", "attention_mask")}
    first, count = sum(images[:i]), images[i]
    if count:
        row["pixel_values"] = inputs["pixel_values"][first : first + count]
    if count and "image_sizes" in inputs:
        row["image_sizes"] = inputs["image_sizes"][first : first + count]
        row["pixel_values"] = row["pixel_values"][:, : max(_tiles(family, row["image_sizes"].tolist(), [count]))]
    if count and "batch_num_images" in inputs:
        row["batch_num_images"] = torch.tensor([count])
    if "pixel_values_videos" in inputs:
        row["pixel_values_videos"] = inputs["pixel_values_videos"][i : i + 1]
    return row


def _tiles(family: str, sizes: Sequence[Sequence[int]], images: Sequence[int]) -> list[int]:
    """Crops that each image is cut into, the overview included."""
    alone = [count == 1 for count in images for _ in range(count)]
    if family not in PINPOINTS:
        return [1] * len(sizes)
    whole = [math.prod(side // IMAGE_SIZE for side in select_best_resolution(tuple(s), PINPOINTS[family])) + 1 for s in sizes]
    # onevision shows each of several images as its overview only
    return [n if one or family == "llava_next" else 1 for n, one in zip(whole, alone, strict=True)]


def _tokens(family: str, size: Sequence[int], *, alone: bool) -> int:
    """Placeholders that the model wants for one image of (height, width) ``size``."""
    overview = GRID * GRID
    if family not in PINPOINTS:
        return overview
    if family == "llava_onevision" and not alone:
        return overview + 1  # one newline
    height, width = size
    rows, cols = (side // PATCH_SIZE for side in select_best_resolution(tuple(size), PINPOINTS[family]))
    if width * rows > cols * height:  # the image is flatter than its canvas: bands above and below were padding
        rows -= (rows - height * cols // width) // 2 * 2
    else:
        cols -= (cols - width * rows // height) // 2 * 2
    ratio = math.sqrt(rows * cols / (9 * overview))
    if family == "llava_onevision" and ratio > 1.1:
        rows, cols = int(rows // ratio), int(cols // ratio)
    return overview + rows * (cols + 1)


def _words(count: int, random: torch.Generator) -> list[int]:
    return torch.randint(PAD_ID + 1, BOS_ID, (count,), generator=random).tolist()  # the bytes


def _vision_config(tower: str) -> Any:
    fields: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
    }
    if tower == "siglip":
        return transformers.SiglipVisionConfig(**fields, vision_use_head=False)
    return transformers.CLIPVisionConfig(**fields)


def _text_config(text: str, layers: int, overrides: dict[str, Any]) -> Any:
    prefix, special = _TEXTS[text]
    fields: dict[str, Any] = {
        "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "bos_token_id": BOS_ID, "eos_token_id": None, "pad_token_id": PAD_ID,
    }
    return getattr(transformers, prefix + "Config")(**fields | special | overrides)


def _family_fields(family: str, tower: str) -> dict[str, Any]:
    if family == "vipllava":
        plural = "vision_feature_layers"  # what older transformers call it
        return {plural if plural in inspect.signature(transformers.VipLlavaConfig).parameters else plural[:-1]: [-2, -3, 1]}
    fields: dict[str, Any] = {
        "vision_feature_layer": -1 if family == "llava_onevision" else -2,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }
    if family in PINPOINTS:
        fields["image_grid_pinpoints"] = PINPOINTS[family]
    if family == "llava_onevision":
        fields |= {"video_token_index": VIDEO_ID, "vision_aspect_ratio": "anyres_max_9"}
    return fields


@torch.no_grad()
def _enliven(model: Any, seed: int) -> None:
    """Draw weights under which every token matters: the usual std of 0.02 leaves argmax blind to what a cut does."""
    random = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            draw = torch.randn(weight.shape, generator=random)
            if isinstance(module, nn.Linear | nn.Conv2d) and name == "weight":
                # queries and keys are larger still, so that softmax is peaked and order and masks show in the logits
                draw *= (2.0 if path.endswith(("q_proj", "k_proj")) else 1.0) / math.sqrt(weight[0].numel())
            elif "Norm" in type(module).__name__ and name == "weight":
                draw = 1 + 0.1 * draw
            elif name == "bias":
                draw *= 0.1
            weight.copy_(draw)  # embeddings, [CLS] and the image newline keep std 1
    # A placeholder among the new tokens would ask for an image that is not there. suppress_tokens keeps generate() from it; loops
    # written by hand take the argmax, and a row of zeros gives logit 0, which is below the largest of 256 zero-mean logits.
    model.lm_head.weight[list(SPECIAL_IDS)] = 0
