# SPDX-License-Identifier: Apache-2.0
"""The sweep: which answers are missing, who gives them, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from ... import __version__
from ...errors import EvaluationError
from ...models.loading import check_device
from ..stats.summary import DENSE, budget_of
from ..tasks.registry import get_task
from ..tasks.sample import Sample
from . import identity, results
from .claim import asked_of, others, refuse_other_config
from .config import Config
from .engines import Engine, Local
from .journal import Journal, cells_of, locked, read_info, refuse_other_format, replace_json
from .plan import (
    Setting,
    answer_length,
    baselines,
    budget_read,
    load_samples,
    portions,
    shrinks,
    with_baselines,
)
from .rundir import FORMAT, Run
from .work import Failure, Job


class Progress(Protocol):
    """Told how far a sweep is."""

    def begin(self, what: str, total: int, done: int) -> None:
        """A number of answers is wanted, of which some are there."""

    def advance(self, answers: int) -> None:
        """So many more are there."""

    def ended(self, spec: str) -> None:
        """A cell is whole."""

    def note(self, text: str) -> None:
        """Something that the user should know of."""


class Silent:
    """Shows nothing."""

    def begin(self, what: str, total: int, done: int) -> None:
        pass

    def advance(self, answers: int) -> None:
        pass

    def ended(self, spec: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@dataclass(frozen=True)
class Settings:
    """How a sweep is run; of these, the device and the trust in code are part of what a cell is.

    Args:
        device: of the model, on each worker.
        engine: in this process, or on a Ray cluster.
        trust_remote_code: run Python code that comes with a model.
        command: as typed, for the record.
        replace: let the results of this config take the place of those of another one in the same folder.
        threads: of torch, on each worker; None is one for models of the package, and what torch takes for
            others.
    """

    device: str = "cpu"
    engine: Engine = field(default_factory=Local)
    trust_remote_code: bool = False
    command: str = ""
    replace: bool = False
    threads: int | None = None


def leaderboard(
    config: Config, out: str | Path, settings: Settings | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Answer what is missing in the run folder ``out`` and return what ``results.json`` then holds.

    Dense and blind, random under all seeds, uniform, pool and, where the model reads pictures of any size,
    downsample are compared with, whether listed or not: at each budget in play, and for a method that goes by
    a rule of its own at the budget that equals the tokens per layer that it read. Killed at any moment, the
    same call goes on where it was. A config that lists more adds cells; those it shares are not run again.
    Results of a config that lists other things are replaced only where ``settings.replace`` says so.
    """
    folder, settings, progress = Path(out), settings or Settings(), progress or Silent()
    # before the lock, which would write into a folder that may be somebody else's
    refuse_other_format(folder)
    asked = asked_of(config, settings.device, settings.trust_remote_code)
    # before the folder is touched: nothing is written for a config that cannot run
    plan = planned(config, settings)
    with locked(folder):
        if not settings.replace:
            refuse_other_config(folder, asked)
        _write_run(folder, config, settings, progress)
        rows, headline, failed = [], [], []
        found: dict[str, Any] = {}
        mine: set[str] = set()
        for number, setting in enumerate(plan, 1):
            one = _Comparison(folder, setting, settings.engine, progress)
            one.answer(with_baselines(config.specs, config.seeds, one.shrinks))
            one.answer_own_budgets(config.seeds)
            mine |= set(one.whole.values())
            failed += one.failures()
            # without dense nothing can be compared; the other tasks still can
            if results.complete(one.whole):
                more, head = results.rows_of(folder, setting, one.samples, one.whole, config, one.matched)
                rows += more
                headline.append(head)
            known = results.provenance(plan, settings.device, settings.command)
            known["published"] = config.published and config.published.name
            known["calibration"] = sorted({row["spec"] for row in rows if row["calibrated"]}) or "none"
            found = {
                "format": FORMAT,
                "config": asked,
                "provenance": known,
                "rows": rows,
                "headline": headline,
            }
            # only the last round knows which cells belong to none of the tables
            beside = others(folder, mine) if number == len(plan) else []
            found |= {"failed": [*failed, *_waiting(plan[number:])], "speed": [], "other_cells": beside}
            if rows:
                # after every model and task: a run that is killed leaves a table of what is whole
                replace_json(folder / "results.json", found)
    if not rows:
        raise EvaluationError(
            "nothing could be compared:\n" + "\n".join(f"  {one['spec']}: {one['error']}" for one in failed)
        )
    return found


def _waiting(settings: Sequence[Setting]) -> list[dict[str, str]]:
    """Of what a run that is killed now leaves no row, so that its table is not taken for the whole one."""
    error = "the run ended before its turn came; the same command goes on with it"
    return [
        {"spec": "every spec", "model": setting.model, "task": setting.task, "error": error}
        for setting in settings
    ]


def planned(config: Config, settings: Settings) -> list[Setting]:
    """All models on all tasks; whatever is wrong with any of them is said before the first answer."""
    tasks = [get_task(name) for name in config.tasks]
    # workers of a cluster have devices of their own
    if isinstance(settings.engine, Local):
        check_device(settings.device)
    plugins = identity.plugins(map(str, config.specs))
    codes = [identity.task_code(name, task) for name, task in zip(config.tasks, tasks, strict=True)]
    return [
        Setting(
            model=model,
            weights=identity.weights(model, settings.trust_remote_code),
            task=name,
            task_fingerprint=task.fingerprint,
            split=config.split,
            limit=config.limit,
            batch_size=config.batch_size,
            max_new_tokens=answer_length(config.max_new_tokens, task),
            positions=config.positions,
            device=settings.device,
            dtype=config.dtype,
            versions=identity.versions(name),
            task_code=code,
            plugins=plugins,
            trust_remote_code=settings.trust_remote_code,
            threads=settings.threads,
        )
        for model in config.models
        for name, task, code in zip(config.tasks, tasks, codes, strict=True)
    ]


