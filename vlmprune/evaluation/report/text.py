# SPDX-License-Identifier: Apache-2.0
"""How numbers read in every table: shares as per cent, differences with their sign, times with a unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

NOTHING = "\N{EN DASH}"


def ratio(value: float | None, digits: int = 1) -> str:
    """0.783 -> "78.3"; the unit, per cent, stands in the heading."""
    return NOTHING if value is None else f"{100 * value:.{digits}f}"


def signed(value: float) -> str:
    """0.083 -> "+8.3"; what rounds to nothing has no sign."""
    text = f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return text if text[1:] != "0.0" else "0.0"  # neither +0.0 nor a minus in front of it


def interval(pair: Sequence[float], show: Callable[[float], str] = ratio) -> str:
    return f"[{show(pair[0])}, {show(pair[1])}]"


def p_value(value: float) -> str:
    """With its sign: "= 0.012", "< 0.001"."""
    if value < 0.001:
        return "< 0.001"
    return f"= {value:.{3 if value < 0.1 else 2}f}"


def count(value: float | None) -> str:
    if value is None:
        return NOTHING
    # what one decimal would show as .0
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def plural(number: int, what: str) -> str:
    """1 -> "1 question", 2 -> "2 questions"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.{0 if value >= 0.1 else 1}f} ms"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def large(value: float | None, units: Sequence[str], base: int) -> str:
    """A number with the unit that keeps it short."""
    if value is None:
        return NOTHING
    for unit in units[:-1]:
        if value < base:
            return f"{value:.3g} {unit}"
        value /= base
    return f"{value:.3g} {units[-1]}"


def flops(value: float | None) -> str:
    return large(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"), 1000)


def size(value: float | None) -> str:
    return large(value, ("B", "KiB", "MiB", "GiB"), 1024)


def layers(tokens: Sequence[float] | None) -> str:
    """Runs of equal numbers: "576 x 2, 64 x 30" for 32 layers."""
    if not tokens:
        return NOTHING
    runs = [(value, len(list(group))) for value, group in groupby(tokens)]
    if len(runs) == 1:
        return count(runs[0][0])
    return ", ".join(f"{count(value)} \N{MULTIPLICATION SIGN} {length}" for value, length in runs)
