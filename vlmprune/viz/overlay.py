# SPDX-License-Identifier: Apache-2.0
"""Draw kept tokens or token scores over the picture they come from; needs Pillow and numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..core.base import one_of
from ..core.keepmap import VIEWS
from ..errors import SpecError

RIM = (255, 214, 10)
PALE = 140  # of 255: how far merged patches go to white
STRIPES = ((150, 160, 180), (190, 198, 204))
# dark to light: luminance rises all along, so the order survives a grey print and colour-blind eyes
RAMP = ((16, 12, 58), (74, 24, 124), (160, 38, 118), (226, 84, 72), (248, 164, 52), (252, 244, 176))
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

Grids = Sequence[tuple[int, int]]
Paint = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (height, width, 3) pixels, (height, width) values -> pixels


def open_picture(image: Image.Image | str | PathLike[str]) -> Image.Image:
    """RGB picture from a PIL image of any mode or a path; a path is turned upright as its EXIF says, as processors load it."""
    if not isinstance(image, Image.Image):
        if not isinstance(image, (str, PathLike)):
            raise SpecError(f"image is a {type(image).__name__}; expected a PIL image or a path: PIL.Image.fromarray(...)")
        try:
            with Image.open(image) as file:
                image = ImageOps.exif_transpose(file)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise SpecError(f"{str(image)!r} cannot be read as a picture ({error}); pass a PIL image or its path") from error
    if 0 in image.size:
        raise SpecError(f"image has size {image.size}; expected at least 1 x 1 pixel")
    if image.mode[0] in "IF":  # deep grey has no agreed white: stretch what is there, or Pillow clips it to blank
        deep = np.asarray(image, dtype=np.float32)
        low, high = float(np.nanmin(deep)), float(np.nanmax(deep))
        return Image.fromarray(np.uint8(255 * np.nan_to_num((deep - low) / max(high - low, 1e-12)))).convert("RGB")
    if image.mode == "La":  # Pillow turns premultiplied grey into nothing but LA
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def view_box(size: tuple[int, int], view: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom pixel of the part of a (width, height) picture that the tokens cover."""
    one_of("view", view, VIEWS)
    width, height = size
    if view == "stretch":
        return 0, 0, width, height
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def ramp(values: np.ndarray) -> np.ndarray:
    """Colours (..., 3) in 0..255 of values in [0, 1]."""
    stops = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(values, stops, channel) for channel in zip(*RAMP, strict=True)], axis=-1).astype(np.float32)


def draw_keep(
    image: Any, grids: Grids, mask: Any, view: str = "stretch", dim: float = 0.62, merged: bool = False
) -> Image.Image:
    """Kept patches clear inside an outline, the others grey and darker by ``dim``.

    Args:
        image: PIL image or path.
        grids: (rows, cols) of each block of tokens; several blocks become panels side by side.
        mask: (N,) bool, true where a token is kept.
        view: "stretch" (tokens cover the picture) or "center" (its centred square; the rest is striped).
        dim: 0 leaves the brightness of dropped patches, 1 makes them black.
        merged: the others are not dropped but merged into the kept ones: they stay in colour, and paler.
    """
    _fraction("dim", dim)

    def paint(region: np.ndarray, kept: np.ndarray) -> np.ndarray:
        others = PALE + (1 - PALE / 255) * region if merged else (0.8 * _grey(region) + 0.2 * region) * (1 - dim)
        out = np.where(kept[..., None], region, others)
        width = max(1, round(min(kept.shape) / 320))
        if min(kept.shape[0] / rows, kept.shape[1] / cols) >= 4 * width:  # smaller patches would be all outline
            out[_dilate(kept, width) & ~kept] = 0  # a dark line outside keeps the bright one visible on light pictures
            out[kept & _dilate(~kept, width)] = RIM
        return out

    rows, cols = np.max(np.asarray(grids), axis=0)
    return _panels(image, grids, np.asarray(mask, dtype=bool), view, paint)


def draw_scores(image: Any, grids: Grids, scores: Any, view: str = "stretch", alpha: float = 0.65) -> Image.Image:
    """Heat map of (N,) scores over the grey picture, light is high; other arguments as in ``draw_keep``.

    Colours are linear between the 1st and the 99th percentile of all blocks together: single sinks would hide the rest.
    """
    _fraction("alpha", alpha)
    scores = np.asarray(scores, dtype=np.float64)
    low, high = np.percentile(scores, (1, 99))
    level = np.clip((scores - low) / (high - low), 0, 1) if high > low else np.full(scores.shape, 0.5)
    return _panels(image, grids, level, view, lambda region, shown: alpha * ramp(shown) + (1 - alpha) * _grey(region))


def _panels(image: Any, grids: Grids, values: np.ndarray, view: str, paint: Paint) -> Image.Image:
    count = sum(rows * cols for rows, cols in grids)
    if values.shape != (count,):
        raise SpecError(f"values have shape {values.shape}; grids {tuple(grids)} expect ({count},)")
    picture = open_picture(image)
    left, top, right, bottom = view_box(picture.size, view)
    pixels = np.asarray(picture, dtype=np.float32)  # (height, width, 3)
    region, backdrop = pixels[top:bottom, left:right], _stripes(pixels) if view == "center" else pixels
    gap = max(4, picture.width // 50)
    sheet = Image.new("RGB", (len(grids) * (picture.width + gap) - gap, picture.height), "white")
    start = 0
    for number, (rows, cols) in enumerate(grids):
        block = values[start : start + rows * cols].reshape(rows, cols)
        start += rows * cols
        panel = backdrop.copy()
        panel[top:bottom, left:right] = paint(region, _enlarge(block, bottom - top, right - left))
        sheet.paste(Image.fromarray(panel.round().astype(np.uint8)), (number * (picture.width + gap), 0))
    return sheet


def _enlarge(block: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, cols = block.shape
    y, x = (2 * np.arange(height) + 1) * rows // (2 * height), (2 * np.arange(width) + 1) * cols // (2 * width)
    return block[y[:, None], x]


def _dilate(mask: np.ndarray, width: int) -> np.ndarray:
    """True within ``width`` pixels of a true one, in a square neighbourhood."""
    for axis in (0, 1):
        padded = np.moveaxis(np.pad(mask, [(width, width) if a == axis else (0, 0) for a in (0, 1)]), axis, 0)
        shifted = [padded[start : start + mask.shape[axis]] for start in range(2 * width + 1)]
        mask = np.moveaxis(np.logical_or.reduce(shifted), 0, axis)
    return mask


def _grey(pixels: np.ndarray) -> np.ndarray:
    return (pixels @ _LUMA)[..., None]


def _stripes(pixels: np.ndarray) -> np.ndarray:
    """Pixels the model never saw: pale, with diagonal stripes, like nothing inside the view."""
    height, width = pixels.shape[:2]
    period = max(2, min(height, width) // 40)
    stripe = (np.arange(height)[:, None] + np.arange(width)) // period % 2
    return 0.2 * _grey(pixels) + np.where(stripe[..., None], *np.array(STRIPES, dtype=np.float32))


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise SpecError(f"{name}={value!r}; expected a number from 0 to 1")
