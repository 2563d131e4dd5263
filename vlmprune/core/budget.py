# SPDX-License-Identifier: Apache-2.0
"""Budget: how many tokens stay, of what. The only place that turns a ``keep`` into a number of tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Integral, Real

from ..checks import one_of
from ..errors import SpecError

SCOPES = ("image", "crop", "total")
LARGEST = 2**63 - 1
_FRACTION = re.compile(r"(?![0-9]+$)(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_KEEP = "expected an int >= 1 (tokens) or a float in (0, 1] (fraction kept)"


class Printed:
    """Equality and hash of the printed form, because 1 == 1.0 == True in Python while one token is not all
    tokens.

    It is what is shown, too: ``Spec('fastervlm@64')``.
    """

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Budget(Printed):
    """How much to keep of each unit.

    Args:
        keep: an int counts tokens; a float in (0, 1] is a fraction, and 1.0 is all.
        scope: what the budget is spent on: ``image``, ``crop`` (tile or frame), or ``total`` (all images of a
            sample).
    """

    keep: int | float
    scope: str = "image"

    def __post_init__(self) -> None:
        keep = self.keep
        if isinstance(keep, Integral) and not isinstance(keep, bool) and 1 <= keep <= LARGEST:
            object.__setattr__(self, "keep", int(keep))
        elif isinstance(keep, Real) and not isinstance(keep, Integral) and 0 < keep <= 1 and float(keep):
            object.__setattr__(self, "keep", float(keep))
        else:
            whole = isinstance(keep, float) and 1 < keep <= LARGEST and keep == int(keep)
            hint = f"; a number of tokens is an int: @{int(keep)}" if whole else ""
            # Python refuses to print very long ints
            given = "an int beyond 64 bits" if isinstance(keep, int) and abs(keep) > LARGEST else repr(keep)
            raise SpecError(f"keep={given} is no budget; {_KEEP}{hint}")
        one_of("scope", self.scope, SCOPES)

    def __str__(self) -> str:
        return repr(self.keep) + ("" if self.scope == "image" else f"/{self.scope}")

    @classmethod
    def of(cls, value: int | float | str | Budget, scope: str = "image") -> Budget:
        """Read a budget from a number, a text like ``"64/crop"``, or a budget; ``scope`` is its default."""
        if isinstance(value, Budget):
            return value
        if not isinstance(value, str):
            return cls(value, scope)
        text, slash, named = (piece.strip() for piece in value.partition("/"))
        scope = named if slash else scope
        if re.fullmatch("[0-9]{1,19}", text):
            return cls(int(text), scope)
        if _FRACTION.fullmatch(text):
            return cls(float(text), scope)
        percent = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]+)?|100)\s*%", text)
        hint = (
            f"; a percentage is written as a fraction: @{float(percent[1]) / 100!r}"
            if percent
            else "; write @64 or @0.25"
        )
        raise SpecError(f"budget {value!r} is not keep[/scope]; {_KEEP}{hint}")

    def count(self, n: int) -> int:
        """Tokens kept of ``n``: at least one, never more than there are, fractions rounded down."""
        if isinstance(self.keep, int):
            return min(self.keep, n)
        return min(n, max(1, share_of(n, self.keep)))


def share_of(n: int, share: float) -> int:
    """Whole tokens in a share of n, rounded down."""
    # 0.29 * 100 is 28.999999999999996: the product is rounded before the floor
    return math.floor(round(share * n, 6))