def _write_run(folder: Path, config: Config, settings: Settings, progress: Progress) -> None:
    path = folder / "run.json"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    before = read_info(folder)
    info = {
        "format": FORMAT,
        "version": __version__,
        "created": now,
        "command": settings.command,
        "config": config.plain(),
    }
    if before is not None:
        # when it was begun, and repaired, stays
        info |= {key: before[key] for key in ("created", "repaired") if isinstance(before.get(key), str)}
    elif path.exists() or cells_of(folder):
        info["repaired"] = now
        progress.note(f"{path} was missing or broken, and is written anew; the answers in {folder} are kept")
    replace_json(path, info)


class _Comparison:
    """One model on one task: the cells that are whole, by spec, and why others are not."""

    def __init__(self, folder: Path, setting: Setting, engine: Engine, progress: Progress) -> None:
        self.folder, self.setting, self.engine, self.progress = folder, setting, engine, progress
        task = get_task(setting.task)
        self.shrinks = shrinks(setting.model, task, setting.trust_remote_code)
        self.samples = load_samples(task, setting.split, setting.limit)
        self.shards: list[list[Sample]] = portions(task, self.samples, setting.batch_size)
        self.ids = {sample.id for sample in self.samples}
        self.whole: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        # spec without a budget -> budget of the baselines that it is compared with
        self.matched: dict[str, str] = {}

    def answer(self, specs: Iterable[str], what: str = "") -> None:
        """Answer what is missing of these specs."""
        journals = {spec: Journal(self.folder, identity.recipe(self.setting, spec)) for spec in specs}
        for journal in journals.values():
            _check_known(self.setting, self.ids, journal)
            if journal.mended:
                self.progress.note(f"{journal.path.with_suffix('.json')} was damaged, and is written anew")
        total, done = len(self.ids) * len(journals), sum(len(journal.ids) for journal in journals.values())
        self.progress.begin(f"{self.setting.model} on {self.setting.task}{what}", total, done)
        # the engine looks into it: jobs that follow go without these specs
        failed: dict[str, str] = {}
        for given in self.engine.run(self.setting, _jobs(self.shards, journals), failed):
            if isinstance(given, Failure):
                failed.setdefault(given.spec, given.error)  # the first reason is the one to mend
                continue
            journal = journals[given.spec]
            self.progress.advance(new := journal.append(given.lines))
            if new and len(journal.ids) == len(self.ids):
                self.progress.ended(given.spec)
        whole = {
            spec: journal.cell for spec, journal in journals.items() if len(journal.ids) == len(self.ids)
        }
        # neither answered nor refused
        lost = [spec for spec in journals if spec not in whole and spec not in failed]
        if lost:
            raise EvaluationError(
                f"the engine ended, but {lost} did not answer everything; run the same command again"
            )
        self.whole |= whole
        self.failed |= failed

    def answer_own_budgets(self, seeds: Sequence[int]) -> None:
        """The baselines of methods that go by a rule of their own, at the budget that equals it."""
        run = Run(self.folder)
        for spec, cell in self.whole.items():
            # what it read is known only now that it has answered
            if budget_of(spec) is None and (budget := budget_read(run.journal(cell))):
                self.matched[spec] = budget
        wanted = [text for budget in self.matched.values() for text in baselines(budget, seeds, self.shrinks)]
        lacking = [
            text for text in dict.fromkeys(wanted) if text not in self.whole and text not in self.failed
        ]
        if lacking:
            self.answer(lacking, f", baselines at {', '.join(dict.fromkeys(self.matched.values()))}")

    def failures(self) -> list[dict[str, str]]:
        """Specs without a row, and why."""
        errors = dict(self.failed)
        # their answers are there, but no row can be made
        if DENSE in self.failed:
            errors |= {spec: f"has nothing to be compared with, since {DENSE} failed" for spec in self.whole}
        return [
            {"spec": spec, "model": self.setting.model, "task": self.setting.task, "error": error}
            for spec, error in errors.items()
        ]


def _jobs(shards: Sequence[Sequence[Sample]], journals: Mapping[str, Journal]) -> list[Job]:
    """Portions that are not answered by all, with the specs that lack them."""
    jobs = []
    for number, portion in enumerate(shards):
        lacking = (
            spec
            for spec, journal in journals.items()
            if any(sample.id not in journal.ids for sample in portion)
        )
        if specs := tuple(lacking):
            jobs.append(Job(number, specs))
    return jobs


def _check_known(setting: Setting, ids: set[str], journal: Journal) -> None:
    """Raise where a journal holds samples that its task does not have: its fingerprint stayed the same."""
    strange = journal.ids - ids
    if strange:
        raise EvaluationError(
            f"{journal.path} holds sample {min(strange)!r}, which task {setting.task!r} does not have; its "
            f"line is whole, so the fingerprint {setting.task_fingerprint!r} of the task stayed the same "
            "though its samples changed: delete the file, and report the task"
        )
