# SPDX-License-Identifier: Apache-2.0
"""Small models of families that not every transformers knows, or that need timm; tests skip without one."""

from __future__ import annotations

from typing import Any

import pytest

from vlmprune.testing.conformance import shared_model
from vlmprune.testing.tiny_configs import missing


def skip_without(family: str) -> None:
    """Skip the test where a family cannot be built here."""
    reason = missing(family)
    if reason is not None:
        pytest.skip(reason)


def available(family: str, text: str | None = None) -> Any:
    """The small model of a family, which tests share; the test is skipped where it cannot be built."""
    skip_without(family)
    return shared_model(family, None, text)
