# SPDX-License-Identifier: Apache-2.0
"""Which tests of the families that came later run by default: a sample by names; ``-m slow`` runs all."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

from vlmprune.testing.tiny import FAMILIES

FIRST = FAMILIES[:15]  # with every kind of geometry and of attention between them; these run in full
LATER = FAMILIES[15:]


def sampled(name: str, one_in: int) -> bool:
    """One in so many names, always the same ones."""
    return zlib.crc32(name.encode()) % one_in == 0


def param(test: str, family: str, *more: Any, one_in: int = 4) -> Any:
    """A case of a test, marked slow where its family came later and its name is not in the sample."""
    name = "-".join([family, *map(str, more)])
    slow = family in LATER and not sampled(f"{test} {name}", one_in)
    return pytest.param(family, *more, id=name, marks=pytest.mark.slow if slow else ())


def slow_tests_run(config: pytest.Config) -> bool:
    """Whether this run takes tests marked slow; otherwise the largest tables make no cases of them."""
    return "not slow" not in config.option.markexpr
