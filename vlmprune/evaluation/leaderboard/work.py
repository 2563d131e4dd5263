# SPDX-License-Identifier: Apache-2.0
"""The work itself, the same on every engine: some specs answer one portion of a task."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ... import errors
from ...errors import EvaluationError, VlmPruneError
from ...models.loading import load
from ...spec import parse
from ..answer.evaluate import entrant, evaluate
from ..answer.record import Record
from ..tasks.registry import get_task
from ..tasks.sample import Sample, Task, shows_clips
from . import identity
from .plan import Setting, load_samples, portions
from .process import threads

DRAWN = 40  # samples at the start of a task whose kept patches are journalled, for galleries of flips


@dataclass(frozen=True)
class Job:
    """A portion of a setting, and the specs that still have to answer it."""

    shard: int
    specs: tuple[str, ...]


@dataclass(frozen=True)
class Lines:
    """Journal lines of one spec."""

    spec: str
    lines: list[dict[str, Any]]


@dataclass(frozen=True)
class Failure:
    """A spec that cannot answer, and why."""

    spec: str
    error: str


class Bench:
    """A model with the samples of a task, loaded once per process."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.task: Task = get_task(setting.task)
        self.samples = load_samples(self.task, setting.split, setting.limit)
        self.clips = getattr(self.task, "video", False)
        self.shards: list[list[Sample]] = portions(self.task, self.samples, setting.batch_size)
        self.drawn = {sample.id for sample in self.samples[:DRAWN]}
        # before the model is loaded, which takes longest
        _check_same(setting, self.task)
        self.strange = _strange_methods(setting)
        self.model, self.processor = load_model(
            setting.model, setting.device, setting.dtype, setting.trust_remote_code
        )

    def work(self, job: Job) -> Iterator[Lines | Failure]:
        """Answers as they come; a spec that fails is named and left out, the others go on."""
        with threads(self.setting.model, self.setting.threads):
            yield from self._work(job)

    def _work(self, job: Job) -> Iterator[Lines | Failure]:
        specs = []
        for spec in job.specs:
            try:
                self._check_methods(spec)
                # attaches nothing: asks whether this model can do it
                entrant(
                    self.model,
                    self.processor,
                    spec,
                    positions=self.setting.positions,
                    frames=shows_clips(self.task),
                )
                specs.append(spec)
            except Exception as error:  # a plug-in may raise anything
                yield Failure(spec, reason(error))
        while specs:
            answered = yield from self._answer(job, specs)
            # the others answer this portion again, and the journal takes only what it lacks
            specs = specs[: answered - 1] + specs[answered:] if answered else []

    def _check_methods(self, spec: str) -> None:
        for part in parse(spec).parts:
            if part.name in self.strange:
                raise EvaluationError(self.strange[part.name])

    def _answer(self, job: Job, specs: Sequence[str]) -> Generator[Lines | Failure, None, int]:
        """One call of evaluate; returns the number of the spec that failed, counted from 1, or 0."""
        if self.clips:
            return (yield from self._answer_clips(job, specs))
        rows, size = self.shards[job.shard], self.setting.batch_size
        # of the batches that evaluate makes of these rows
        sizes = [min(size, len(rows) - start) for start in range(0, len(rows), size)]
        records = evaluate(
            self.model,
            self.processor,
            rows,
            specs,
            self.task,
            batch_size=size,
            max_new_tokens=self.setting.max_new_tokens,
            positions=self.setting.positions,
        )
        for rows_of_batch in sizes:
            for number, spec in enumerate(specs, 1):
                try:
                    # evaluate gives batch after batch, and in each batch spec after spec
                    yield Lines(spec, [self._line(next(records)) for _ in range(rows_of_batch)])
                # of a smaller picture that cannot be made it is a SpecError
                except VlmPruneError as error:
                    # evaluate cannot go on after an error, and is called again without this spec
                    yield Failure(spec, reason(error))
                    return number
        return 0

    def _answer_clips(self, job: Job, specs: Sequence[str]) -> Generator[Lines | Failure, None, int]:
        """The same by lmms-eval, which reads clips; its portions follow each other as the documents do."""
        from ..tasks.lmms.cell import run_cell
        from ..tasks.lmms.task import LmmsTask

        if not isinstance(self.task, LmmsTask):
            raise EvaluationError(
                f"task {self.task.name!r} shows clips; only tasks of lmms-eval can: lmms:NAME"
            )
        # the portion is a range of the documents
        offset, size = sum(map(len, self.shards[: job.shard])), len(self.shards[job.shard])
        names = ("batch_size", "max_new_tokens", "positions")
        options = {name: getattr(self.setting, name) for name in names}
        for number, spec in enumerate(specs, 1):
            try:
                cell = run_cell(
                    self.model, self.processor, spec, self.task, offset=offset, limit=size, **options
                )
            except VlmPruneError as error:
                yield Failure(spec, reason(error))
                return number
            yield Lines(spec, list(map(self._line, cell.records)))
        return 0

    def _line(self, record: Record) -> dict[str, Any]:
        # dense keeps all of them
        return record.line(keep=record.id in self.drawn and record.spec != "dense") | {"error": None}


def reason(error: Exception) -> str:
    """Why something failed; errors may have no text, and those of a plug-in say little without a type."""
    text = str(error).strip()
    return text if text and isinstance(error, VlmPruneError) else errors.reason(error)


@lru_cache(maxsize=1)
def load_model(name: str, device: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """One model is held per process."""
    return load(name, device, dtype, trust_remote_code)


@lru_cache(maxsize=1)
def bench(setting: Setting) -> Bench:
    """The bench of this process; a job that follows for the same setting finds it ready."""
    return Bench(setting)


_ELSEWHERE = "where the run was started; have the same everywhere"


def _check_same(setting: Setting, task: Task) -> None:
    """A worker needs the code, data and weights of the driver; else its answers cannot join this run."""
    here = {
        "versions": identity.versions(setting.task),
        "task_fingerprint": task.fingerprint,
        "task_code": identity.task_code(setting.task, task),
        "weights": identity.weights(setting.model, setting.trust_remote_code),
    }
    for key, value in here.items():
        wanted = getattr(setting, key)
        if value != wanted:
            raise EvaluationError(f"{key} is {value!r} here and {wanted!r} {_ELSEWHERE}")


def _strange_methods(setting: Setting) -> dict[str, str]:
    """Plug-in methods that are another thing here than where the run was started, and why."""
    found = {}
    for name, wanted in setting.plugins:
        try:
            code = identity.method_code(name)
        except VlmPruneError as error:
            found[name] = reason(error)
            continue
        if code != wanted:
            found[name] = f"the code of method {name!r} is {code!r} here and {wanted!r} {_ELSEWHERE}"
    return found
