# SPDX-License-Identifier: Apache-2.0
"""Every error of the package. Each message says what was given, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmPruneError(Exception):
    """Root of all errors raised on purpose by vlmprune."""


class SpecError(VlmPruneError, ValueError):
    """A spec, budget or option that cannot be understood."""


class UnsupportedError(VlmPruneError):
    """A model family, tower or mode that cannot do what was asked; names the nearest thing that works."""


class CaptureError(VlmPruneError):
    """Something a method needs could not be read from the model."""


class GridError(CaptureError, UnsupportedError):
    """A method needs the rows and columns that tokens form, and they are not known."""


class InvariantError(VlmPruneError):
    """The library caught itself, a method or a caller about to produce a wrong result."""


class EvaluationError(VlmPruneError):
    """A benchmark run that failed; never turned into an empty answer."""


def did_you_mean(word: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.5) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known word, or an empty string.

    Args:
        most: words to name. cutoff: least similarity, 0 to 1; in a long list some word is always half alike.
    """
    near = difflib.get_close_matches(str(word), list(known), n=most, cutoff=cutoff)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def reason(error: BaseException) -> str:
    """An error of somebody else's code in one line."""
    return " ".join([f"{type(error).__name__}:", *str(error).split()]).rstrip(":")
