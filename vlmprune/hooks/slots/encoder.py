# SPDX-License-Identifier: Apache-2.0
"""The encoder slot: shortens inside the vision tower, so that its later blocks read fewer patches."""

from __future__ import annotations

from ...core.budget import Budget
from ...core.method import Method
from ..state import ForwardState
from . import Attachment, Handle


class EncoderSlot:
    """Shortens the sequence of a vision tower between two of its blocks."""

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        self.attachment, self.method, self.budget = attachment, method, budget

    def hooks(self) -> list[Handle]:
        return []

    def enter(self, state: ForwardState) -> None: ...

    def missed(self, state: ForwardState) -> set[int]:
        return set()
