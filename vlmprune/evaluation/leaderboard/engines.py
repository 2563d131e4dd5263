# SPDX-License-Identifier: Apache-2.0
"""Engines: where the jobs of a sweep run. They only answer; the process that called them writes, alone."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ...errors import EvaluationError, SpecError, UnsupportedError
from .plan import Setting
from .process import kept_sigterm
from .work import Failure, Job, Lines, bench


class Engine(Protocol):
    """Runs the jobs of one setting. ``failed`` grows meanwhile: later jobs go without its specs."""

    def run(
        self, setting: Setting, jobs: Iterable[Job], failed: Container[str]
    ) -> Iterator[Lines | Failure]: ...


def _left(job: Job, failed: Container[str]) -> Job:
    return replace(job, specs=tuple(spec for spec in job.specs if spec not in failed))


class Local:
    """In this process, one job after the other."""

    def run(self, setting: Setting, jobs: Iterable[Job], failed: Container[str]) -> Iterator[Lines | Failure]:
        for job in jobs:
            if (job := _left(job, failed)).specs:
                yield from bench(setting).work(job)


@dataclass(frozen=True)
class Ray:
    """As tasks of a Ray cluster; a task whose worker dies is tried again elsewhere.

    Args:
        address: of the cluster, "auto" for the one this machine belongs to; None starts one on this machine.
        cpus, gpus: what each task takes; a worker keeps its model between tasks.
        retries: of a task whose worker died.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    retries: int = 3

    def __post_init__(self) -> None:
        # a cluster would start all of them at once
        if not self.cpus and not self.gpus:
            raise SpecError(
                "a Ray task that takes no CPU and no GPU; give --task-cpus, such as 1, or --task-gpus"
            )

    def run(self, setting: Setting, jobs: Iterable[Job], failed: Container[str]) -> Iterator[Lines | Failure]:
        ray = self._ray()
        answer = ray.remote(_answer).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_retries=self.retries,
            name=f"vlmprune {setting.model} {setting.task}",
        )
        # sent to the cluster once, not with every task
        shared, waiting = ray.put(setting), iter(jobs)
        running: list[Any] = []
        try:
            while True:
                # one more than runs now, so that no worker waits for the driver
                room = self._slots(ray) + 1 - len(running)
                # an iterator: every round goes on where the last one stopped
                for job in waiting if room > 0 else ():
                    if (job := _left(job, failed)).specs:
                        running.append(answer.remote(shared, job))
                        room -= 1
                    if room <= 0:
                        break
                # nothing runs, and nothing waits
                if not running:
                    return
                done, running = ray.wait(running, num_returns=1)
                yield from self._take(ray, done[0])
        finally:
            for left in running:  # the driver was interrupted
                ray.cancel(left, force=True)

    def _ray(self) -> Any:
        try:
            import ray
        except ImportError as error:
            raise UnsupportedError(
                "the engine 'ray' needs the package ray: pip install -e '.[cluster]' in a clone"
            ) from error
        if not ray.is_initialized():
            try:
                # only of a cluster that is started here
                own: dict[str, Any] = {} if self.address else {"include_dashboard": False}
                with kept_sigterm():  # Ray ends the process without a word
                    ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, **own)
            except (ConnectionError, RuntimeError, ValueError) as error:
                at = f"at {self.address!r}" if self.address else "on this machine"
                todo = "start one with `ray start --head`, or leave --address out"
                raise EvaluationError(f"no Ray cluster {at}: {error}; {todo}") from error
        return ray

    def _slots(self, ray: Any) -> int:
        """Tasks that the whole cluster can run at once; nodes may come and go."""
        there = ray.cluster_resources()
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        # what a task does not ask for limits nothing
        slots = int(min(there.get(name, 0) // amount for name, amount in wanted.items() if amount))
        if slots < 1:
            raise EvaluationError(
                f"a task needs {wanted}, the Ray cluster has {there}; ask for less, or add a node"
            )
        return slots

    def _take(self, ray: Any, done: Any) -> list[Lines | Failure]:
        try:
            return ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise EvaluationError(f"a worker failed: {type(error.cause).__name__}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise EvaluationError(
                f"a worker died, and so did {self.retries} more tries ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}); often memory is short: a smaller batch_size needs less; the "
                "same command goes on from here"
            ) from error


def _answer(setting: Setting, job: Job) -> list[Lines | Failure]:
    """What a worker runs; whole, so that a task that is tried again gives nothing twice."""
    return list(bench(setting).work(job))
