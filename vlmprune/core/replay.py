# SPDX-License-Identifier: Apache-2.0
"""Replay: a method that cuts exactly the tokens of a KeepMap, to repeat or transplant a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvariantError
from .method import Method
from .tokens import VisualTokens


@dataclass(frozen=True)
class Replay(Method):
    """Keeps the tokens of a ``KeepMap``, in every unit of as many tokens as the map had."""

    keep_idx: tuple[int, ...]
    total: int

    name: ClassVar[str] = "replay"
    nested: ClassVar[bool] = False

    @property
    def keep(self) -> int:
        """K, the only budget it can meet."""
        return len(self.keep_idx)

    def check_unit(self, count: int) -> None:
        self._check(count, self.keep)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        self._check(tokens.count, k)
        return torch.tensor(self.keep_idx, device=tokens.device).expand(tokens.batch, -1)

    def _check(self, count: int, k: int) -> None:
        if (count, k) != (self.total, self.keep):
            raise InvariantError(
                f"asked to keep {k} of {count} tokens; this replay holds {self.keep} of {self.total}: use "
                f"keep={self.keep} and an image that yields {self.total} tokens"
            )
