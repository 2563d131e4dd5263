# SPDX-License-Identifier: Apache-2.0
"""The loop: the same weights whether it ran through or was interrupted and called again.

What a step does follows from the seed and its number alone. Between steps the weights and the moments of the
optimiser are written as safetensors, with the settings beside them; another call with the same settings goes
on from there, one with others is refused. Where a training may end early, the lowest loss of other questions
so far, and the weights that had it, are written too: they are what remains.

Several processes may share the steps (``processes``). What a step does then also follows from their number,
which is one of the settings.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number, check_positive
from ..errors import SpecError
from .data import Exercise
from .processes import Passes, TrainingError, accelerated, check_precision

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # the state of AdamW for each parameter


class Training(Protocol):
    """What the loop trains."""

    model: Any
    processor: Any

    @property
    def method(self) -> str:
        """Whose weights these are."""

    @property
    def module(self) -> nn.Module:
        """They, as parameters."""

    @property
    def budgeted(self) -> bool:
        """Whether a spec of the method takes a budget."""

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def model_digest(self) -> str:
        """What tells the frozen model from others of its backbone."""

    def prepare(self, asked: Sequence[Exercise], folder: Path, batch: int) -> None:
        """What is known of questions before the first step; ``folder`` holds what was found out already."""

    def tensors(self) -> dict[str, Tensor]: ...

    def facts(self, asked: Sequence[Exercise] | None) -> dict[str, Any]:
        """What its method reads beside the weights; before the training nothing is asked."""

    def rivals(self, keep: int | None) -> dict[str, str]:
        """Specs without a training that it is compared with, by name."""

    def loss(self, asked: list[Exercise], progress: float) -> Tensor: ...


@dataclass(frozen=True)
class Pace:
    """How long and how fast.

    Args:
        steps, batch_size: optimiser steps, and questions in each.
        lr: of AdamW; it rises over the first 5 % of the steps and falls as a cosine.
        seed: of the order of questions and of the first weights.
        save_every: steps between two checkpoints.
        patience: checkpoints without a lower loss of the other questions after which it ends, with the
            weights of the lowest one, which may be the first ones; 0: it runs to the last step and keeps its
            weights.
        parts: pieces in which the questions of a step are read one after the other, for less memory; the mean
            of their gradients is that of the step.
        precision: "no", or "bf16", in which most of a pass is then computed.
    """

    steps: int = 300
    batch_size: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    save_every: int = 50
    patience: int = 0
    parts: int = 1
    precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "parts"):
            check_int(name, getattr(self, name), least=1)
        for name in ("seed", "patience"):
            check_int(name, getattr(self, name), least=0)
        check_positive("lr", self.lr)
        check_positive("clip", self.clip)
        check_number("weight_decay", self.weight_decay, least=0)
        check_precision(self.precision)
        self.share(0, 1)

    def share(self, process: int, processes: int) -> slice:
        """Of the questions of a step those that one of several processes takes."""
        if self.batch_size % (self.parts * processes):
            raise SpecError(
                f"batch_size={self.batch_size}; expected a multiple of {self.parts * processes}, of "
                f"{self.parts} parts in each of {processes} processes"
            )
        size = self.batch_size // processes
        return slice(process * size, (process + 1) * size)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step."""
        # the + 1: without it the first step has a rate of 0
        rise = max(1, self.steps // 20)
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))


@dataclass(eq=False)
class LowestLoss:
    """The lowest loss of the other questions so far.

    Args:
        step: after how many steps.
        weights: that had it, by name.
    """

    loss: float = math.inf
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def look(self, tools: _Tools, dev: Sequence[Exercise], settings: Pace, done: int) -> None:
        """Take the weights of now if they are better."""
        loss = tools.dev_loss(dev, settings.batch_size)
        _check_finite(f"the loss of the other questions after {done} steps", loss, settings)
        if loss < self.loss:
            self.loss, self.step = loss, done
            self.weights = {
                name: value.detach().clone() for name, value in tools.training.module.named_parameters()
            }

    def put_back(self, training: Training) -> None:
        """Give a training these weights; without patience there are none, and the last ones remain."""
        with torch.no_grad():
            for name, value in training.module.named_parameters():
                if name in self.weights:
                    value.copy_(self.weights[name])

    def ended(self, settings: Pace, done: int) -> bool:
        """Whether nothing better came for as long as one waits."""
        waited = done - self.step
        return settings.patience > 0 and waited >= settings.patience * settings.save_every


