# SPDX-License-Identifier: Apache-2.0
"""What a command changes in its own process while it runs and puts back: threads, noise, SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ...models.tiny import BUNDLED, no_bars


class Terminated(KeyboardInterrupt):
    """SIGTERM came; whatever cleans up after Ctrl-C cleans up after this."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises ``Terminated`` in the main thread: a job that is preempted can say where it was."""
    if threading.current_thread() is not threading.main_thread():  # only that one receives signals
        yield
        return

    came: list[int] = []

    def stop(number: int, frame: Any) -> NoReturn:
        came.append(number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        if came and not isinstance(error, Terminated):  # Ray raises its own in the place of any other
            raise Terminated from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def kept_sigterm() -> Iterator[None]:
    """What ``terminable`` set stays, whatever sets another handler meanwhile."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # SIG_DFL is no function: nothing of ours was set
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def threads(model: str, wanted: int | None = None) -> Iterator[None]:
    """``wanted`` threads for torch, else one for models of the package; ``OMP_NUM_THREADS`` goes first."""
    import torch

    count = wanted
    if count is None and model in BUNDLED and "OMP_NUM_THREADS" not in os.environ:
        count = 1
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, no warnings of what will change in other packages, no debug lines of lmms-eval."""
    wanted = {"LOGURU_LEVEL": "WARNING"}  # both are read when lmms-eval brings loguru and datasets in
    if not sys.stderr.isatty():  # on a terminal, a bar tells how long a download takes
        wanted["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    # what the user has set stays
    mine = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        with no_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name in mine:
            del os.environ[name]
