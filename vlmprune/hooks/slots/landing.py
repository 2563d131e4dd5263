# SPDX-License-Identifier: Apache-2.0
"""Default schedules on decoders of which only some layers attend: cuts land on the nearest that do.

A method that cuts inside the language model ranks by layers that attend. In hybrids (gated delta, short
convolutions) those of a published schedule often do not. A default moves, which reports say; layers that a
user wrote stay, and are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from typing import TypeVar

from torch import nn

from ...core.budget import Budget
from ...core.method import Method
from ..attention_tap import find_attention
from . import Attachment

M = TypeVar("M", bound=Method)


def land(attachment: Attachment, method: Method, budget: Budget | None, count: int) -> Method:
    """``landed`` for what is attached, unless its spec names the layers; reports say where it moved to."""
    if is_written(method, attachment.spec):
        return method
    moved = landed(method, attachment.adapter.language_model.layers, budget, count)
    if moved is not method and method.landing is not None:
        option, _ = method.landing
        where = getattr(moved, option)
        attachment.notes.append(f"{option}={where} of {method.name}: the nearest layers that attend")
    return moved


def is_written(method: Method, spec: str) -> bool:
    """Whether a spec names the option with the layers of a method, also where it repeats the default."""
    if method.landing is None:
        return True
    option, _ = method.landing
    return re.search(rf"\b{re.escape(method.name)}\((?:[^)]*,)?\s*{option}\s*=", spec) is not None


def landed(method: M, layers: Sequence[nn.Module], budget: Budget | None, count: int) -> M:
    """The method with its default cuts where the nearest layers attend; itself where all do, where it was
    given layers, or where too few attend.

    Args:
        layers: of the decoder.
        count: visual tokens of a picture, to ask for cuts.
    """
    if method.landing is None:
        return method
    option, behind = method.landing
    held = {one.name: one.default for one in fields(method)}
    default = held.get(option, MISSING)  # a wrapper has another method's schedule, and not its option
    if default is MISSING or getattr(method, option) != default:
        return method
    sources = [point.source for point in method.cuts(len(layers), budget, count) if point.source is not None]
    if all(find_attention(layers[source]) is not None for source in sources):
        return method
    # a cut behind the last layer would drop nothing
    attending = [
        index for index, layer in enumerate(layers[:-1]) if index + behind > 0 and find_attention(layer)
    ]
    found = nearest(sources, attending)
    if found is None:
        return method
    values = tuple(source + behind for source in found)
    return replace(method, **{option: values if option == "layers" else values[0]})


def nearest(wanted: Sequence[int], there: Sequence[int]) -> list[int] | None:
    """For every number the nearest one that is there, ascending and no two the same; the larger of two as
    near. None: there are too few.
    """
    found: list[int] = []
    for place, number in enumerate(wanted):
        # those that later numbers will need are not taken
        last = len(there) - (len(wanted) - place - 1)
        free = [one for one in there[: max(last, 0)] if not found or one > found[-1]]
        if not free:
            return None
        found.append(min(free, key=lambda one: (abs(one - number), -one)))
    return found
