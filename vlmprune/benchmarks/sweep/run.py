# SPDX-License-Identifier: Apache-2.0
"""The sweep: which answers are missing, who gives them, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from ... import __version__
from ...config import Config
from ...errors import EvaluationError
from ...models.loading import check_device
from ..rundir import FORMAT, read_object
from ..sample import Sample
from ..tasks import get_task
from . import identity, results
from .engines import Engine, Local
from .journal import Journal, locked, refuse_other_format, replace_json
from .plan import Setting, answer_length, load_samples, portions, with_baselines
from .work import Failure, Job


class Progress(Protocol):
    """Told how far a sweep is."""

    def begin(self, what: str, total: int, done: int) -> None: ...

    def advance(self, answers: int) -> None: ...


class Silent:
    """Shows nothing."""

    def begin(self, what: str, total: int, done: int) -> None:
        pass

    def advance(self, answers: int) -> None:
        pass


@dataclass(frozen=True)
class Settings:
    """How a sweep is run; of these, only the device is part of what a cell is.

    Args:
        device: of the model, on each worker.
        engine: in this process, or on a Ray cluster.
        trust_remote_code: run Python code that comes with a model.
        command: as typed, for the record.
    """

    device: str = "cpu"
    engine: Engine = field(default_factory=Local)
    trust_remote_code: bool = False
    command: str = ""


def leaderboard(
    config: Config, out: str | Path, settings: Settings | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Answer what is missing in the run folder ``out`` and return what ``results.json`` then holds.

    Dense, random under all seeds, uniform and pool at each budget in play are compared with, whether listed or not. Killed at any
    moment, the same call goes on where it was. A config that lists other things adds cells; those it shares are not run again.
    """
    folder, settings = Path(out), settings or Settings()
    refuse_other_format(folder)
    specs = with_baselines(config.specs, config.seeds)
    plans = [(setting, [identity.recipe(setting, spec) for spec in specs]) for setting in planned(config, settings)]
    with locked(folder):
        _write_run(folder, config, settings)
        rows, headline, failed = [], [], []
        found: dict[str, Any] = {}
        for setting, recipes in plans:
            task = get_task(setting.task)
            samples = load_samples(task, setting.split, setting.limit)
            shards = portions(task, samples, setting.batch_size)
            cells, failures = _answer(folder, setting, recipes, shards, settings.engine, progress or Silent())
            where = {"model": setting.model, "task": setting.task}
            failed += [{"spec": spec, **where, "error": error} for spec, error in failures.items()]
            if results.complete(cells):
                more, one = results.rows_of(folder, setting, samples, cells, config)
                rows += more
                headline.append(one)
            known = results.provenance([setting for setting, _ in plans], settings.device, settings.command)
            known["calibration"] = sorted({row["spec"] for row in rows if row["calibrated"]}) or "none"
            found = {"format": FORMAT, "provenance": known, "rows": rows, "headline": headline, "failed": failed, "speed": []}
            replace_json(folder / "results.json", found)
    if not rows:
        raise EvaluationError("nothing could be compared:\n" + "\n".join(f"  {one['spec']}: {one['error']}" for one in failed))
    return found


def planned(config: Config, settings: Settings) -> list[Setting]:
    """All models on all tasks; whatever is wrong with any of them is said before the first answer."""
    tasks = [get_task(name) for name in config.tasks]
    if isinstance(settings.engine, Local):
        check_device(settings.device)
    return [
        Setting(
            model=model, weights=identity.weights(model), task=name, task_fingerprint=task.fingerprint, split=config.split,
            limit=config.limit, batch_size=config.batch_size, max_new_tokens=answer_length(config.max_new_tokens, task),
            positions=config.positions, device=settings.device, dtype=config.dtype, versions=identity.versions(name),
            trust_remote_code=settings.trust_remote_code,
        )
        for model in config.models
        for name, task in zip(config.tasks, tasks, strict=True)
    ]  # fmt: skip


def _write_run(folder: Path, config: Config, settings: Settings) -> None:
    path = folder / "run.json"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    created = read_object(path)["created"] if path.is_file() else now
    info = {"format": FORMAT, "version": __version__, "created": created, "command": settings.command, "config": config.plain()}
    replace_json(path, info)


def _answer(
    folder: Path,
    setting: Setting,
    recipes: Sequence[Mapping[str, Any]],
    shards: Sequence[Sequence[Sample]],
    engine: Engine,
    progress: Progress,
) -> tuple[dict[str, str], dict[str, str]]:
    """Answer what is missing; returns the cells that are whole, by spec, and why the others are not."""
    ids = {sample.id for shard in shards for sample in shard}
    journals = {recipe["spec"]: Journal(folder, recipe) for recipe in recipes}
    _check_known(setting, ids, journals.values())
    total, done = len(ids) * len(journals), sum(len(journal.ids) for journal in journals.values())
    progress.begin(f"{setting.model} on {setting.task}", total, done)
    jobs = []
    for number, portion in enumerate(shards):
        lacking = tuple(spec for spec, journal in journals.items() if any(sample.id not in journal.ids for sample in portion))
        if lacking:
            jobs.append(Job(number, lacking))
    failed: dict[str, str] = {}
    for given in engine.run(setting, jobs, failed):
        if isinstance(given, Failure):
            failed.setdefault(given.spec, given.error)
        else:
            progress.advance(journals[given.spec].append(given.lines))
    whole = {spec: journal.cell for spec, journal in journals.items() if len(journal.ids) == len(ids)}
    lost = [spec for spec in journals if spec not in whole and spec not in failed]
    if lost:
        raise EvaluationError(f"the engine ended, but {lost} did not answer everything; run the same command again")
    return whole, failed


def _check_known(setting: Setting, ids: set[str], journals: Any) -> None:
    """A journal that holds other samples was made by a task whose fingerprint does not say what it holds."""
    for journal in journals:
        strange = journal.ids - ids
        if strange:
            raise EvaluationError(
                f"{journal.path} holds sample {min(strange)!r}, which task {setting.task!r} does not have; its fingerprint "
                f"{setting.task_fingerprint!r} stayed the same though its samples changed: delete the file, and report the task"
            )
