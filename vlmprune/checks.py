# SPDX-License-Identifier: Apache-2.0
"""Checks of options, with the errors that they raise."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import SpecError, did_you_mean

_FINITE = sys.float_info.max


def one_of(option: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless an option has one of the allowed values."""
    if value not in allowed:
        near = did_you_mean(str(value), map(str, allowed))
        raise SpecError(f"{option}={value!r} is unknown; expected one of {list(allowed)}.{near}")


def check_int(option: str, value: object, least: int | None = None, most: int | None = None) -> None:
    """Raise unless an option is an integer between two bounds."""
    low, high = (-(2**63) if least is None else least), (2**63 if most is None else most)
    # not isinstance, for which True is an integer
    if type(value) is not int or not low <= value <= high:
        expected = (
            "an integer"
            + ("" if least is None else f" of at least {least}")
            + ("" if most is None else f", at most {most}")
        )
        raise SpecError(f"{option}={value!r}; expected {expected}")


def check_ids(option: str, ids: Sequence[object]) -> None:
    """Raise unless an option lists token ids."""
    if not all(type(number) is int and number >= 0 for number in ids):
        raise SpecError(f"{option}={ids!r}; expected token ids, whole numbers from 0 on")


def check_number(option: str, value: object, least: float, most: float = _FINITE) -> None:
    """Raise unless an option is a finite number between two bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        expected = f"from {least:g} to {most:g}" if most < _FINITE else f"of at least {least:g}"
        raise SpecError(f"{option}={value!r}; expected a number {expected}")


def check_positive(option: str, value: object) -> None:
    """Raise unless an option is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SpecError(f"{option}={value!r}; expected a number above 0")


def check_layers(option: str, layers: Sequence[object], first: int, count: int | None = None) -> None:
    """Raise unless an option lists ascending decoder layers: one or more, or exactly ``count``."""
    known = [layer for layer in layers if type(layer) is int and layer >= first]
    # all of them layers, in order, and none twice
    ascending = known == list(layers) == sorted(set(known))
    if not ascending or not (layers if count is None else len(layers) == count):
        number = "" if count is None else f"{count} "
        raise SpecError(f"{option}={layers!r}; expected {number}ascending decoder layers from {first} on")


def check_apart(option: str, out: Path, inputs: Iterable[Path]) -> None:
    """Raise where an output is one of the files that are read, by whatever name or link it is given."""
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise SpecError(
                f"{option} {str(out)!r} is the file {str(path)!r} itself, which would be overwritten; choose "
                "another name"
            )


def check_cuts(spec: str, dense: Sequence[int], realised: Sequence[int], what: str, instead: str) -> None:
    """Raise where a spec left all visual tokens of pictures, so that nothing can be measured."""
    if list(realised) == list(dense):
        raise SpecError(
            f"{spec!r} cuts nothing of {what}, whose pictures have {list(dense)} visual tokens; give a "
            f"budget below that, such as 0.25, or {instead}"
        )
