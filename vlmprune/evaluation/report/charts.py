# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: accuracy over tokens, a small panel per method; with one budget, a line per spec."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ..stats.estimates import Interval
from ..stats.summary import DENSE, Headline, Row
from .judge import BASELINES, series
from .text import count, interval, ratio

# of a panel, in units of its viewBox
WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 30
LEAST = 0.5  # tokens: a logarithm has no zero


@dataclass(frozen=True)
class Panel:
    """A picture; ``series`` is the method that it is about, empty where it is about all."""

    series: str
    svg: str


@dataclass(frozen=True)
class Frame:
    """What all panels of one model and task share: the ends of both axes."""

    tokens: Interval
    scores: Interval

    @classmethod
    def of(cls, rows: Sequence[Row], chance: float | None) -> Frame:
        tokens = [_tokens(row) for row in rows]
        # room at both ends, by a factor since the axis is logarithmic
        return cls((min(tokens) / 1.1, max(tokens) * 1.1), score_range(rows, chance))

    def x(self, tokens: float) -> float:
        low, high = map(math.log, self.tokens)
        return LEFT + (math.log(tokens) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, score: float) -> float:
        low, high = self.scores
        return TOP + (high - score) / (high - low) * (HEIGHT - TOP - BOTTOM)


def score_range(rows: Sequence[Row], chance: float | None) -> Interval:
    """Tenths around all that is drawn."""
    ends = [row.ci[0] for row in rows] + [row.band.low for row in rows if row.band]
    ends += [] if chance is None else [chance]
    low = max(0.0, math.floor(10 * min(ends)) / 10)
    high = min(1.0, math.ceil(10 * max([*ends, *(row.ci[1] for row in rows)])) / 10)
    return low, max(high, low + 0.1)  # never empty: y divides by it


def ticks(scores: Interval) -> list[float]:
    """Round numbers inside a range."""
    low, high = scores
    step = 10 if high - low < 0.55 else 20  # per cent
    # rounded first: 100 * 0.57 is 56.99999999999999
    first = math.ceil(round(100 * low) / step) * step
    return [tick / 100 for tick in range(first, round(100 * high) + 1, step)]


def panels(rows: Sequence[Row], headline: Headline | None) -> list[Panel]:
    """Panels of one model and task; ``rows`` without single seeds."""
    cut = [row for row in rows if row.spec != DENSE]
    if not cut:
        return []
    chance = headline.chance if headline else None
    curves: dict[str, list[Row]] = {}
    for row in sorted(cut, key=_tokens):
        curves.setdefault(series(row.spec), []).append(row)
    # no curve has two points, so a line for each spec says more
    if all(len(curve) == 1 for curve in curves.values()):
        return [Panel("", forest(rows, chance))]
    frame = Frame.of(rows, chance)
    # drawn once, and the same behind every curve
    behind = _axes(frame, sorted({_tokens(row) for row in rows})) + _behind(frame, curves, rows, chance)
    order = sorted(curves, key=lambda name: (name in BASELINES, name))
    return [Panel(name, _svg(name, behind + _curve(frame, curves[name]))) for name in order]


def _tokens(row: Row) -> float:
    """Where a row stands: methods that cut inside the model at their mean over the layers."""
    return max(row.layer_tokens or row.realised_tokens, LEAST)


def _says(row: Row) -> str:
    """For whoever points at it."""
    return escape(f"{row.spec}: {ratio(row.accuracy)} % {interval(row.ci)} at {count(_tokens(row))} tokens")


def _axes(frame: Frame, tokens: Sequence[float]) -> str:
    parts = []
    for tick in ticks(frame.scores):
        y = frame.y(tick)
        parts.append(_line_of("grid", (LEFT, y), (WIDTH - RIGHT, y)))
        parts.append(_text(LEFT - 5, y + 3, ratio(tick, 0), "end"))
    last = -math.inf  # place of the last label
    for value in tokens:
        x = frame.x(value)
        if x - last > 24:  # labels would touch
            parts.append(_text(x, HEIGHT - BOTTOM + 13, count(value), "middle"))
            last = x
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, "tokens per question, log scale", "end"))
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    # upright, around the place where it stands
    turned = f'transform="rotate(-90 9 {middle:.1f})"'
    parts.append(_text(9, middle, "accuracy, %", "middle", turned))
    return "".join(parts)


