# SPDX-License-Identifier: Apache-2.0
"""How far a leaderboard is, on stderr: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .screen import plain, stderr

EVERY = 60.0  # seconds between two lines


class Bars:
    """One bar per model and task, with the time that is left."""

    def __init__(self) -> None:
        self.shown = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            MofNCompleteColumn(),
            TextColumn("answers"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=stderr(),
            expand=True,
        )
        self._bar: Any = None

    def __enter__(self) -> Bars:
        self.shown.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shown.stop()

    def begin(self, what: str, total: int, done: int) -> None:
        self._bar = self.shown.add_task(plain(what).plain, total=total, completed=done)

    def advance(self, answers: int) -> None:
        self.shown.advance(self._bar, answers)

    def ended(self, spec: str) -> None:
        """The bar says it."""

    def note(self, text: str) -> None:
        self.shown.console.print(plain(f"note: {text}"), style="yellow", soft_wrap=True)


class Lines:
    """A line at the start, one a minute, and one for every cell that is whole."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.what, self.total, self.done = "", 0, 0
        self._begun = self._said = 0.0
        self._before = 0  # answers of earlier calls, see _left

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, what: str, total: int, done: int) -> None:
        self.what, self.total, self.done = what, total, done
        self._begun, self._before = self.clock(), done
        self._say(f"{done} of {total} answers are there")

    def advance(self, answers: int) -> None:
        self.done += answers
        if self.clock() - self._said >= EVERY:
            self._say(f"{self.done} of {self.total} answers ({self.done / self.total:.0%}), {self._left()}")

    def ended(self, spec: str) -> None:
        self._say(f"{spec} is whole")

    def note(self, text: str) -> None:
        _write(f"note: {text}")

    def _left(self) -> str:
        spent, made = self.clock() - self._begun, self.done - self._before
        # by the pace of this call: answers that were there before cost it nothing
        left = spent * (self.total - self.done) / made if made else 0
        return f"about {left / 60:.0f} min left"

    def _say(self, text: str) -> None:
        self._said = self.clock()
        _write(f"{time.strftime('%H:%M:%S')} {self.what}: {text}")


def _write(text: str) -> None:
    print(plain(text).plain, file=sys.stderr, flush=True)


def progress() -> Bars | Lines:
    """What suits stderr."""
    return Bars() if stderr().is_terminal else Lines()
