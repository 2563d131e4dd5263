# SPDX-License-Identifier: Apache-2.0
"""A second look: two answers, the region where they look differently, and a third answer that sees it too.

What a region is says the method, CARVE. Nothing of the model is changed, and pruning that is attached goes
on: the maps are then 0 where tokens were cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import check_int
from ..errors import SpecError
from ..methods.carve import CARVE, GENERAL
from ..methods.carve.region import Box, Steps, Strategy, box_of, contrast, enlarged, refined_size
from ..models import adapter_for
from ..models.loading import prompt
from ..viz.overlay import open_picture
from .watch import watching

# the answer to a prompt about some pictures, of so many tokens at most
Ask = Callable[[Sequence[Any], str, int], str]


class Prompts(NamedTuple):
    """What is asked: with the picture alone, under the instruction, and with the region beside it."""

    first: str
    general: str
    second: str

    @classmethod
    def of(cls, processor: Any, question: str, instruction: str) -> Prompts:
        """Those of a question about one picture."""
        return cls(
            prompt(processor, question), prompt(processor, instruction), prompt(processor, question, 2)
        )


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
    steps: Steps = "all",
    lam: float = 1e-8,
    top_share: float = 0.2,
    min_regions: int = 3,
    strategy: Strategy = "attention_sum",
    official_size: bool = False,
    max_new_tokens: int = 32,
) -> Refined:
    """Answer a question about a picture with a second look at the region that it is about.

    Args:
        model, processor: as ``vlmprune.load`` gives them.
        image: PIL image, or the path of a picture.
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
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Sequence)):
        raise SpecError(f"layers={layers!r}; expected a list of decoder layers, such as [{layers}], or None")
    method = CARVE(
        instruction=instruction,
        layers=None if layers is None else tuple(layers),
        steps=steps,
        lam=lam,
        top_share=top_share,
        min_regions=min_regions,
        strategy=strategy,
        official_size=official_size,
    )
    check_int("max_new_tokens", max_new_tokens, least=1)
    texts = Prompts.of(processor, question, instruction)
    shown = open_picture(image)
    return look_again(method, model, partial(ask, model, processor), shown, texts, max_new_tokens)


def look_again(method: CARVE, model: Any, ask: Ask, image: Any, texts: Prompts, count: int) -> Refined:
    """A second look by a method, with answers of at most ``count`` tokens."""
    # ascending: Watch takes the first one for the beginning of a step
    layers = method.looks_at(adapter_for(model).depth)
    image = image.convert("RGB")
    # (T, layers, N), with T the tokens of the answer
    asked, _, first = read(model, ask, image, texts.first, layers, count)
    described = 1 if method.steps == "first" else count
    general, grid, _ = read(model, ask, image, texts.general, layers, described)
    pixels = on_picture(contrast(asked, general, method.lam, method.steps), *grid, image.size)
    mask = method.region(pixels).numpy()
    box = box_of(mask)
    crop = masked(image, mask).crop(box)
    crop = crop.resize(refined_size(box, image.size, method.official_size), resample=_lanczos())
    answer = ask([image, crop], texts.second, count)
    # lam as large as an even share of the attention, so that quotients of faint patches do not blow up
    score = contrast(asked, general, 1 / asked.shape[2], method.steps)
    return Refined(answer, first, crop, box, mask, pixels, score)


def read(
    model: Any, ask: Ask, image: Any, text: str, layers: Sequence[int], count: int
) -> tuple[Tensor, tuple[tuple[int, int], str], str]:
    """(T, layers, N) attention to the patches while a text is answered; their grid and how it lies on the
    picture; the answer.
    """
    with watching(model, layers) as watch:
        answer = ask([image], text, count)
    return watch.attention(), (watch.grid, watch.view), answer


def ask(model: Any, processor: Any, images: Sequence[Any], text: str, count: int) -> str:
    """The greedy answer to a prompt about some pictures."""
    made = processor(images=list(images), text=text, return_tensors="pt")
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
