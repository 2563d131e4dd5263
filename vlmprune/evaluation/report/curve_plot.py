# SPDX-License-Identifier: Apache-2.0
"""Plots of accuracy curves, against the budget as announced and against what decoder layers really read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from ..stats.curves import CurvePoint, Curves

# told apart by colour-blind readers; markers tell them apart in print
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#6A3D9A", "#56B4E9", "#8C6D1F", "#CC79A7")
MARKERS = "osD^vP*X<>hp"
BASELINES = {"random": ("#888888", ":"), "uniform": ("#555555", "--"), "pool": ("#000000", "-.")}
Value = Callable[["CurvePoint"], Any]  # a share, (value, low, high), or None
Place = Callable[["CurvePoint"], float]


def draw_curves(curves: Curves, what: str, path: str | PathLike[str]) -> None:
    """Six panels: accuracy twice, both groups, needles, tokens on the object; ``what`` begins the title."""
    plt = _pyplot()
    rows = curves.rows
    figure, axes = plt.subplots(2, 3, figsize=(17, 10.5), layout="constrained")
    headline = len(curves.headline.families) or len(rows[0].row.families)
    accuracy = _accuracy("all", "all")
    panels: list[tuple[str, Value, Place]] = [
        (f"Accuracy, {headline} families", accuracy, _share),
        (f"Accuracy, {headline} families", accuracy, _layer_share),
        ("Kept tokens on the object asked about", lambda point: point.row.on_object, _share),
        ("General questions", _accuracy("groups", "general"), _layer_share),
        ("Text reading", _accuracy("groups", "text"), _layer_share),
        ("Needles in clutter", _accuracy("families", "needle"), _layer_share),
    ]
    for axis, (title, value, across) in zip(axes.flat, panels, strict=True):
        _panel(axis, rows, value, across)
        axis.set_title(title)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
    figure.suptitle(f"{what}, {rows[0].row.n} questions; 95 % intervals over images")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _share(point: CurvePoint) -> float:
    return point.share


def _layer_share(point: CurvePoint) -> float:
    return point.layer_share


def _accuracy(kind: str, name: str) -> Value:
    return lambda point: getattr(point.accuracies, kind).get(name)


def _panel(axis: Any, rows: Sequence[CurvePoint], value: Value, across: Place) -> None:
    dense = rows[0]
    drawn = False
    styles = _styles(list(dict.fromkeys(point.label for point in rows[1:])))
    for label, style in styles.items():
        # from many tokens to few, as the axis goes
        mine = sorted([point for point in rows[1:] if point.label == label], key=lambda point: -across(point))
        # every curve begins at the dense model
        points = [(across(point), value(point)) for point in (dense, *mine) if value(point) is not None]
        if len(points) < 2:
            continue  # a curve of one point
        drawn = True
        xs = [x for x, _ in points]
        ys = [y[0] if isinstance(y, tuple) else y for _, y in points]  # without its interval
        axis.plot(xs, ys, label=label, **style)
        if isinstance(points[0][1], tuple):
            lows, highs = ([y[side] for _, y in points] for side in (1, 2))
            alpha = 0.25 if label == "random" else 0.06  # the band of random is what others are seen against
            axis.fill_between(xs, lows, highs, color=style["color"], alpha=alpha, linewidth=0)
    axis.set_xscale("log", base=2)
    # falling: from all tokens on the left to few on the right
    axis.set_xlim(1.06, 0.055)
    axis.set_xticks([1, 0.5, 0.25, 0.125, 0.0625], ["100 %", "50 %", "25 %", "12.5 %", "6.25 %"])
    axis.set_xlabel("tokens kept" if across is _share else "tokens read, mean over decoder layers")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if not drawn:
        axis.text(0.5, 0.5, "not in the headline", transform=axis.transAxes, ha="center")


def _styles(labels: list[str]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    # what stands around others has no colour of its own
    bases = list(dict.fromkeys(label.split("+")[-1] for label in labels if label not in BASELINES))
    # baselines first, and so below the methods
    for label in sorted(labels, key=lambda label: label not in BASELINES):
        if label in BASELINES:
            colour, line = BASELINES[label]
            styles[label] = {"color": colour, "linestyle": line, "linewidth": 2}
            continue
        number = bases.index(label.split("+")[-1])  # a wrapper looks like what it wraps, dashed
        styles[label] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": "--" if "+" in label else "-",
            "markerfacecolor": "white" if "+" in label else COLOURS[number % len(COLOURS)],
            "linewidth": 1.5,
            "markersize": 6,
        }
    return styles


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UnsupportedError("plots need matplotlib: pip install matplotlib") from error
    # draws into files, also where there is no screen
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
