# SPDX-License-Identifier: Apache-2.0
"""Stands in for every class of a family that is not served: whatever name is asked of it, it refuses."""

from __future__ import annotations

from typing import NoReturn

from .plugin import refusal


def __getattr__(name: str) -> NoReturn:
    # what Python itself asks of a module, such as __path__
    if name.startswith("__"):
        raise AttributeError(name)
    raise refusal(name)
