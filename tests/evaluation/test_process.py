# SPDX-License-Identifier: Apache-2.0
"""What a command changes in its process: threads, noise and signals, and that all of it is put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from transformers.utils import logging

from vlmprune.evaluation.leaderboard.process import Terminated, kept_sigterm, quiet, terminable, threads
from vlmprune.models.loading import load


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("model", "wanted", "variable", "expected"),
    [
        ("tiny", None, None, 1),
        ("tiny", None, "2", 2),  # OMP_NUM_THREADS was read by torch when it was imported
        ("tiny", 3, None, 3),
        ("tiny", 3, "2", 3),
        ("another", None, None, 2),
        ("another", 3, None, 3),
    ],
)
def test_tiny_takes_one_thread_unless_told_otherwise(
    monkeypatch, two_threads, model, wanted, variable, expected
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with pytest.raises(KeyError), threads(model, wanted):
        assert torch.get_num_threads() == expected
        raise KeyError
    assert torch.get_num_threads() == 2


def test_sigterm_is_raised_and_the_handler_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not seen")
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_that_stands_for_sigterm_is_told_from_ctrl_c():
    """Ray, interrupted while it waits, raises a KeyboardInterrupt of its own."""
    with pytest.raises(Terminated), terminable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            raise KeyboardInterrupt from None
    with pytest.raises(KeyboardInterrupt) as caught, terminable():
        raise KeyboardInterrupt
    assert caught.type is KeyboardInterrupt


def test_ray_does_not_take_the_signal_over():
    """Its handler ends the driver without a word."""
    with pytest.raises(Terminated), terminable():
        with kept_sigterm():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)


def test_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with terminable(), kept_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_noise_is_off_inside_and_on_again_after(monkeypatch):
    monkeypatch.delenv("LOGURU_LEVEL", raising=False)
    logging.enable_progress_bar()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("of another package", FutureWarning, stacklevel=1)
            warnings.warn("of the user", UserWarning, stacklevel=1)
            assert not logging.is_progress_bar_enabled() and os.environ["LOGURU_LEVEL"] == "WARNING"
        warnings.warn("after", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in heard] == ["of the user", "after"]
    assert logging.is_progress_bar_enabled() and "LOGURU_LEVEL" not in os.environ


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("LOGURU_LEVEL", "TRACE")
    logging.disable_progress_bar()
    try:
        with quiet():
            assert os.environ["LOGURU_LEVEL"] == "TRACE"
        assert not logging.is_progress_bar_enabled() and os.environ["LOGURU_LEVEL"] == "TRACE"
    finally:
        logging.enable_progress_bar()


def test_tiny_is_loaded_without_a_bar(capfd):
    load("tiny")
    assert capfd.readouterr() == ("", "")


def test_debug_lines_of_lmms_eval_stay_away():
    pytest.importorskip("loguru")
    code = (
        "from vlmprune.evaluation.leaderboard.process import quiet\n"
        "with quiet():\n"
        "    from loguru import logger\n"
        "    logger.debug('noise')\n"
        "    logger.warning('a warning')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "noise" not in done.stderr and "a warning" in done.stderr
