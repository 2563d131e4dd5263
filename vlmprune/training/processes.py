# SPDX-License-Identifier: Apache-2.0
"""What accelerate does for a training: processes that share the steps, and passes in half precision.

Started by ``torchrun`` or ``accelerate launch``, every process holds the model and the weights, takes its
part of the questions of a step, and the gradients are averaged. The first process alone writes files and
answers questions.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..checks import one_of
from ..errors import SpecError, UnsupportedError, VlmPruneError

Precision = Literal["no", "bf16"]
PRECISIONS = get_args(Precision)
# the first process looks at questions, and answers them, while the others wait
_PATIENCE = timedelta(hours=12)
# DeepSpeed and FSDP spread weights, which the checkpoints of the loop do not know
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")


class TrainingError(VlmPruneError):
    """A training that cannot go on; what was written before stays."""


def check_precision(value: str) -> None:
    """Raise where it is none that a training can be resumed with."""
    if value == "fp16":
        raise SpecError(
            "precision='fp16' scales its gradients by what earlier steps gave, which no checkpoint here "
            "holds; use 'bf16'"
        )
    one_of("precision", value, PRECISIONS)


def accelerated(device: torch.device, precision: str = "no") -> Any:
    """The Accelerator of this process, for weights on a device; the processes are those of the launcher."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise UnsupportedError(
            f"training needs accelerate, which is not here ({error}); pip install accelerate"
        ) from error
    try:
        # weights stay where the model is, which device_map may have put on several devices
        found = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=precision,
            device_placement=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
    except ValueError as error:
        # accelerate has one state for a whole process
        raise TrainingError(
            f"accelerate is set up otherwise in this process already ({error}); start the training with "
            f"precision {precision!r} on {device.type!r} in a process of its own"
        ) from error
    kind = found.distributed_type.value
    if kind not in _KINDS:
        raise UnsupportedError(
            f"processes of the kind {kind} were launched; expected one of {', '.join(_KINDS)}; launch them "
            "with torchrun"
        )
    return found


def device_of(asked: str) -> str:
    """The device of this process: each process of a launcher has a GPU of its own."""
    rank = os.environ.get("LOCAL_RANK")
    return f"{asked}:{rank}" if rank is not None and asked in ("cuda", "xpu", "npu") else asked


def is_first() -> bool:
    """Whether this process is the one that writes, once a training was made in it."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


class Passes(nn.Module):
    """The loss of a training as a module, whose gradients processes share and which runs in half precision.

    Args:
        training: its parameters are those of the module.
    """

    def __init__(self, training: Any) -> None:
        super().__init__()
        self.weights = training.module
        # no submodule of this one: the frozen model is not shared
        self.of = training.loss

    def forward(self, asked: list[Any], progress: float) -> Tensor:
        """() the loss of some questions."""
        loss: Tensor = self.of(asked, progress)
        return loss