@dataclass(frozen=True, eq=False)
class _Tools:
    """What steps are made with.

    Args:
        accelerator: of accelerate.
        model: gives the loss of questions; processes share its gradients.
    """

    training: Training
    optimiser: torch.optim.AdamW
    accelerator: Any
    model: nn.Module

    def mean(self, value: Tensor) -> float:
        """A number () of each process, as the mean over all of them, which is the same in each."""
        return float(self.accelerator.reduce(value.detach(), "mean"))

    def dev_loss(self, dev: Sequence[Exercise], batch: int) -> float:
        """Mean loss of questions that are not trained on, as at the end of a training."""
        self.training.module.eval()
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(dev), batch):
                asked = list(dev[start : start + batch])
                total += self.mean(self.model(asked, 1.0)) * len(asked)
        self.training.module.train()
        return total / len(dev)


def order_of(seed: int, step: int, batch: int, count: int) -> list[int]:
    """Questions of a step: every pass over ``count`` has an order of its own, which the seed gives."""
    chosen = []
    for place in range(step * batch, (step + 1) * batch):
        # a batch may reach over the end of one pass into the next
        epoch, within = divmod(place, count)
        # from the seed and the pass alone, so that a later call draws the same
        draw = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        chosen.append(int(torch.randperm(count, generator=draw)[within]))
    return chosen


def train(
    training: Training,
    data: Sequence[Exercise],
    settings: Pace,
    folder: Path,
    identity: Mapping[str, Any],
    note: Callable[[int, float], None] = lambda step, loss: None,
    stop_after: int | None = None,
    dev: Sequence[Exercise] = (),
) -> list[float]:
    """Train, or go on with what ``folder`` holds; the losses of the steps that were made now.

    Args:
        identity: what else has to be the same to go on, such as the data.
        note: is told of every step and its loss, in the first process.
        stop_after: end after this step, as an interruption would.
        dev: other questions, whose loss says when to end early.
    """
    if settings.patience and not dev:
        raise SpecError(f"patience={settings.patience} asks for other questions to look at; give some")
    weights = [*training.module.parameters()]
    accelerator = accelerated(weights[0].device, settings.precision)
    # all that must be the same for another call to go on
    said = {**asdict(settings), **training.settings, **identity, "method": training.method}
    said |= {"processes": accelerator.num_processes, "model": training.model_digest}
    mine = settings.share(accelerator.process_index, accelerator.num_processes)
    optimiser = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=settings.weight_decay)
    best, losses = LowestLoss(), []
    first = _resume(training, optimiser, best, folder, said)
    # once all have read it, and before the first writes another
    accelerator.wait_for_everyone()
    tools = _Tools(training, optimiser, accelerator, accelerator.prepare_model(Passes(training)))
    training.module.train()
    if settings.patience and first == 0:
        best.look(tools, dev, settings, 0)  # a training that only harms ends where it began
    for step in range(first, settings.steps):
        # asked first: a training that had ended when it was interrupted makes no further step
        if best.ended(settings, step):
            break
        for group in optimiser.param_groups:
            group["lr"] = settings.lr_at(step)
        # what a step draws must not depend on the steps that this process made
        torch.manual_seed(settings.seed * 1_000_003 + step + accelerator.process_index * 1_000_033)
        asked = [data[i] for i in order_of(settings.seed, step, settings.batch_size, len(data))[mine]]
        losses.append(_step(tools, asked, step, settings))
        if accelerator.is_main_process:
            note(step, losses[-1])
        done = step + 1
        whole = done % settings.save_every == 0 or done == settings.steps
        # before the checkpoint, which holds what this finds
        if whole and settings.patience:
            best.look(tools, dev, settings, done)
        if (whole or done == stop_after) and accelerator.is_main_process:
            _save(training, optimiser, best, folder, said, done)
        if done == stop_after:
            break
    best.put_back(training)
    training.module.eval()
    return losses


