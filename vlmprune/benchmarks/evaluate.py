# SPDX-License-Identifier: Apache-2.0
"""Evaluate: many specs on the same questions. Every image is encoded once; each spec then scores, cuts and answers, in batches.

What follows the encoder is the path of ``with vlmprune.prune(model, spec): model.generate(...)``: the same session, hooks,
masks and greedy decoding. Only ``get_image_features`` is answered from a shelf, which a test compares with encoding anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..api import prune
from ..core.session import Session
from ..core.shelf import Shelf
from ..errors import EvaluationError, UnsupportedError
from ..spec import Spec, parse
from .batch import Batch, EncodeOnce
from .record import Record
from .sample import Sample, Task


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    specs: Sequence[str | Spec],
    task: Task,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    positions: str | None = None,
    strict: bool = False,
    share: bool = True,
) -> Iterator[Record]:
    """Answer every sample under every spec, greedily: batch after batch, and in each batch spec after spec.

    Args:
        model, processor: as loaded, the model in eval mode; it is left as it was, also when the iterator is dropped half-way.
        samples: of ``task``; questions about the same images are encoded once where they stand within two batches of each other.
        specs: what to compare, ``"dense"`` among them if wanted; distinct.
        task: gives ``score(sample, answer)``.
        positions, strict: as in :func:`vlmprune.prune`.
        share: encode each image once for all specs. Where a model family does not allow it, records say ``encoding="each"``.

    Raises:
        EvaluationError: a generation that failed, hooks that did not fire, a score that is no score.
    """
    texts = [str(parse(spec)) for spec in specs]
    twice = [text for number, text in enumerate(texts) if text in texts[:number]]
    if not texts or twice:
        raise EvaluationError(f"specs={list(map(str, specs))}; expected at least one, each once" + f", not {twice}" * bool(twice))
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EvaluationError(f"{name}={value!r}; expected an int >= 1")
    if model.training:
        raise EvaluationError("the model is in training mode, where dropout changes answers; call model.eval()")
    sessions = [prune(model, text, positions=positions, strict=strict) for text in texts]
    return _run(model, processor, samples, sessions, task, batch_size, max_new_tokens, share)


def _run(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    sessions: Sequence[Session],
    task: Task,
    size: int,
    words: int,
    share: bool,
) -> Iterator[Record]:
    once = EncodeOnce(Shelf(sessions), processor, 2 * size) if share else None
    remaining = iter(samples)
    while rows := list(islice(remaining, size)):
        batch = Batch.make(rows, processor, model)
        shelved, encoding, spent = None, "each", 0.0
        if once is not None:
            started = time.perf_counter()
            try:
                shelved, encoding = once.take(batch), "shared"
            except UnsupportedError:
                once = None  # this family returns more than features: every record says so
            spent = time.perf_counter() - started
        for session in sessions:
            served = once.shelf.serving(session, shelved) if shelved else nullcontext()
            yield from _answer(model, processor, batch, session, task, words, served, encoding, spent)


def _answer(
    model: Any,
    processor: Any,
    batch: Batch,
    session: Session,
    task: Task,
    words: int,
    served: AbstractContextManager[None],
    encoding: str,
    spent: float,
) -> list[Record]:
    """One spec on one batch; the model is free again when this returns."""
    clock = _Clock(model.device)
    session.last = None
    try:
        with session, served:
            clock.start()
            watch = StoppingCriteriaList([clock])
            ids = model.generate(**batch.inputs, max_new_tokens=words, do_sample=False, num_beams=1, stopping_criteria=watch)
            clock.stop()
    except Exception as error:
        raise EvaluationError(f"{session.spec}: generation failed on {batch.named}: {type(error).__name__}: {error}") from error
    report = session.last
    _check_firings(session, batch)
    answers = processor.batch_decode(ids[:, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rows = len(batch.samples)
    firings = sum(report.firings.values())
    shares = {"encode": spent, "choosing": report.seconds, "first_token": clock.first, "total": clock.total}
    found = []
    for sample, answer, pictures, asked in zip(batch.samples, answers, batch.pictures, batch.asked, strict=True):
        score = task.score(sample, answer.strip())
        if not isinstance(score, int | float) or not 0 <= score <= 1:
            raise EvaluationError(f"{sample.id}: the task gave the score {score!r} to {answer!r}; expected 0 to 1")
        layers = [sum(layer) for layer in zip(*(report.layer_tokens[p] for p in pictures), strict=True)]
        maps = tuple(report.keep[p] for p in pictures)
        found.append(
            Record(
                spec=session.spec,
                id=sample.id,
                cluster=sample.cluster,
                family=sample.family,
                group=sample.group,
                answer=answer.strip(),
                score=float(score),
                dense_tokens=sum(report.dense_tokens[p] for p in pictures),
                realised_tokens=sum(report.realised_tokens[p] for p in pictures),
                layer_tokens=sum(layers) / len(layers) if layers else 0.0,
                firings=firings if pictures else 0,
                on_object=asked.share(maps),
                positions=session.positions,
                encoding=encoding if pictures else "none",
                seconds={name: value / rows for name, value in shares.items()},
                batch=rows,
                peak_memory=clock.peak,
                keep=maps,
            )
        )
    return found


def _check_firings(session: Session, batch: Batch) -> None:
    """Raise unless the hooks saw every image, and cut where the budget asks for fewer tokens than an image has."""
    report = session.last
    if report is None:
        raise EvaluationError(f"{session.spec}: no hook fired on {batch.named}; something detached them or replaced the forward")
    images = sum(map(len, batch.pictures))
    if len(report.dense_tokens) != images or (images and not report.firings):
        raise EvaluationError(f"{session.spec}: hooks saw {len(report.dense_tokens)} images of {images} on {batch.named}")
    budgets = [session.before[1] if session.before else None, session.inside.budget if session.inside else None]
    wanted = [budget for budget in budgets if budget is not None and budget.scope == "image"]
    asked = any(budget.count(count) < count for budget in wanted for count in report.dense_tokens)
    if asked and not {"enter", "stage"} & set(report.firings):
        raise EvaluationError(f"{session.spec}: nothing was cut on {batch.named}, firings were {report.firings}")


class _Clock(StoppingCriteria):
    """Stops nothing; notes when the first token was there."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.first = self.total = 0.0
        self.peak: int | None = None

    def start(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._started = self._now()

    def stop(self) -> None:
        self.total = self._now() - self._started
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated(self.device)

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if not self.first:
            self.first = self._now() - self._started
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