def _behind(frame: Frame, curves: dict[str, list[Row]], rows: Sequence[Row], chance: float | None) -> str:
    """Random, pool, dense and chance, in every panel."""
    parts = []
    # random without seeds has no band
    band = [row for row in curves.get("random", ()) if row.band]
    if band:
        parts.append(
            _area(
                frame, band, lambda row: (row.band.low, row.band.high) if row.band else row.ci, "random-band"
            )
        )
        parts.append(_polyline(frame, band, "random-line"))
    if "pool" in curves:
        parts.append(_polyline(frame, curves["pool"], "pool-line"))
    levels = [("dense-line", row.accuracy) for row in rows if row.spec == DENSE]
    levels += [] if chance is None else [("chance-line", chance)]
    for kind, score in levels:
        parts.append(_line_of(kind, (LEFT, frame.y(score)), (WIDTH - RIGHT, frame.y(score))))
    return "".join(parts)


def _curve(frame: Frame, rows: Sequence[Row]) -> str:
    parts = [_area(frame, rows, lambda row: row.ci, "band"), _polyline(frame, rows, "line")]
    for row in rows:
        x, low, high = frame.x(_tokens(row)), *map(frame.y, row.ci)
        parts.append(_line_of("whisker", (x, low), (x, high)))
        parts.append(_dot(x, frame.y(row.accuracy), _says(row)))
    return "".join(parts)


def _polyline(frame: Frame, rows: Sequence[Row], kind: str) -> str:
    points = _points(frame, [(_tokens(row), row.accuracy) for row in rows])
    return f'<polyline class="{kind}" points="{points}"/>'


def _area(frame: Frame, rows: Sequence[Row], ends: Callable[[Row], Interval], kind: str) -> str:
    low, high = ([(_tokens(row), ends(row)[side]) for row in rows] for side in (0, 1))
    # along the upper ends, and back along the lower ones
    return f'<polygon class="{kind}" points="{_points(frame, high + low[::-1])}"/>'


def _points(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _svg(name: str, body: str) -> str:
    label = escape(
        f"Accuracy over tokens of {name} with its interval; behind it random, pool, dense and chance"
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'


# --- one budget: a line per spec ------------------------------------------------------------------

NAMES, SPAN = 150, 270  # width of the names and of the axis
STEP, FOOT = 19, 34  # height of a line and of the axis


def forest(rows: Sequence[Row], chance: float | None) -> str:
    """Accuracies with their intervals, the best first; dense and chance are upright lines."""
    low, high = scores = score_range(rows, chance)
    bottom = STEP * len(rows) + 6

    def x(score: float) -> float:
        return NAMES + (score - low) / (high - low) * (SPAN - 12)

    parts = []
    for tick in ticks(scores):
        parts.append(_line_of("grid", (x(tick), 0), (x(tick), bottom)))
        parts.append(_text(x(tick), bottom + 12, ratio(tick, 0), "middle"))
    parts.append(_text(x(high), bottom + 26, "accuracy, %", "end"))
    levels = [("dense-line", row.accuracy) for row in rows if row.spec == DENSE]
    levels += [] if chance is None else [("chance-line", chance)]
    for kind, score in levels:
        parts.append(_line_of(kind, (x(score), 0), (x(score), bottom)))
    for number, row in enumerate(sorted(rows, key=lambda row: -row.accuracy)):
        y = STEP * number + STEP / 2 + 3
        parts.append(_text(NAMES - 10, y + 3.5, escape(row.spec), "end", 'data-name=""'))
        if row.band:
            left, width = x(row.band.low), x(row.band.high) - x(row.band.low)
            parts.append(
                f'<rect class="random-band" x="{left:.1f}" y="{y - 6:.1f}" width="{width:.1f}" height="12"/>'
            )
        parts.append(_line_of("whisker", (x(row.ci[0]), y), (x(row.ci[1]), y)))
        parts.append(_dot(x(row.accuracy), y, _says(row), " base" if row.method in BASELINES else ""))
    size = f"0 0 {NAMES + SPAN} {bottom + FOOT}"
    label = "Accuracy of every spec with its 95 % interval, the best first; lines for dense and chance"
    return f'<svg class="forest" viewBox="{size}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _line_of(kind: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line class="{kind}" {ends}/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{text}</text>'


def _dot(x: float, y: float, says: str, kind: str = "") -> str:
    return f'<circle class="dot{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{says}</title></circle>'