def _step(tools: _Tools, asked: list[Exercise], step: int, settings: Pace) -> float:
    tools.optimiser.zero_grad(set_to_none=True)
    size, value = len(asked) // settings.parts, 0.0
    progress = step / max(1, settings.steps - 1)
    try:
        for part in range(settings.parts):
            # gradients are shared once, with those of the last part
            alone = part + 1 < settings.parts
            with tools.accelerator.no_sync(tools.model) if alone else nullcontext():
                loss = tools.model(asked[part * size : (part + 1) * size], progress) / settings.parts
                value += tools.mean(loss)
                _check_finite(f"the loss of step {step}", value, settings)
                tools.accelerator.backward(loss)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"step {step} does not fit into memory; raise --parts (now {settings.parts}) or lower "
            f"--batch-size (now {settings.batch_size}), and call again with a new folder"
        ) from error
    norm = float(nn.utils.clip_grad_norm_(tools.training.module.parameters(), settings.clip))
    _check_finite(f"the length of the gradient of step {step}", norm, settings)
    tools.optimiser.step()
    return value


def _check_finite(what: str, value: float, settings: Pace) -> None:
    """Raise where a training would go astray; a mean over processes is the same in all, so that all raise."""
    if not math.isfinite(value):
        raise TrainingError(f"{what} is {value}; expected a finite number; lower --lr (now {settings.lr:g})")


# --- checkpoints ----------------------------------------------------------------------------------


def _save(
    training: Training,
    optimiser: torch.optim.AdamW,
    best: LowestLoss,
    folder: Path,
    said: Mapping[str, Any],
    done: int,
) -> None:
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    held = {f"weight.{name}": value.detach() for name, value in training.module.named_parameters()}
    for name, value in training.module.named_parameters():
        moments = optimiser.state[value]
        held |= {f"{moment}.{name}": moments[moment].detach() for moment in _MOMENTS}
    held |= {f"best.{name}": value for name, value in best.weights.items()}
    packed = save({name: value.cpu().contiguous() for name, value in held.items()})
    digest = hashlib.sha256(packed).hexdigest()
    # weights first: state.json never names a file that is not there
    _replace(folder / f"step-{done}.safetensors", packed)
    state: dict[str, Any] = {"settings": said, "done": done, "sha256": digest}
    if best.weights:
        state["best"] = {"loss": best.loss, "step": best.step}
    _replace(folder / "state.json", json.dumps(state, indent=1).encode())
    # the old ones last, when nothing names them any more
    for old in folder.glob("step-*.safetensors"):
        if old.name != f"step-{done}.safetensors":
            old.unlink()


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)


def _resume(
    training: Training, optimiser: torch.optim.AdamW, best: LowestLoss, folder: Path, said: Mapping[str, Any]
) -> int:
    """Steps that are done already; the weights and moments of then are put back."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / "state.json"
    if not path.is_file():
        return 0
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        settings, done = state["settings"], state["done"]
        packed = (folder / f"step-{done}.safetensors").read_bytes()
        held = load(packed)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SpecError(
            f"the training in {str(folder)!r} cannot be gone on with ({error}); delete the folder, or give "
            "another --out"
        ) from error
    # through JSON, where tuples become lists, as in what was read
    wanted = json.loads(json.dumps(said))
    other = sorted(name for name in {*wanted, *settings} if wanted.get(name) != settings.get(name))
    if other or hashlib.sha256(packed).hexdigest() != state.get("sha256"):
        why = f"has other {', '.join(other)}" if other else "holds a changed checkpoint"
        raise SpecError(
            f"the training in {str(folder)!r} {why}; use the same settings, or give another --out"
        )
    with torch.no_grad():
        for name, value in training.module.named_parameters():
            value.copy_(held[f"weight.{name}"])
            optimiser.state[value] = {
                # AdamW counts its steps on the CPU
                moment: held[f"{moment}.{name}"].to("cpu" if moment == "step" else value.device)
                for moment in _MOMENTS
            }
    if "best" in state:
        best.loss, best.step = float(state["best"]["loss"]), int(state["best"]["step"])
        best.weights = {
            name: held[f"best.{name}"].to(value.device) for name, value in training.module.named_parameters()
        }
    return int(done)
