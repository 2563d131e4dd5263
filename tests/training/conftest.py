# SPDX-License-Identifier: Apache-2.0
"""The bundled model, and questions to train it on."""

from __future__ import annotations

from typing import Any

import pytest

import vlmprune
from vlmprune.training.data import Data, read_data


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Model and processor."""
    return vlmprune.load("tiny")


@pytest.fixture(scope="session")
def questions() -> Data:
    """Four to train on, two others."""
    return read_data("shapes", 4, 2)
