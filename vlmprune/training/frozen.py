# SPDX-License-Identifier: Apache-2.0
"""What all trainings share: a model that stays as it is, and weights beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..models import adapter_for
from .data import Exercise, check_masks

_SAMPLED = 8  # values of each parameter by which models are told apart


class OfFrozen:
    """Base of the trainings.

    Args:
        model, processor: the model, which stays frozen.
        seed: of the first weights, which are made next.
    """

    method: ClassVar[str]
    budgeted: ClassVar[bool] = True
    module: nn.Module

    def __init__(self, model: Any, processor: Any, seed: int) -> None:
        self.model, self.processor, self.adapter = model, processor, adapter_for(model)
        check_masks(self.adapter, self.method)
        self.language_model: Any = self.adapter.language_model
        self.wide: int = self.language_model.config.hidden_size
        torch.manual_seed(seed)

    def parameters(self, first: Iterable[tuple[str, Tensor]]) -> nn.ParameterDict:
        """Parameters on the device of the model, by the names that ``tensors`` gives."""
        # in a ParameterDict names have no dots
        return nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(value.to(self.model.device)) for name, value in first}
        )

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name."""
        return {name.replace("/", "."): one for name, one in self.module.named_parameters()}

    @cached_property
    def model_digest(self) -> str:
        """Of names, shapes and a few values of the model: what tells it from others of its backbone."""
        found = hashlib.sha256()
        for name, value in self.model.named_parameters():
            found.update(f"{name}{tuple(value.shape)}".encode())
            # values that accelerate keeps on a disk are not here
            if not value.is_meta:
                found.update(repr(value.detach().flatten()[:_SAMPLED].tolist()).encode())
        return found.hexdigest()[:16]

    def exactly(self) -> torch.autocast:
        """Within it operations keep float32, also in a pass that is in half precision."""
        return torch.autocast(self.model.device.type, enabled=False)

    def prepare(self, asked: Sequence[Exercise], folder: Path, batch: int) -> None:
        """Nothing, where every step reads the model itself."""
