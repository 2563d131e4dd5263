# SPDX-License-Identifier: Apache-2.0
"""One pruned call of generate: what fails is raised, hooks must have fired, times are noted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ...core.report import Report
from ...errors import EvaluationError
from ...hooks.session import Session


class Generation(NamedTuple):
    """New ids (B, T), what the hooks did, seconds to the first and the last token, peak bytes."""

    ids: Tensor
    report: Report
    first: float
    total: float
    peak: int | None

    def counts(self, pictures: Sequence[int]) -> dict[str, Any]:
        """Fields of a Record for a row that shows these pictures of the call."""
        report = self.report
        # (layers,) of all these pictures together
        layers = [sum(layer) for layer in zip(*(report.layer_tokens[p] for p in pictures), strict=True)]
        return {
            "dense_tokens": sum(report.dense_tokens[p] for p in pictures),
            "realised_tokens": sum(report.realised_tokens[p] for p in pictures),
            "layer_tokens": sum(layers) / len(layers) if layers else 0.0,
            "firings": sum(report.firings.values()) if pictures else 0,
            "peak_memory": self.peak,
        }

    def seconds(self, rows: int) -> dict[str, float]:
        """Shares of one of ``rows`` rows that were answered together."""
        whole = {"choosing": self.report.seconds, "first_token": self.first, "total": self.total}
        return {name: value / rows for name, value in whole.items()}


def generate(
    model: Any,
    session: Session,
    inputs: Mapping[str, Any],
    *,
    pictures: int,
    named: str,
    served: AbstractContextManager[None] | None = None,
    **options: Any,
) -> Generation:
    """Generate while ``session`` is attached; the model is free again when this returns, unless it was
    attached before.

    Args:
        inputs: left-padded.
        pictures: images and clips in ``inputs``: the hooks must have seen as many.
        named: what is answered, for messages.
        served: a context that answers for the vision encoder.
        options: of ``model.generate``.
    """
    clock = Clock(model.device)
    # the report of an earlier call must not pass for that of this one
    session.last = None
    try:
        with nullcontext() if session.attached else session, served or nullcontext():
            clock.start()
            ids = model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([clock]))
            clock.stop()
    except Exception as error:
        raise EvaluationError(
            f"{session.spec}: generation failed on {named}: {type(error).__name__}: {error}"
        ) from error
    report = _checked_report(session, pictures, len(ids), named)
    new = ids[:, inputs["input_ids"].shape[1] :]  # (B, T)
    return Generation(new, report, clock.first, clock.total, clock.peak)


def _checked_report(session: Session, pictures: int, rows: int, named: str) -> Report:
    """What the hooks did; raises unless they saw every picture, and cut where the budget asks for it."""
    report = session.last
    if report is None:
        raise EvaluationError(
            f"{session.spec}: no hook fired on {named}; something detached them or replaced the forward"
        )
    if len(report.dense_tokens) != pictures or (pictures and not report.firings):
        raise EvaluationError(
            f"{session.spec}: hooks saw {len(report.dense_tokens)} images of {pictures} on {named}"
        )
    budgets = [slot.budget for slot in session.slots.values()]
    # under other scopes the size of a picture alone does not say whether a cut was due
    wanted = [budget for budget in budgets if budget is not None and budget.scope == "image"]
    counts = report.dense_tokens
    if session.attachment.frames:
        # of one clip a prompt: where the mean clip is cut, some clip is
        counts = [sum(counts) // max(rows, 1)]
    asked = any(budget.count(count) < count for budget in wanted for count in counts)
    # "enter": cut before the language model; "stage": inside it
    if asked and not {"enter", "stage"} & set(report.firings):
        raise EvaluationError(f"{session.spec}: nothing was cut on {named}, firings were {report.firings}")
    return report


class Clock(StoppingCriteria):
    """Stops nothing; a stopping criterion that notes when the first token was there, and the last."""

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
            # kernels run behind the host: without waiting, only their launches would be timed
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        # called after every token, and first after the first
        if not self.first:
            self.first = self._now() - self._started
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)  # (B,)
