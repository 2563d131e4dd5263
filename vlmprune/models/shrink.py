# SPDX-License-Identifier: Apache-2.0
"""Smaller pictures for a processor: specs of the picture slot, such as ``downsample@64``.

Families that read pictures of any size make one token of every square of some pixels. There the processor is
given a picture that has the wanted tokens already, and is told not to enlarge it again. Families that cut
pictures into tiles make fewer tiles of smaller pictures: of the sizes that change their number the largest is
taken whose tokens are within the budget.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.budget import Budget
from ..core.method import Method
from ..errors import SpecError, UnsupportedError
from ..spec import Spec, parse

if TYPE_CHECKING:
    from .base import Adapter


@dataclass(frozen=True)
class Resolution:
    """How a processor makes tokens of pictures of any size.

    Args:
        side: pixels along each side of what becomes one token.
        grid: (rows, cols) of tokens that it makes of a PIL picture.
        resample: the filter of Pillow with which it changes sizes.
        unchanged: options of a call that leave pictures of so many pixels, or more, as they are.
    """

    side: int
    grid: Callable[[Any], tuple[int, int]]
    resample: int
    unchanged: Callable[[int], Mapping[str, Any]]


Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class TileSizes:
    """How a processor that cuts pictures into tiles makes fewer tokens of smaller ones.

    Args:
        sizes: the sizes at which a picture of such a size may be given; the first makes as many tokens as
            ever.
        count: tokens of a picture at one of them, and of one of several pictures of a prompt where that is
            true.
        resample: the filter of Pillow with which it changes sizes.
        options: of a call, that make a picture keep its size where the processor would change it.
        parts: pictures that the model makes of one of such a size: of its tiles, where each is one to it.
    """

    sizes: Callable[[Size], Sequence[Size]]
    count: Callable[[Size, bool], int]
    resample: int
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: Callable[[Size], int] = lambda size: 1

    def largest(self, size: Size, several: bool, k: int) -> Size | None:
        """The size with most tokens, at most k; of several the most pixels; None where none is."""
        own, *smaller = self.sizes(size)
        if self.count(own, several) <= k:
            return own
        found = [(self.count(one, several), one[0] * one[1], one) for one in smaller]
        return max((one for one in found if one[0] <= k), default=(0, 0, None))[2]

    def least(self, size: Size, several: bool) -> int:
        """The fewest tokens of a picture of this size."""
        return min(self.count(one, several) for one in self.sizes(size))


@dataclass(frozen=True)
class Shrunk:
    """Pictures for the processor.

    Args:
        images: those pictures.
        options: of the call of the processor that takes them.
        dense: tokens that each would have had.
        tokens: tokens that it has now.
        parts: pictures that the model makes of it now.
    """

    images: list[Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    dense: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shrink:
    """A spec of the picture slot on one model."""

    spec: str
    method: Method
    budget: Budget
    resolution: Resolution | TileSizes
    strict: bool = False

    def __call__(self, images: Sequence[Any], several: Sequence[bool] = ()) -> Shrunk:
        """PIL pictures in order, each as large as its budget allows.

        Args:
            several: of every picture, whether its prompt has others; none has by default.
        """
        if not images:
            return Shrunk([])
        if isinstance(self.resolution, TileSizes):
            return self._by_steps(self.resolution, images, several or [False] * len(images))
        side, found, dense, tokens = self.resolution.side, [], [], []
        for image in images:
            whole = self.resolution.grid(image)
            count = whole[0] * whole[1]
            rows, cols = self.method.shrink(whole, self._keep(count))
            dense.append(count)
            tokens.append(rows * cols)
            found.append(image.convert("RGB").resize((cols * side, rows * side), self.resolution.resample))
        options = self.resolution.unchanged(min(tokens) * side * side)
        return Shrunk(found, options, tuple(dense), tuple(tokens), (1,) * len(found))

    def _keep(self, count: int) -> int:
        """What the budget allows of a picture of so many tokens."""
        if self.strict and isinstance(self.budget.keep, int) and self.budget.keep > count:
            raise SpecError(
                f"strict: keep={self.budget.keep} tokens but a picture gives {count}; lower keep or drop "
                "strict"
            )
        return self.budget.count(count)

    def _by_steps(self, steps: TileSizes, images: Sequence[Any], several: Sequence[bool]) -> Shrunk:
        found, dense, tokens, parts = [], [], [], []
        for image, others in zip(images, several, strict=True):
            given = (image.height, image.width)
            count = steps.count(steps.sizes(given)[0], others)
            keep = self._keep(count)
            size = steps.largest(given, others, keep)
            if size is None:
                raise SpecError(
                    f"{self.spec!r}: {keep} tokens are asked of a picture of {image.width} x {image.height}, "
                    f"of which this model makes {steps.least(given, others)} at least, in tiles of one size; "
                    "ask for so many, or compare with 'pool@64'"
                )
            dense.append(count)
            tokens.append(steps.count(size, others))
            parts.append(steps.parts(size))
            small = image.convert("RGB")
            found.append(small if size == given else small.resize(size[::-1], steps.resample))
        return Shrunk(found, steps.options, tuple(dense), tuple(tokens), tuple(parts))


def square_tiles(processor: Any, tokens: int) -> TileSizes:
    """Of processors that stretch a picture over a canvas of square tiles and may show it whole beside them.

    Their budget is ``max_patches``, which is one for all pictures of a call. A picture that has the size of
    the canvas that a smaller ``max_patches`` would choose gets that canvas, each picture its own.

    Args:
        tokens: of a tile.
    """
    images = processor.image_processor
    canvas = sys.modules[type(images).__module__].get_optimal_tiled_canvas
    tile = (images.size["height"], images.size["width"])

    def sizes(size: Size) -> list[Size]:
        found = [size]
        for most in range(images.min_patches, images.max_patches):
            cols, rows = map(int, canvas(size, tile, images.min_patches, most))
            whole = (rows * tile[0], cols * tile[1])
            # where a larger canvas has the same shape it may be taken for so large a picture, not for one of
            # little more than half the pixels
            found += [whole, (whole[0] * 3 // 4, whole[1] * 3 // 4)]
        return found

    def parts(size: Size) -> int:
        return tiles_of(processor, size)

    return TileSizes(sizes, lambda size, several: tokens * parts(size), images.resample, parts=parts)


def tiles_of(processor: Any, size: Size) -> int:
    """Tiles that such a processor makes of a picture, the whole one included."""
    return processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_patches"][0]


def longest_edge(processor: Any, tokens: int, model_type: str) -> TileSizes:
    """Of processors that give all pictures one longest edge, then cut what is longer than a tile.

    Their budget is ``size["longest_edge"]``, which is one for all pictures of a call. Here each picture has
    its own, so they are told to leave sizes alone.

    Args:
        tokens: of a tile.
    """
    images = processor.image_processor
    edge, side = images.size["longest_edge"], images.max_image_size["longest_edge"]
    module = sys.modules[type(images).__module__]
    if not images.do_image_splitting or edge % side or edge > module.MAX_IMAGE_SIZE:
        raise UnsupportedError(
            f"the processor of this {model_type} has do_image_splitting={images.do_image_splitting}, a "
            f"longest edge of {edge} and tiles of {side}; pictures can be shrunk where it splits them and "
            f"the edge is a multiple of the tile, at most {module.MAX_IMAGE_SIZE}"
        )

    def sizes(size: Size) -> list[Size]:
        resized = module._resize_output_size_rescale_to_max_len
        return [resized(*size, max_len=length) for length in range(edge, 0, -side)]

    def parts(size: Size) -> int:
        return split_of(images, size, max(size))

    options = {"images_kwargs": {"do_resize": False}}
    return TileSizes(sizes, lambda size, several: tokens * parts(size), images.resample, options, parts)


def split_of(images: Any, size: Size, edge: int) -> int:
    """Tiles that such an image processor makes of a picture with this edge, the whole one included."""
    # it says none where it splits nothing
    return max(1, images.get_number_of_image_patches(*size, {"size": {"longest_edge": edge}})[0])


def shrinks(spec: str | Spec) -> bool:
    """Whether a spec changes pictures, and nothing in a model."""
    return any(plan.method.slot == "picture" for plan in parse(spec).build())


def shrink_for(adapter: Adapter, processor: Any, spec: str | Spec, strict: bool = False) -> Shrink:
    """What a spec of the picture slot does for a model, refused where the model reads one size only."""
    parsed = parse(spec)
    (plan,) = parsed.build(require_budget=True)
    if plan.method.slot != "picture" or plan.budget is None:
        raise SpecError(
            f"{str(parsed)!r} acts inside the model; expected a spec that changes the picture, such as "
            f"'downsample@64'; write `with vlmprune.prune(model, {str(parsed)!r}):` around generate"
        )
    if plan.budget.scope != "image":
        raise SpecError(
            f"{str(parsed)!r}: every picture is shrunk by itself, as a whole; drop '/{plan.budget.scope}'"
        )
    return Shrink(str(parsed), plan.method, plan.budget, adapter.resolution(processor), strict)
