# SPDX-License-Identifier: Apache-2.0
"""Draw kept tokens or token scores over the picture they come from; needs Pillow and numpy only.

Pictures may be large and grids hostile: sizes are checked before memory is asked for, and pixels become
floats strip by strip.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..checks import one_of
from ..errors import SpecError
from . import VIEWS

RIM = (255, 214, 10)  # of kept patches, bright yellow
PALE = 140  # of 255: how far merged patches go to white
_KEPT, _MERGED = 2, 1
# light greys that alternate where the picture lies outside the view
STRIPES = ((150, 160, 180), (190, 198, 204))
# dark to light: luminance rises all along, so the order survives a grey print and colour-blind eyes
RAMP = ((16, 12, 58), (74, 24, 124), (160, 38, 118), (226, 84, 72), (248, 164, 52), (252, 244, 176))
MAX_SIDE = 2000  # pixels of a drawing, unless more are asked for
CANVAS = 2**28  # pixels of the largest drawing that is made, 1 GiB
NARROWEST = 8  # pixels of a panel that was reduced
BLANK_SIDE, BLANK = 480, (208, 208, 208)  # the canvas where no picture is known
_STRIP = 2**20  # pixels that are floats at a time
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # weights of red, green and blue in a grey

Grids = Sequence[tuple[int, int]]
# (h, w, 3) pixels, (h, w) values, width of the outline -> pixels
Paint = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def open_picture(image: Image.Image | str | PathLike[str], max_side: int | None = None) -> Image.Image:
    """RGB picture from a PIL image of any mode or a path; a path is turned upright, as processors load it.

    A picture with a side longer than ``max_side`` is made smaller, without a full copy of it in between.
    """
    if not isinstance(image, Image.Image):
        image = _read(image, max_side)
    if 0 in image.size:
        raise SpecError(f"image has size {image.size}; expected at least 1 x 1 pixel")
    if image.mode[0] in "IF":
        # deep grey: whole numbers of 32 bits, 16 bits, or floats
        image = _stretch(image)
    if max_side is None or max(image.size) <= max_side:
        return _rgb(image)
    scale = max_side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    # in two steps: whole blocks are averaged strip by strip, what is left of the way is one small resize
    factor = min(image.width // size[0], image.height // size[1])
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top, bottom in _strips(image.height, image.width, factor):
        small.paste(_rgb(image.crop((0, top, image.width, bottom))).reduce(factor), (0, top // factor))
    return small.resize(size, Image.Resampling.LANCZOS)


def _read(path: Any, max_side: int | None) -> Image.Image:
    if not isinstance(path, (str, PathLike)):
        raise SpecError(
            f"image is a {type(path).__name__}; expected one PIL image or the path of one; arrays become "
            "images by PIL.Image.fromarray(...)"
        )
    if re.match("[a-z]+://", str(path)):  # such as https://
        raise SpecError(f"{str(path)!r} is a URL, and none is read; expected the path of a file: download it")
    try:
        with warnings.catch_warnings():  # Pillow warns at half of what it refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(path)
        with file:
            if max_side is not None:
                file.draft(None, (max_side, max_side))  # JPEG can be decoded at a half, a quarter, an eighth
            return ImageOps.exif_transpose(file)
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise SpecError(
            f"{str(path)!r} is a picture of too many pixels; expected at most {most:,}"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError is what Pillow raises for a broken PNG
        raise SpecError(
            f"{str(path)!r} cannot be read as a picture ({error}); expected a picture file"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow turns premultiplied grey into nothing but LA
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _stretch(image: Image.Image) -> Image.Image:
    """Deep grey from least to greatest value: it has no agreed white, so Pillow would clip it to blank."""
    strips = [(0, top, image.width, bottom) for top, bottom in _strips(image.height, image.width)]
    low, high = np.inf, -np.inf
    for box in strips:
        band = np.asarray(image.crop(box), dtype=np.float32)
        # NaN and infinities do not stretch the range
        finite = band[np.isfinite(band)]
        low, high = float(finite.min(initial=low)), float(finite.max(initial=high))
    grey = Image.new("L", image.size)
    for box in strips:
        band = np.asarray(image.crop(box), dtype=np.float32)
        level = np.nan_to_num((band - low) / max(high - low, 1e-12), nan=0.0, posinf=1.0, neginf=0.0)
        grey.paste(Image.fromarray(np.uint8(255 * level)), box[:2])
    return grey


def _strips(height: int, width: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """(first, past the last) row of strips of few pixels, of a multiple of ``step`` rows but for the last."""
    rows = step * max(1, _STRIP // (width * step))
    for top in range(0, height, rows):
        yield top, min(height, top + rows)


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
    channels = [np.interp(values, stops, channel) for channel in zip(*RAMP, strict=True)]
    return np.stack(channels, axis=-1).astype(np.float32)


def draw_keep(
    image: Any,
    grids: Grids,
    mask: Any,
    view: str = "stretch",
    dim: float = 0.62,
    max_side: int | None = MAX_SIDE,
    merged: Any = False,
) -> Image.Image:
    """Kept patches clear inside an outline, the others grey and darker by ``dim``.

    Args:
        image: PIL image, path, or None for a grey canvas.
        grids: (rows, cols) of each block of tokens; several blocks become panels side by side.
        mask: (N,) bool, true where a token is kept.
        view: "stretch" (tokens cover the picture) or "center" (its centred square; the rest is striped).
        dim: 0 leaves the brightness of dropped patches, 1 makes them black.
        max_side: longest side of the drawing in pixels; None draws at the size of the picture.
        merged: (N,) bool, of the others those that are not dropped but merged into kept ones: they stay in
            colour, and paler. True: all of them.
    """
    _fraction("dim", dim)
    kept_tokens = np.asarray(mask, dtype=bool)
    # one truth value stands for all tokens
    merged_tokens = np.broadcast_to(np.asarray(merged, dtype=bool), kept_tokens.shape)
    values = np.where(kept_tokens, _KEPT, np.where(merged_tokens, _MERGED, 0)).astype(np.int8)

    def paint(region: np.ndarray, shown: np.ndarray, outline: int) -> np.ndarray:
        kept = shown == _KEPT
        # mostly grey, with a trace of colour
        dropped = (0.8 * _grey(region) + 0.2 * region) * (1 - dim)
        others = np.where((shown == _MERGED)[..., None], PALE + (1 - PALE / 255) * region, dropped)
        out = np.where(kept[..., None], region, others)
        if outline:
            # a dark line outside keeps the bright one visible on light pictures
            out[_dilate(kept, outline) & ~kept] = 0
            out[kept & _dilate(~kept, outline)] = RIM
        return out

    return _panels(image, grids, values, view, paint, max_side)


def draw_scores(
    image: Any,
    grids: Grids,
    scores: Any,
    view: str = "stretch",
    alpha: float = 0.65,
    max_side: int | None = MAX_SIDE,
) -> Image.Image:
    """Heat map of (N,) scores over the grey picture, light is high; other arguments as in ``draw_keep``.

    Colours are linear between the 1st and the 99th percentile of all blocks together: single sinks would hide
    the rest.
    """
    _fraction("alpha", alpha)
    scores = np.asarray(scores, dtype=np.float64)
    # outliers are clipped to the ends, equal scores are in the middle of the ramp
    low, high = np.percentile(scores, (1, 99))
    level = np.clip((scores - low) / (high - low), 0, 1) if high > low else np.full(scores.shape, 0.5)

    def paint(region: np.ndarray, shown: np.ndarray, outline: int) -> np.ndarray:
        return alpha * ramp(shown) + (1 - alpha) * _grey(region)

    return _panels(image, grids, level, view, paint, max_side)


def _panels(
    image: Any, grids: Grids, values: np.ndarray, view: str, paint: Paint, max_side: int | None
) -> Image.Image:
    # tokens of all panels, one after the other
    count = sum(rows * cols for rows, cols in grids)
    if values.shape != (count,):
        raise SpecError(f"values have shape {values.shape}; grids {tuple(grids)} expect ({count},)")
    picture = _fitting(blank(grids[0]) if image is None else image, len(grids), max_side)
    box = view_box(picture.size, view)
    pixels = np.asarray(picture)  # (height, width, 3) bytes
    outline = _outline(box, grids)
    gap = _gap(picture.width)
    sheet = Image.new("RGB", (len(grids) * (picture.width + gap) - gap, picture.height), "white")
    start = 0
    for number, (rows, cols) in enumerate(grids):
        block = values[start : start + rows * cols].reshape(rows, cols)
        start += rows * cols
        panel = _panel(pixels, block, box, paint, outline)
        sheet.paste(Image.fromarray(panel), (number * (picture.width + gap), 0))
    return sheet


def _panel(
    pixels: np.ndarray, block: np.ndarray, box: tuple[int, int, int, int], paint: Paint, outline: int
) -> np.ndarray:
    """(height, width, 3) bytes: the picture with one block of tokens painted over their part of it."""
    left, top, right, bottom = box
    # margins that the tokens do not cover stay striped
    whole = (bottom - top, right - left) == pixels.shape[:2]
    panel = pixels.copy() if whole else _stripes(pixels)
    for first, last in _strips(bottom - top, right - left):
        start, stop = max(0, first - outline), min(bottom - top, last + outline)  # outlines reach so far
        shown = _enlarge(block, bottom - top, right - left, slice(start, stop))
        region = pixels[top + start : top + stop, left:right].astype(np.float32)
        # without the rows that only their outlines are needed of
        painted = paint(region, shown, outline)[first - start : last - start]
        panel[top + first : top + last, left:right] = painted.round().astype(np.uint8)
    return panel


def _fitting(image: Any, panels: int, max_side: int | None) -> Image.Image:
    """The picture, so small that this many panels fit side by side; refused where nothing could be seen."""
    if max_side is not None and (type(max_side) is not int or max_side < 1):
        raise SpecError(
            f"max_side={max_side!r}; expected a number of pixels, or None for the size of the picture"
        )
    picture = open_picture(image, max_side)
    if max_side is not None and panels * (picture.width + _gap(picture.width)) > max_side + _gap(
        picture.width
    ):
        # as _gap has it
        width = min(int(max_side / (1.02 * panels)), (max_side - 4 * (panels - 1)) // panels)
        if width < NARROWEST:
            raise SpecError(
                f"{panels} blocks of tokens do not fit into {max_side} pixels side by side; give a larger "
                "max_side"
            )
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    canvas = panels * (picture.width + _gap(picture.width)) * picture.height
    if canvas > CANVAS:
        raise SpecError(
            f"the drawing would have {canvas:,} pixels; expected at most {CANVAS:,}: give max_side"
        )
    return picture


def blank(grid: tuple[int, int]) -> Image.Image:
    """A grey canvas of the shape of a (rows, cols) block."""
    rows, cols = grid
    scale = BLANK_SIDE / max(rows, cols)
    return Image.new("RGB", (max(1, round(cols * scale)), max(1, round(rows * scale))), BLANK)


def _gap(width: int) -> int:
    return max(4, width // 50)


def _outline(box: tuple[int, int, int, int], grids: Grids) -> int:
    """Width of the line round kept patches; none where the smallest patch would be all outline."""
    height, width = box[3] - box[1], box[2] - box[0]
    line = max(1, round(min(height, width) / 320))
    rows, cols = np.max(np.asarray(grids), axis=0)
    return line if min(height / rows, width / cols) >= 4 * line else 0


def _enlarge(block: np.ndarray, height: int, width: int, rows: slice) -> np.ndarray:
    """These rows of a block that is drawn ``height`` x ``width`` pixels large."""
    # the patch under the middle of each pixel, in whole numbers: no seam moves by rounding
    y = (2 * np.arange(height)[rows] + 1) * block.shape[0] // (2 * height)
    x = (2 * np.arange(width) + 1) * block.shape[1] // (2 * width)
    return block[y[:, None], x]


def _dilate(mask: np.ndarray, width: int) -> np.ndarray:
    """True within ``width`` pixels of a true one, in a square neighbourhood."""
    for axis in (0, 1):
        padded = np.moveaxis(np.pad(mask, [(width, width) if a == axis else (0, 0) for a in (0, 1)]), axis, 0)
        out = np.zeros_like(np.moveaxis(mask, axis, 0))
        for start in range(2 * width + 1):
            out |= padded[start : start + out.shape[0]]
        mask = np.moveaxis(out, 0, axis)
    return mask


def _grey(pixels: np.ndarray) -> np.ndarray:
    return (pixels @ _LUMA)[..., None]


def _stripes(pixels: np.ndarray) -> np.ndarray:
    """Pixels the model never saw: pale, with diagonal stripes, like nothing inside the view."""
    height, width = pixels.shape[:2]
    period, out = max(2, min(height, width) // 40), np.empty_like(pixels)
    for top, bottom in _strips(height, width):
        stripe = (np.arange(top, bottom)[:, None] + np.arange(width)) // period % 2
        colours = np.where(stripe[..., None], *np.array(STRIPES, dtype=np.float32))
        part = 0.2 * _grey(pixels[top:bottom].astype(np.float32)) + colours
        out[top:bottom] = part.round().astype(np.uint8)
    return out


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise SpecError(f"{name}={value!r}; expected a number from 0 to 1")
