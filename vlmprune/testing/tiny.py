# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision-language models of the real HF classes, with inputs that fit them; for tests, yours and
ours.

Everything is built from a config and a seed in well under a second: no download, no GPU. All models have 36
patches per crop (6 x 6), a vision tower of width 32 and a language model of width 64.

    model = tiny_model("llava_next")
    inputs = tiny_inputs("llava_next", images=(1, 2, 0))
    ids = model.generate(**inputs, max_new_tokens=4)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SpecError, UnsupportedError
from ..example_picture import picture
from .families import FAMILIES as _FAMILIES
from .families import family_of, layout_of
from .families.layouts import FRAMES, words
from .families.shared import BOS_ID, PAD_ID, SPECIAL_IDS
from .processors import tiny_processor
from .tiny_configs import model_class, tiny_config

__all__ = [
    "FAMILIES",
    "LLAVA_FAMILIES",
    "VARIANTS",
    "picture",
    "tiny_bundle",
    "tiny_inputs",
    "tiny_model",
    "tiny_processor",
    "tiny_row",
]

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
# the first to be supported, on all transformers versions; between them they have every kind of geometry
LLAVA_FAMILIES = ("llava", "llava_next", "llava_onevision", "vipllava")
# (family, tower, text)
VARIANTS: tuple[tuple[str, str, str], ...] = tuple(
    (name, *variant) for name, family in _FAMILIES.items() for variant in family.variants
)
LAYERS = 4  # decoder layers


def tiny_model(
    family: str = "llava",
    tower: str | None = None,
    text: str | None = None,
    *,
    seed: int = 0,
    layers: int = LAYERS,
    dtype: torch.dtype = torch.float32,
    **text_overrides: Any,
) -> Any:
    """Build a tiny random model, in eval mode on the CPU.

    Args:
        family: one of ``FAMILIES``.
        tower: ``"clip"`` ([CLS] dropped) or ``"siglip"`` (no [CLS]); default is what the family was released
            with.
        text: ``"llama"``, ``"mistral"``, ``"mistral_sliding"`` (a window of 8) or ``"qwen2"``; default as
            released.
        seed: of the weights; the global random state is neither read nor changed.
        layers: decoder layers of the language model; the vision tower always has 4.
        dtype: of the parameters; the same seed gives the same weights up to rounding.
        text_overrides: fields of the text config, such as ``sliding_window=8`` or ``num_key_value_heads=4``.

    Generation never stops early (no end-of-text id is set) and never yields a special id.
    """
    facts = family_of(family)
    tower, text = facts.tower(tower), facts.text(text)
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are overwritten below
        if facts.build is not None:
            model = facts.build(tower, text, layers, text_overrides)
        else:
            model = model_class(family)(tiny_config(family, tower, text, layers, text_overrides))
    _enliven(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_ID
    model.generation_config.suppress_tokens = list(SPECIAL_IDS)
    return model.to(dtype).eval()


def tiny_bundle(family: str = "llava", **options: Any) -> tuple[Any, Any]:
    """``(model, processor)`` that fit each other; options go to ``tiny_model``."""
    return tiny_model(family, **options), tiny_processor(family, options.get("tower"))


def tiny_inputs(
    family: str = "llava",
    *,
    images: Sequence[int] = (1,),
    seed: int = 0,
    size: tuple[int, int] | None = None,
    text_len: int = 5,
    video: bool = False,
    frames: int = FRAMES,
) -> dict[str, Tensor]:
    """A left-padded batch of random text and random pixels, built without a processor.

    Args:
        family: one of ``FAMILIES``; the batch fits every tower and language model of it.
        images: images per row, 0 allowed.
        seed: of text and pixels.
        size: (height, width) of all images before they were tiled; by default sizes alternate between wide,
            tall and square. Families that see one square crop per image have no sizes.
        text_len: text ids before, between and after the images; row i has ``i % 3`` more, so that equal rows
            are ragged too.
        video: end every row with a clip, where the family takes clips.
        frames: of each clip.
    """
    layout = layout_of(family)
    if video and layout.video is None:
        raise UnsupportedError(f"{family} takes no clips; give it images")
    if not images or min(images) < 0 or text_len < 1 or frames < 1:
        given = f"images={tuple(images)}, text_len={text_len}, frames={frames}"
        raise SpecError(f"{given}; expected at least one row, counts >= 0 and lengths >= 1")
    if video and any(images) and not layout.mixes:
        raise SpecError(f"images={tuple(images)} beside clips; {family} reads one of both in a call: give 0")
    random = torch.Generator().manual_seed(seed)
    sizes = [size or layout.sizes[j % len(layout.sizes)] for j in range(sum(images))]
    tensors = layout.images(sizes, images, random)
    rows, first = [], 0
    for i, count in enumerate(images):
        blocks = [layout.block(s, count == 1) for s in sizes[first : first + count]]
        blocks += [layout.clip(frames)] if video else []
        row = [BOS_ID, *words(text_len + i % 3, random)]
        for block in blocks:
            row += block + words(text_len + i % 3, random)
        rows.append(row)
        first += count
    length = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (length - len(row)) + row for row in rows])  # (B, L)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    tensors = {"input_ids": ids, "attention_mask": mask, **layout.beside(ids), **tensors}
    return tensors | (layout.videos(len(rows), frames, random) if video else {})


