# SPDX-License-Identifier: Apache-2.0
"""Frames of a clip side by side, each with its kept tokens; needs Pillow and numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image, ImageDraw, ImageFont

from ..errors import SpecError
from .overlay import MAX_SIDE, draw_keep

ACROSS = 8  # frames in a row of the sheet
LARGEST, SMALLEST = 320, 48  # pixels of a frame
GAP, LINE = 6, 20  # pixels between frames; height of a line of text
INK, QUIET = (32, 32, 32), (150, 150, 150)


class FrameMap(Protocol):
    """What is drawn of a frame; a ``KeepMap`` is one."""

    @property
    def grids(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def mask(self) -> Any: ...

    @property
    def view(self) -> str: ...

    @property
    def total(self) -> int: ...

    @property
    def merged(self) -> Any: ...

    def __len__(self) -> int: ...


def draw_strip(
    frames: Sequence[Image.Image],
    maps: Sequence[FrameMap],
    labels: Sequence[str] = (),
    merged: bool = False,
    max_side: int = MAX_SIDE,
) -> Image.Image:
    """A sheet of the frames of a clip with kept patches clear, and below each its label and count.

    Args:
        frames: all of one size.
        maps: what was kept, in order; where a model reads several frames as one, there are fewer maps, and
            the first frame of each group is shown.
        labels: one for each frame, such as its time.
        merged: other tokens are merged into the kept ones, and stay in colour, and paler: of maps that do not
            say themselves which ones are.
        max_side: most pixels of the sheet from left to right.
    """
    if not frames or not maps or len(maps) > len(frames) or len(labels) not in (0, len(frames)):
        raise SpecError(
            f"{len(frames)} frames, {len(maps)} maps and {len(labels)} labels; expected a frame and a label "
            "for each map, or more frames where a model reads several as one"
        )
    # frames that the model reads as one, rounded up
    group = -(-len(frames) // len(maps))
    across = min(ACROSS, len(maps))
    wide = min(LARGEST, max_side // across - GAP)
    if wide < SMALLEST:
        raise SpecError(
            f"{across} frames do not fit into {max_side} pixels side by side; give max_side of "
            f"{across * (SMALLEST + GAP)} or more"
        )
    tall = max(1, round(wide * frames[0].height / frames[0].width))
    panels = [
        draw_keep(
            frames[number * group].resize((wide, tall), Image.Resampling.LANCZOS),
            one.grids,
            one.mask,
            one.view,
            merged=merged if one.merged is None else one.merged,
        )
        for number, one in enumerate(maps)
    ]
    names = list(labels) or [f"frame {number + 1}" for number in range(len(frames))]
    return sheet(panels, names[::group], [f"{len(one)} of {one.total}" for one in maps], across)


def sheet(
    panels: Sequence[Image.Image], labels: Sequence[str], counts: Sequence[str] = (), across: int = ACROSS
) -> Image.Image:
    """Panels of one size in rows, and below each its label on the left and its count on the right."""
    across = min(across, len(panels))
    wide, tall = panels[0].size
    down = -(-len(panels) // across)
    made = Image.new("RGB", (across * (wide + GAP) + GAP, down * (tall + LINE + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(12)
    for number, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        x, y = GAP + number % across * (wide + GAP), GAP + number // across * (tall + LINE + GAP)
        made.paste(panel, (x, y))
        draw.text((x, y + tall + 3), label, INK, font)
        if counts:
            # "0 of 36": a frame that kept nothing is written pale
            quiet = counts[number].split()[0] == "0"
            draw.text((x + wide, y + tall + 3), counts[number], QUIET if quiet else INK, font, "ra")
    return made
