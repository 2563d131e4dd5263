# SPDX-License-Identifier: Apache-2.0
"""Curves as inline SVG: accuracy over tokens, one small panel per method, baselines behind each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

from .table import BASELINES, count, interval, ratio, series

WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 34, 10, 10, 30
Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One curve: its name and its picture."""

    name: str
    svg: str


@dataclass(frozen=True)
class Frame:
    """What all panels of one model and task share: axes, and what is drawn behind the curve."""

    tokens: tuple[float, float]
    scores: tuple[float, float]

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> Frame:
        rows = list(rows)
        tokens = [_tokens(row) for row in rows]
        low = min(min(row["ci"][0], (row.get("band") or {}).get("low", 1)) for row in rows)
        high = max(row["ci"][1] for row in rows)
        low, high = max(0, math.floor(10 * low) / 10), min(1, math.ceil(10 * high) / 10)
        return cls((min(tokens) / 1.1, max(tokens) * 1.1), (low, max(high, low + 0.1)))

    def x(self, tokens: float) -> float:
        low, high = map(math.log, self.tokens)
        return LEFT + (math.log(tokens) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, score: float) -> float:
        low, high = self.scores
        return TOP + (high - score) / (high - low) * (HEIGHT - TOP - BOTTOM)


def panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Panels of one model and task; ``rows`` without single seeds."""
    dense = next((row for row in rows if row["spec"] == "dense"), None)
    cut = [row for row in rows if row is not dense]
    if not cut:
        return []
    frame = Frame.of(rows)
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(cut, key=_tokens):
        curves.setdefault(series(row["spec"]), []).append(row)
    behind = _axes(frame, sorted({_tokens(row) for row in rows})) + _behind(frame, curves, dense)
    order = sorted(curves, key=lambda name: (name in BASELINES, name))
    return [Panel(name, _svg(name, behind + _curve(frame, curves[name]))) for name in order]


def _tokens(row: dict[str, Any]) -> float:
    """Where a row stands: methods that cut inside the model at their mean over the layers."""
    return row.get("layer_tokens") or row["realised_tokens"]


def _axes(frame: Frame, tokens: list[float]) -> str:
    low, high = frame.scores
    parts = []
    step = 0.1 if high - low < 0.55 else 0.2
    for tick in (low + step * i for i in range(round((high - low) / step) + 1)):
        y = frame.y(min(tick, high))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{ratio(tick, 0)}</text>')
    last = -math.inf
    for value in tokens:
        x = frame.x(value)
        if x - last > 24:  # labels would touch
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="middle">{count(value)}</text>')
            last = x
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">tokens per question, log scale</text>'
    )
    return "".join(parts)


def _behind(frame: Frame, curves: dict[str, list[dict[str, Any]]], dense: dict[str, Any] | None) -> str:
    parts = []
    band = [row for row in curves.get("random", ()) if row.get("band")]
    if band:
        parts.append(_area(frame, band, lambda row: (row["band"]["low"], row["band"]["high"]), "random-band"))
        parts.append(_line(frame, band, "random-line"))
    if "pool" in curves:
        parts.append(_line(frame, curves["pool"], "pool-line"))
    if dense:
        y = frame.y(dense["accuracy"])
        parts.append(f'<line class="dense-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return "".join(parts)


def _curve(frame: Frame, rows: list[dict[str, Any]]) -> str:
    parts = [_area(frame, rows, lambda row: row["ci"], "band"), _line(frame, rows, "line")]
    for row in rows:
        x, low, high = frame.x(_tokens(row)), *map(frame.y, row["ci"])
        says = f"{row['spec']}: {ratio(row['accuracy'])} % {interval(row['ci'])} at {count(_tokens(row))} tokens"
        parts.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{frame.y(row["accuracy"]):.1f}" r="3.5"><title>{escape(says)}</title></circle>'
        )
    return "".join(parts)


def _line(frame: Frame, rows: list[dict[str, Any]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{_points(frame, [(_tokens(row), row["accuracy"]) for row in rows])}"/>'


def _area(frame: Frame, rows: list[dict[str, Any]], ends: Callable[[dict[str, Any]], tuple[float, float]], kind: str) -> str:
    low, high = ([(_tokens(row), ends(row)[side]) for row in rows] for side in (0, 1))
    return f'<polygon class="{kind}" points="{_points(frame, high + low[::-1])}"/>'


def _points(frame: Frame, points: list[Point]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _svg(name: str, body: str) -> str:
    label = escape(f"Accuracy over tokens of {name}, with its interval, random, pool and dense behind it")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'
