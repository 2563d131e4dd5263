# SPDX-License-Identifier: Apache-2.0
"""Things by name, each loaded when it is asked for: built-in ones, and what other packages offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from importlib import import_module, metadata
from typing import Generic, NamedTuple, TypeVar

from .errors import VlmPruneError, reason

T = TypeVar("T")


class Offers(NamedTuple):
    """Entry points of a group by name. One that does it wrongly is refused alone, with a reason.

    Args:
        points: those that may be loaded.
        clashes: names that two packages claim, none of which gets it, and the reason.
        refused: all reasons why entry points are not used, to be shown.
    """

    points: dict[str, metadata.EntryPoint]
    clashes: dict[str, str]
    refused: list[str]


@dataclass(eq=False)
class LazyTable(Generic[T]):
    """What is asked for by name, and imported then.

    Args:
        what: what one of them is, for messages.
        builtin: name -> "module:attribute"; a module with a dot in front is below ``package``.
        error: raised where what another package offers does not load.
        group: entry points that add to the table; without it, nobody can.
    """

    what: str
    builtin: Mapping[str, str]
    error: type[VlmPruneError]
    _: KW_ONLY
    group: str = ""
    package: str | None = None

    @cached_property
    def offers(self) -> Offers:
        """Of other packages, which are looked for once; loads none."""
        found = Offers({}, {}, [])
        try:
            offered = list(metadata.entry_points(group=self.group)) if self.group else []
        except Exception as error:  # one package with a broken list is enough to stop the reader
            found.refused.append(f"the entry points of installed packages cannot be read: {reason(error)}")
            return found
        for point in offered:
            known = found.points.get(point.name)
            taken = self.builtin.get(point.name) or (known.value if known else point.value)
            # an editable install may be listed twice: the same value again is no clash
            if taken == point.value:
                found.points[point.name] = point
                continue
            why = (
                f"entry point {point.name!r} = {point.value!r} of group {self.group!r} takes the name of "
                f"{taken!r}; uninstall the package that declares it, or have it renamed there"
            )
            found.refused.append(why)
            if point.name not in self.builtin:
                found.clashes[point.name] = why
        for name in found.clashes:
            del found.points[name]
        return found

    def refresh(self) -> None:
        """Look for other packages again."""
        # where cached_property keeps its value
        self.__dict__.pop("offers", None)

    def __contains__(self, name: object) -> bool:
        return name in self.builtin or name in self.offers.points

    def names(self) -> list[str]:
        """Sorted; loads none."""
        return sorted({*self.builtin, *self.offers.points})

    def origin(self, name: str) -> str:
        """Where a thing comes from, as "module:attribute"."""
        return self.builtin[name] if name in self.builtin else self.offers.points[name].value

    def load(self, name: str) -> T:
        """Import it. Code of other packages may raise anything: it becomes one error."""
        if name in self.builtin:
            module, _, attribute = self.builtin[name].partition(":")
            return getattr(import_module(module, self.package), attribute)
        point = self.offers.points[name]
        try:
            return point.load()
        except (Exception, SystemExit) as error:
            raise self.error(
                f"{self.what} {name!r}: its entry point {point.value!r} does not load: {reason(error)}; "
                "repair or uninstall that package"
            ) from error
