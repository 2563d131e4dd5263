# SPDX-License-Identifier: Apache-2.0
"""Try mutants, each in a process of its own: torch and transformers are imported once, then each trial forks.

A mutant is *killed* when its judge fails on it, by a check or a test that passes without it. A judge that
runs out of time or dies says nothing about the mistake, so that a timeout and a crash are counted as such.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from mutant import BrokenMutant, Checks, Judge, Mutant, Pytest, Watch, patched

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
START = "fork" if sys.platform == "linux" else "spawn"
Status = Literal["killed", "survived", "timeout", "crash", "broken"]


@dataclass(frozen=True)
class Verdict:
    """How a trial ended.

    Args:
        status: "killed" and "survived" are what the judge says; "broken" is a fault of mutant or judge.
        detail: what was said.
        killer: the single check or test that failed.
        unsupported: checks that were refused, which is a failure where they pass without the mutant.
        seconds: of the trial.
    """

    status: Status
    detail: str
    killer: Judge | None = None
    unsupported: tuple[str, ...] = ()
    seconds: float = 0.0


# in the process of a trial ------------------------------------------------------------------------


def prepare(judges: Sequence[Judge] = ()) -> None:
    """Import what every trial needs, and build the models that some share, so that a fork finds them."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    # what the tests do so that transformers can be imported beside a torchvision without its compiled part
    spec = importlib.util.spec_from_file_location("conftest_of_all_tests", TESTS / "conftest.py")
    # what it declares lives as long as it does
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401

    from vlmprune.testing.conformance import shared_model

    for family in {judge.family for judge in judges if isinstance(judge, Checks)}:
        shared_model(family, None, None)


def ask_checks(judge: Checks) -> Verdict:
    """Ask conformance checks until one fails."""
    from vlmprune.testing.conformance import Subject, checks_for, default_spec, run_check

    subject = Subject(default_spec(judge.spec), judge.family)
    checks = checks_for(subject)
    if judge.only and judge.only not in checks:
        raise BrokenMutant(f"there is no check {judge.only!r}")
    names = [judge.only] if judge.only else list(checks)
    refused = []
    for name in names:
        result = run_check(name, checks[name], subject)
        if result.status == "fail":
            return Verdict("killed", result.detail, replace(judge, only=name))
        if result.status == "unsupported":
            refused.append(name)
    passed = f"{len(names) - len(refused)} checks passed, {len(refused)} were refused"
    return Verdict("survived", passed, unsupported=tuple(refused))


class _Notes:
    """A pytest plugin: the first failure, and how many tests passed."""

    def __init__(self) -> None:
        self.failed, self.why, self.passed = "", "", 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._note(report)
        self.passed += report.when == "call" and report.passed

    def pytest_collectreport(self, report: Any) -> None:
        self._note(report)

    def _note(self, report: Any) -> None:
        if report.failed and not self.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed, self.why = report.nodeid, str(report.longrepr if crash is None else crash.message)


def ask_pytest(judge: Pytest) -> Verdict:
    """Run tests until one fails."""
    import pytest
    from hypothesis import Phase, settings

    # the same examples every time, kept nowhere; a failing one need not be made small
    settings.register_profile("mutants", derandomize=True, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")
    notes = _Notes()
    quietly = ["-q", "-x", "-p", "no:cacheprovider"]
    here = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(ROOT / judge.path)]
    code = pytest.main([*quietly, *here], plugins=[notes])
    if code == pytest.ExitCode.TESTS_FAILED:
        return Verdict("killed", notes.why, Pytest(notes.failed))
    if code == pytest.ExitCode.OK and notes.passed:
        return Verdict("survived", f"{notes.passed} tests passed")
    if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED, pytest.ExitCode.USAGE_ERROR):
        raise BrokenMutant(f"no test of {judge} ran")
    raise RuntimeError(f"pytest ended with {code!r}: {notes.failed} {notes.why}")


def judged(mutant: Mutant | None, judge: Judge) -> Verdict:
    """Ask the judge, on the package with the mutant, or as it is."""
    context: AbstractContextManager[Watch] = nullcontext(Watch()) if mutant is None else patched(mutant)
    try:
        with context as watch:
            verdict = ask_checks(judge) if isinstance(judge, Checks) else ask_pytest(judge)
    except BrokenMutant as error:
        return Verdict("broken", str(error))
    if watch.fault:
        return Verdict("broken", f"the mutant itself raised {watch.fault}")
    if verdict.status == "survived" and watch.calls == 0:
        return Verdict("survived", "the mutant was never called")
    return verdict


