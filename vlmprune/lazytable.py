# SPDX-License-Identifier: Apache-2.0
"""What other packages offer by entry points. One that does it wrongly is refused alone, with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

from .errors import VlmPruneError


class Offers(NamedTuple):
    """Entry points of a group by name.

    Args:
        points: those that may be loaded.
        clashes: names that two packages claim, none of which gets it, and the reason.
        refused: all reasons why entry points are not used, to be shown.
    """

    points: dict[str, metadata.EntryPoint]
    clashes: dict[str, str]
    refused: list[str]


def discover(group: str, builtin: Mapping[str, str]) -> Offers:
    """The entry points of a group beside what is built in (name -> "module:attribute"); loads none."""
    found = Offers({}, {}, [])
    try:
        offered = list(metadata.entry_points(group=group))
    except Exception as error:  # one package with a broken list is enough to stop the reader
        found.refused.append(f"the entry points of installed packages cannot be read: {reason(error)}")
        return found
    for point in offered:
        known = found.points.get(point.name)
        taken = builtin.get(point.name) or (known.value if known else point.value)
        # an editable install may be listed twice: the same value again is no clash
        if taken == point.value:
            found.points[point.name] = point
            continue
        why = (
            f"entry point {point.name!r} = {point.value!r} of group {group!r} takes the name of {taken!r}; "
            "uninstall the package that declares it, or have it renamed there"
        )
        found.refused.append(why)
        if point.name not in builtin:
            found.clashes[point.name] = why
    for name in found.clashes:
        del found.points[name]
    return found


def load(what: str, point: metadata.EntryPoint, kind: type[VlmPruneError]) -> Any:
    """What an entry point names. Code of others may raise anything: it becomes one error of ``kind``."""
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise kind(
            f"{what}: its entry point {point.value!r} does not load: {reason(error)}; repair or uninstall "
            "that package"
        ) from error


def reason(error: BaseException) -> str:
    """An error of somebody else's code in one line."""
    return " ".join([f"{type(error).__name__}:", *str(error).split()]).rstrip(":")
