# SPDX-License-Identifier: Apache-2.0
"""CARVE: ask, find the region that the question is about, and ask again with that region beside the picture.

Attention to patches is what the picture attracts by itself, times what the question asks. The same picture is
read under a general instruction, and the two are divided, step by step of both answers:

    c = A_Q / (A_G + lam),   S = sum over steps t of (t + 1) times the sum of c over layers

S is enlarged to the picture; of the regions in its highest fifth the best stay, all else becomes black, the
bounding box is cropped and enlarged, and the model answers again with both pictures. Nothing of the model is
changed, and pruning that is attached goes on: the maps are then 0 where tokens were cut.

Deviations: patches form the grid that the model gives them (the official code reads some counts as squares);
a crop is not enlarged beyond the area of the picture (``official_size=True`` does); a KV cache is used.
Provenance: "CARVE", arXiv:2509.06461; written from a description of paper and official code (commit a1f0442,
no licence file); no code copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import check_int, check_number, check_positive, one_of
from ..errors import SpecError
from ..models import adapter_for
from ..models.loading import prompt
from .region import Box, Steps, Strategy, box_of, contrast, enlarged, kept_mask, refined_size
from .watch import watching

GENERAL = "Write a general description of the image."


@dataclass(frozen=True, eq=False)
class Refined:
    """What a second look gave.

    Args:
        answer: with both pictures.
        first: the answer to the question with the picture alone.
        image: the refined picture (PIL).
        box: left, top, right and bottom of the crop in the picture.
        mask: (H, W) bool, pixels that stay.
        contrast: (H, W) the map S.
        token_score: (N,) the same sum on the grid of patches with 1/N for lam: a score for pruning.
    """

    answer: str
    first: str
    image: Any
    box: Box
    mask: NDArray[np.bool_]
    contrast: Tensor
    token_score: Tensor


def refine(
    model: Any,
    processor: Any,
    image: Any,
    question: str,
    *,
    instruction: str = GENERAL,
    layers: Sequence[int] | None = None,
    steps: Literal["all", "first", "last"] = "all",
    lam: float = 1e-8,
    top_share: float = 0.2,
    min_regions: int = 3,
    strategy: Literal["attention_sum", "size", "drop_small"] = "attention_sum",
    official_size: bool = False,
    max_new_tokens: int = 32,
) -> Refined:
    """Answer a question about a picture with a second look at the region that it is about.

    Args:
        model, processor: as ``vlmprune.load`` gives them.
        image: PIL image.
        instruction: what the picture is read under for comparison.
        layers: decoder layers whose attention is read; None: those from 5/8 to 13/16 of the depth.
        steps: of the two answers, "all", "first" or "last"; "first" needs no generation for the maps.
        lam: added to the attention under the instruction.
        top_share: share of the pixels that form regions, and of the regions that stay.
        min_regions: regions that stay at least.
        strategy: regions are ranked by "attention_sum" or "size", or those below 0.1 % of the area go.
        official_size: enlarge the crop until it covers the picture on both sides, whatever its area.
        max_new_tokens: of every answer.

    Examples:
        >>> result = vlmprune.refine(model, processor, image, "What is written there?")  # doctest: +SKIP
        >>> print(result.answer, result.box)  # doctest: +SKIP
    """
    depth = adapter_for(model).depth
    # ascending: Watch takes the first one for the beginning of a step
    chosen = middle_layers(depth) if layers is None else sorted(layers)
    if not chosen or not all(type(layer) is int and 0 <= layer < depth for layer in chosen):
        raise SpecError(f"layers={layers}; expected one or more decoder layers of 0..{depth - 1}")
    one_of("steps", steps, get_args(Steps))
    one_of("strategy", strategy, get_args(Strategy))
    check_positive("lam", lam)
    check_number("top_share", top_share, least=0.0, most=1.0)
    check_int("min_regions", min_regions, least=1)
    check_int("max_new_tokens", max_new_tokens, least=1)
    image = image.convert("RGB")
    count = 1 if steps == "first" else max_new_tokens
    # (T, layers, N), with T the tokens of the answer
    asked, _, first = read(model, processor, image, question, chosen, max_new_tokens)
    general, grid, _ = read(model, processor, image, instruction, chosen, count)
    pixels = on_picture(contrast(asked, general, lam, steps), *grid, image.size)
    mask = kept_mask(pixels, top_share, min_regions, strategy)
    box = box_of(mask)
    crop = masked(image, mask).crop(box)
    crop = crop.resize(refined_size(box, image.size, official_size), resample=_lanczos())
    answer = ask(model, processor, [image, crop], question, max_new_tokens)
    # lam as large as an even share of the attention, so that quotients of faint patches do not blow up
    score = contrast(asked, general, 1 / asked.shape[2], steps)
    return Refined(answer, first, crop, box, mask, pixels, score)


def middle_layers(depth: int) -> list[int]:
    """Layers 20 to 25 of 32, and the same share of other depths."""
    first = min(depth * 5 // 8, depth - 1)
    return list(range(first, max(first + 1, depth * 13 // 16)))


def read(
    model: Any, processor: Any, image: Any, text: str, layers: Sequence[int], count: int
) -> tuple[Tensor, tuple[tuple[int, int], str], str]:
    """(T, layers, N) attention to the patches while a text is answered; their grid and how it lies on the
    picture; the answer.
    """
    with watching(model, layers) as watch:
        answer = ask(model, processor, [image], text, count)
    return watch.attention(), (watch.grid, watch.view), answer


def ask(model: Any, processor: Any, images: Sequence[Any], text: str, count: int) -> str:
    """The greedy answer to a text about some pictures, with the prompt that ``vlmprune.encode`` makes."""
    made = processor(images=list(images), text=prompt(processor, text, len(images)), return_tensors="pt")
    inputs = made.to(model.device, model.dtype)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, num_beams=1, use_cache=True)
    # ids begin with the prompt
    new: str = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return new.strip()


def on_picture(values: Tensor, grid: tuple[int, int], view: str, size: tuple[int, int]) -> Tensor:
    """(H, W) the values (N,) of a grid on a picture of ``size`` (W, H); 0 where the model sees nothing."""
    width, height = size
    if view == "stretch":
        return enlarged(values, grid, size)
    # "center": the model saw the largest square in the middle
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = torch.zeros(height, width, dtype=torch.float64)
    pixels[top : top + side, left : left + side] = enlarged(values, grid, (side, side))
    return pixels


def masked(image: Any, mask: NDArray[np.bool_]) -> Any:
    """The picture with everything outside of a mask (H, W) in black."""
    from PIL import Image

    return Image.fromarray(np.asarray(image) * mask[..., None].astype(np.uint8))


def _lanczos() -> Any:
    from PIL import Image

    return Image.Resampling.LANCZOS