def _child(mutant: Mutant | None, judge: Judge, pipe: Connection, log: str, fresh: bool) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # so that a timeout ends what the tests have started as well
    with open(log, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        if fresh:
            prepare()
        import torch

        # a pool of threads, which the process before may have had, is lost in a fork
        torch.set_num_threads(1)
        gc.freeze()  # what it had made is no garbage of this one: pytest would look it all through twice
        verdict = judged(mutant, judge)
    except BaseException as error:
        traceback.print_exc()
        verdict = Verdict("crash", f"{type(error).__name__}: {error}")
    pipe.send(verdict)
    pipe.close()


# in the process that asks -------------------------------------------------------------------------


class _Trial:
    """A running trial."""

    def __init__(
        self, mutant: Mutant, judge: Judge, applied: bool, timeout: float, log: Path, start: str
    ) -> None:
        self.mutant = mutant
        self.judge = judge
        self.applied = applied
        self.log = log
        context = multiprocessing.get_context(start)
        self.pipe, theirs = context.Pipe(duplex=False)
        given = (mutant if applied else None, judge, theirs, str(log), start != "fork")
        self.process = context.Process(target=_child, args=given)
        self.started = time.monotonic()
        self.deadline = self.started + timeout
        self.process.start()
        theirs.close()

    def verdict(self) -> Verdict | None:
        """How it ended; None while it runs."""
        found = self._told()
        if found is None and not self.process.is_alive():
            found = self._told() or Verdict(
                "crash", f"the process ended with {self.process.exitcode}: {self._last_line()}"
            )
        if found is None and time.monotonic() > self.deadline:
            found = Verdict("timeout", f"{self.judge} took more than {self.deadline - self.started:.0f} s")
        if found is None:
            return None
        self.end()
        return replace(found, seconds=time.monotonic() - self.started)

    def _told(self) -> Verdict | None:
        with suppress(EOFError):
            if self.pipe.poll():
                return self.pipe.recv()
        return None

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return next((line for line in reversed(lines) if line.strip()), "it wrote nothing")

    def end(self) -> None:
        """Leave nothing of the trial running."""
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.log.unlink(missing_ok=True)


def settled(verdict: Verdict, judge: Judge, without: Verdict) -> Verdict:
    """The verdict on a mutant, seen beside that on the package without it."""
    refused = verdict.status == "killed" and without.unsupported
    if without.status != "survived" or refused:
        return Verdict(
            "broken", f"{verdict.killer or judge} does not pass without the mutant: {without.detail}"
        )
    new = [name for name in verdict.unsupported if name not in without.unsupported]
    if verdict.status == "killed" or not new or not isinstance(judge, Checks):
        return verdict
    killer = replace(judge, only=new[0])
    return replace(verdict, status="killed", detail="refused with the mutant only", killer=killer)


def run(
    mutants: Sequence[Mutant], timeout: float = 300.0, jobs: int = 1, start: str = START
) -> Iterator[tuple[Mutant, Verdict]]:
    """Every mutant with its verdict, as they end. What notices one is asked without it too: it must pass.

    Args:
        timeout: seconds for one trial.
        jobs: trials at a time.
        start: how processes start, as multiprocessing names it.
    """
    waiting = deque((mutant, mutant.by, True) for mutant in mutants)
    running: list[_Trial] = []
    held: dict[str, Verdict] = {}
    without: dict[Judge, Verdict] = {}
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    log = Path(folder) / f"{next(numbers)}.log"
                    running.append(_Trial(*waiting.popleft(), timeout, log, start))
                soonest = min(trial.deadline for trial in running) - time.monotonic()
                ends = [end for trial in running for end in (trial.pipe, trial.process.sentinel)]
                wait(ends, max(0.0, soonest))
                for trial, verdict in [(trial, trial.verdict()) for trial in running]:
                    if verdict is None:
                        continue
                    running.remove(trial)
                    mutant = trial.mutant
                    if not trial.applied:
                        without[trial.judge] = verdict
                        verdict = held.pop(mutant.name)
                    question = verdict.killer or (mutant.by if verdict.unsupported else None)
                    if question is None:
                        yield mutant, verdict
                    elif question in without:
                        yield mutant, settled(verdict, mutant.by, without[question])
                    else:
                        held[mutant.name] = verdict
                        waiting.appendleft((mutant, question, False))
        finally:
            for trial in running:
                trial.end()
