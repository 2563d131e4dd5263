# SPDX-License-Identifier: Apache-2.0
"""How objects show themselves in a notebook: plain HTML, pictures with captions and tables, and a slider."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import SpecError, UnsupportedError

if TYPE_CHECKING:
    from PIL import Image

LEAST_WIDTH = 320  # pixels on the screen; of a smaller picture a patch would be a speck


class Shows(Protocol):
    """What shows itself in a cell: maps, reports, specs."""

    def _repr_html_(self) -> str: ...


class Keeps(Protocol):
    """Scores of tokens, of which some can be kept: a ``ScoreMap``."""

    def __len__(self) -> int: ...

    def keep(self, keep: int, /) -> Any: ...


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def figure(image: Image.Image, caption: str) -> str:
    """A picture with a line of text below it."""
    data = b64encode(png(image)).decode()
    # in the page itself: a notebook that is sent on keeps its pictures
    times = max(1, -(-LEAST_WIDTH // image.width))  # whole, so that pixels stay squares
    style = "max-width: 100%" + "; image-rendering: pixelated" * (times > 1)
    size = f'width="{times * image.width}" style="{style}"'
    shown = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}" {size}>'
    return f"<figure>{shown}<figcaption><code>{escape(caption)}</code></figcaption></figure>"


def facts(title: str, rows: Mapping[str, object]) -> str:
    """A table of two columns below a title; ``names`` in double backticks become code."""
    left = 'style="text-align: left"'
    cells = "".join(
        f"<tr><th {left}>{escape(name)}</th><td {left}>{_text(rows[name])}</td></tr>" for name in rows
    )
    return f"<table><caption {left}><code>{escape(title)}</code></caption>{cells}</table>"


def _text(value: object) -> str:
    # escaped first: the tags put in here are the only ones
    return re.sub("``(.+?)``", r"<code>\1</code>", escape(str(value)))


@dataclass(frozen=True)
class SideBySide:
    """Things that show themselves, next to each other as far as the window is wide, each below its title."""

    things: tuple[Shows, ...]
    titles: tuple[str, ...]

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<div style="margin: 0 16px 12px 0"><div><b>{escape(title)}</b></div>{thing._repr_html_()}</div>'
            for thing, title in zip(self.things, self.titles, strict=True)
        )
        return f'<div style="display: flex; flex-wrap: wrap">{cells}</div>'


def beside(things: Iterable[Shows], titles: Iterable[str] | None = None) -> SideBySide:
    """Maps, reports or specs next to each other: ``beside(run.last.keep)`` as the last line of a cell.

    Args:
        things: what shows itself in a cell.
        titles: a line of text above each.
    """
    shown = tuple(things)
    named = ("",) * len(shown) if titles is None else tuple(titles)
    if len(named) != len(shown):
        raise SpecError(f"{len(named)} titles were given for {len(shown)} things; expected one for each")
    return SideBySide(shown, named)


@dataclass(frozen=True)
class Sheet:
    """A table whose lines are given as mappings; columns in the order in which they are first met."""

    lines: tuple[Mapping[str, object], ...]

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys(name for line in self.lines for name in line))
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{_text(line.get(name, ''))}</td>" for name in names) + "</tr>"
            for line in self.lines
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def sheet(lines: Sequence[Mapping[str, object]]) -> Sheet:
    """Lines of a table, as in ``sheet([{"spec": "dense", "answer": "yes"}])``."""
    return Sheet(tuple(lines))


def slider(scores: Keeps, keep: int | None = None) -> Any:
    """A slider over the number of kept tokens, above the map of them, which follows it.

    Args:
        scores: a ``ScoreMap``.
        keep: where the slider stands at first; a quarter of the tokens unless given.
    """
    try:
        from ipywidgets import HTML, IntSlider, VBox
    except ImportError as error:
        raise UnsupportedError(
            "the slider is a widget of ipywidgets, which is not installed; install the extra in the clone: "
            'pip install -e ".[notebook]"'
        ) from error
    most = len(scores)
    start = max(1, most // 4) if keep is None else keep
    if type(start) is not int or not 1 <= start <= most:
        raise SpecError(f"keep={keep!r}; expected a number of tokens from 1 to {most}")
    # drawn when the mouse is let go: maps of large pictures take longer than a slide
    chosen = IntSlider(value=start, min=1, max=most, description="keep", continuous_update=False)
    drawing = HTML()

    def draw(change: object = None) -> None:
        drawing.value = scores.keep(chosen.value)._repr_html_()

    chosen.observe(draw, names="value")
    draw()
    return VBox([chosen, drawing])
