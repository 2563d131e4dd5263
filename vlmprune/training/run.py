# SPDX-License-Identifier: Apache-2.0
"""``vlmprune train``: data, loop, evaluation before and after, and the files that methods read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..api import prune
from ..checks import check_int
from ..core.weights import backbone_of, write_weights
from ..errors import SpecError, did_you_mean
from ..models.loading import encode
from .data import Exercise, read_data
from .exits import ExitTraining
from .loop import Pace, Training, train
from .processes import accelerated
from .rcp import RCPTraining
from .resampler import ResamplerTraining
from .selector import SelectorTraining

TRAINED: Mapping[str, type[Any]] = {
    "visionselector": SelectorTraining,
    "rcp": RCPTraining,
    "dyvte": ExitTraining,
    "textmonkey": ResamplerTraining,
}
KEEP = 36  # visual tokens of a picture, where a method takes a budget and none is given
STATE = "training"  # folder beside the weights
FIRST = "first"  # folder of the untrained weights, for the evaluation before


def run(
    method: str,
    model: Any,
    processor: Any,
    data: str,
    out: str | Path,
    *,
    keep: int | None = None,
    samples: int = 600,
    dev: int = 60,
    width: int | None = None,
    settings: Pace | None = None,
    half: bool = False,
    note: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Train a method for a model, write its weights to ``out``, and give what their JSON file says.

    Processes of a launcher share the steps; the first one writes and answers, and tells the others.

    Args:
        data: "shapes", or a JSON-lines file.
        keep: visual tokens of a picture that the method is trained at; ``KEEP`` unless given, and none for a
            method that takes no budget.
        samples, dev: questions to train on, and others that are answered before and after.
        width: of the trained module.
        half: write the weights in float16, which are then also those that are measured.
    """
    made = trained_by(method)
    for name, value in (("keep", keep), ("samples", samples), ("dev", dev), ("width", width)):
        if value is not None:
            check_int(name, value, least=1)
    if keep is None and made.budgeted:
        keep = KEEP
    settings, folder = settings or Pace(), Path(out)
    questions = read_data(data, samples, dev)
    accelerator = accelerated(model.device, settings.precision)
    told: list[dict[str, Any]] = [{}]
    with frozen(model):
        training: Training = made(model, processor, keep, width, settings.seed)
        # copies: the loop changes the parameters in place
        first = {name: value.detach().clone() for name, value in training.tensors().items()}
        backbone = backbone_of(model.config)
        identity = {"data": questions.fingerprint, "samples": samples, "dev": dev, "backbone": backbone}
        # the others read what the first one found out
        with accelerator.main_process_first():
            training.prepare([*questions.train, *questions.dev], folder / STATE, settings.batch_size)
        losses = train(training, questions.train, settings, folder / STATE, identity, note, dev=questions.dev)
        if accelerator.is_main_process:
            write_weights(folder / FIRST, method, first, {"backbone": backbone, **training.facts(None)}, half)
            paced = {**asdict(settings), **training.settings, "processes": accelerator.num_processes}
            facts: dict[str, Any] = {
                "backbone": backbone,
                "data": {"source": data, "fingerprint": questions.fingerprint, "samples": samples},
                "settings": paced,
                "loss": losses[-1] if losses else None,
            }
            told = [written(training, facts, folder, questions.dev, keep, half)]
    return from_first(accelerator, told)


def trained_by(method: str) -> type[Any]:
    """What trains a method."""
    if method not in TRAINED:
        near = did_you_mean(method, TRAINED)
        raise SpecError(f"{method!r} cannot be trained; expected one of {sorted(TRAINED)}.{near}")
    return TRAINED[method]


def written(
    training: Training,
    facts: dict[str, Any],
    folder: Path,
    dev: Sequence[Exercise],
    keep: int | None,
    half: bool,
) -> dict[str, Any]:
    """Write the weights, measure what was written, and write that beside them; all that their file says."""
    facts = {
        **facts,
        "licence": "that of the model and of the data",
        "versions": {"torch": torch.__version__.split("+")[0]},
        **training.facts(dev),
    }
    write_weights(folder, training.method, training.tensors(), facts, half)
    facts = {**facts, "dev": measured(training, dev, folder, keep)}
    write_weights(folder, training.method, training.tensors(), facts, half)
    return facts


def from_first(accelerator: Any, told: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first process has to tell, in all of them."""
    from accelerate.utils import broadcast_object_list

    if accelerator.num_processes > 1:
        broadcast_object_list(told)
    return told[0]


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """The model as it is used, not as it is trained; afterwards as it was."""
    # those that could learn before get it back, no others
    learns, mode = [value for value in model.parameters() if value.requires_grad], model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        model.train(mode)
        for value in learns:
            value.requires_grad_(True)


def measured(training: Training, asked: Sequence[Exercise], folder: Path, keep: int | None) -> dict[str, Any]:
    """Accuracy before and after a training, and of methods without one at the same budget."""
    specs = {
        "before": spec_of(training.method, folder / FIRST, keep),
        "after": spec_of(training.method, folder, keep),
        **training.rivals(keep),
        "dense": "dense",
    }
    model, processor = training.model, training.processor
    found = {name: accuracy(model, processor, asked, spec) for name, spec in specs.items()}
    return {"questions": len(asked), "keep": keep, **found}


def spec_of(method: str, folder: str | Path, keep: int | None) -> str:
    """The spec that uses the weights in a folder."""
    return f"{method}(weights={str(folder)!r})" + ("" if keep is None else f"@{keep}")


def accuracy(model: Any, processor: Any, asked: Sequence[Exercise], spec: str) -> float:
    """Share of questions whose greedy answer is the given one, up to case and white space, under a spec."""
    right = 0
    with prune(model, spec):
        for one in asked:
            inputs = encode(model, processor, one.picture(), one.question)
            # room for the end of the answer and one token more, so that a longer answer is not taken for it
            length = len(processor.tokenizer(one.answer, add_special_tokens=False)["input_ids"]) + 2
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=length, do_sample=False)
            # generate gives the prompt back in front
            new = ids[:, inputs["input_ids"].shape[1] :]
            said = processor.batch_decode(new, skip_special_tokens=True)[0]
            right += "".join(said.lower().split()) == "".join(one.answer.lower().split())
    return right / len(asked)
