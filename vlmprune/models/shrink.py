# SPDX-License-Identifier: Apache-2.0
"""Smaller pictures for a processor: specs of the picture slot, such as ``downsample@64``.

Families that read pictures of any size make one token of every square of some pixels. There the processor is
given a picture that has the wanted tokens already, and is told not to enlarge it again. Families that cut
pictures into tiles make fewer tiles of smaller pictures: of the sizes that change their number the largest is
taken whose tokens are within the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.budget import Budget
from ..core.method import Method
from ..errors import SpecError
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


@dataclass(frozen=True)
class TileSizes:
    """How a processor that cuts pictures into tiles makes fewer tokens of smaller ones.

    Args:
        sizes: the (height, width) to which a picture of such a size may be shrunk.
        count: tokens of a picture of (height, width), and of one of several pictures of a prompt where that
            is true.
        resample: the filter of Pillow with which it changes sizes.
    """

    sizes: Callable[[tuple[int, int]], Sequence[tuple[int, int]]]
    count: Callable[[tuple[int, int], bool], int]
    resample: int

    def largest(self, size: tuple[int, int], several: bool, k: int) -> tuple[int, int] | None:
        """The (height, width) with most tokens, at most k; of several the most pixels; None where none is."""
        found = [(self.count(one, several), one[0] * one[1], one) for one in (size, *self.sizes(size))]
        return max((one for one in found if one[0] <= k), default=(0, 0, None))[2]

    def least(self, size: tuple[int, int], several: bool) -> int:
        """The fewest tokens of a picture of this size."""
        return min(self.count(one, several) for one in (size, *self.sizes(size)))


@dataclass(frozen=True)
class Shrunk:
    """Pictures for the processor.

    Args:
        images: those pictures.
        options: of the call of the processor that takes them.
        dense: tokens that each would have had.
        tokens: tokens that it has now.
    """

    images: list[Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    dense: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()


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
        return Shrunk(found, options, tuple(dense), tuple(tokens))

    def _keep(self, count: int) -> int:
        """What the budget allows of a picture of so many tokens."""
        if self.strict and isinstance(self.budget.keep, int) and self.budget.keep > count:
            raise SpecError(
                f"strict: keep={self.budget.keep} tokens but a picture gives {count}; lower keep or drop "
                "strict"
            )
        return self.budget.count(count)

    def _by_steps(self, steps: TileSizes, images: Sequence[Any], several: Sequence[bool]) -> Shrunk:
        found, dense, tokens = [], [], []
        for image, others in zip(images, several, strict=True):
            whole = (image.height, image.width)
            count = steps.count(whole, others)
            keep = self._keep(count)
            size = steps.largest(whole, others, keep)
            if size is None:
                raise SpecError(
                    f"{self.spec!r}: {keep} tokens are asked of a picture of {image.width} x {image.height}, "
                    f"of which this model makes {steps.least(whole, others)} at least, in tiles of one size; "
                    "ask for so many, or compare with 'pool@64'"
                )
            dense.append(count)
            tokens.append(steps.count(size, others))
            small = image.convert("RGB")
            found.append(small if size == whole else small.resize(size[::-1], steps.resample))
        return Shrunk(found, {}, tuple(dense), tuple(tokens))


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