def tiny_row(inputs: dict[str, Tensor], family: str, i: int, images: Sequence[int]) -> dict[str, Tensor]:
    """Row ``i`` of a batch of ``tiny_inputs(family, images=images)``, alone and without padding: a batch of
    one.

    A plain forward of the batch counts padding as positions. Give it ``position_ids`` that start at the first
    real token before you compare closely: rotary angles round differently at other positions, which costs up
    to 3e-5 in the logits.
    """
    real, layout = inputs["attention_mask"][i].bool(), layout_of(family)
    row = {
        key: value[i : i + 1, real]
        for key, value in inputs.items()
        if value.shape == inputs["input_ids"].shape
    }
    row |= layout.row(inputs, sum(images[:i]), images[i])
    return row | (layout.video_row(inputs, i) if "pixel_values_videos" in inputs else {})


def head_of(model: Any) -> Any:
    """What makes logits of hidden states; below a causal language model where that holds the decoder."""
    return model.lm_head if hasattr(model, "lm_head") else model.language_model.lm_head


@torch.no_grad()
def _enliven(model: Any, seed: int) -> None:
    """Draw weights under which every token matters: the usual std of 0.02 leaves argmax blind to what a cut
    does.
    """
    random = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            draw = torch.randn(weight.shape, generator=random)
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and name == "weight":
                # queries and keys are larger still, so that softmax is peaked and order and masks show in
                # the logits; the many convolutions of a timm tower are a little larger, or they would average
                # the picture away
                gain = (
                    2.0
                    if path.endswith(("q_proj", "k_proj", "qkv"))
                    else 1.3
                    if "timm_model" in path
                    else 1.0
                )
                draw *= gain / math.sqrt(weight[0].numel())
            elif (
                "Experts" in type(module).__name__ and weight.ndim == 3
            ):  # matrices of many, either way round
                draw /= math.sqrt(max(weight.shape[1:]))
            elif "Norm" in type(module).__name__ and name == "weight":
                draw = 0.1 * draw + (
                    0 if "Gemma" in type(module).__name__ else 1
                )  # Gemma's norms add 1 themselves
            elif "ScaledWordEmbedding" in type(module).__name__:
                draw /= module.scalar_embed_scale  # so that words are as large as image tokens
            elif name == "mm_input_projection_weight":  # Gemma 3's projector, which is no Linear
                draw /= math.sqrt(weight.shape[0])
            elif name == "bias":
                draw *= 0.1
            weight.copy_(draw)  # embeddings, [CLS] and the image newline keep std 1
    # a placeholder among the new tokens would ask for an image that is not there. suppress_tokens keeps
    # generate() from it; loops written by hand take the argmax, and a row of zeros gives logit 0, which is
    # below the largest of 256 zero-mean logits
    head_of(model).weight[list(SPECIAL_IDS)] = 0
