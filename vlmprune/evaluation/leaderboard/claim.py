# SPDX-License-Identifier: Apache-2.0
"""What a run would replace in its folder, and what else lies there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import EvaluationError
from ..stats.summary import budget_of
from .config import Config
from .journal import cells_of, is_sound
from .plan import with_baselines
from .rundir import Run, read_object

# what every row of a table depends on, beside what is listed
_SCALARS = (
    "split",
    "limit",
    "batch_size",
    "max_new_tokens",
    "positions",
    "dtype",
    "device",
    "trust_remote_code",
)


def refuse_other_config(folder: Path, asked: Mapping[str, Any]) -> None:
    """Raise where results.json answers a config of which something is missing in ``asked``.

    More models, specs or tasks only add rows. Anything else would put another table in the place of one that
    may have been quoted, with nothing to tell them apart.
    """
    try:
        before = read_object(folder / "results.json").get("config")
    except EvaluationError:
        return  # there is none, or it cannot be read: it is computed anew from the journals
    if not isinstance(before, dict):
        return
    differ = list(_lost(before, asked))
    if differ:
        raise EvaluationError(
            f"{folder} holds the results of another config ({'; '.join(differ)}), which this one would "
            "replace; choose another folder with --out, or say --replace: all answers stay in the folder, "
            "and the table becomes that of this config"
        )


def _lost(before: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """What the results of ``before`` cover and those of ``asked`` do not."""
    covered = {
        "models": asked["models"],
        "tasks": asked["tasks"],
        "seeds": asked["seeds"],
        "specs": _covered(asked),
    }
    for key, known in covered.items():
        there = before.get(key)
        # from a file, where it may be anything
        listed: list[Any] = there if isinstance(there, list) else []
        gone = [str(one) for one in listed if one not in known]
        new = [str(one) for one in asked[key] if one not in listed]
        if gone:
            yield f"{key}: {', '.join(gone)} there" + (f", {', '.join(new)} here" if new else "")
    for key in _SCALARS:
        if before.get(key) != asked[key]:
            yield f"{key}: {before.get(key)} there, {asked[key]} here"


def _covered(asked: Mapping[str, Any]) -> set[str]:
    """Every spec that gets a row, baselines and the mean of the seeds of random included."""
    texts = [*asked["specs"], *with_baselines(asked["specs"], asked["seeds"])]
    # the mean of the seeds of random, as its row is called
    return {*texts, *(f"random@{budget}" for budget in map(budget_of, texts) if budget)}


def asked_of(config: Config, device: str, trust_remote_code: bool) -> dict[str, Any]:
    """All that a table answers, as plain values."""
    values = config.plain()
    del values["out"], values["published"]  # where it is written, and what is shown beside it
    # which of several GPUs answered decides nothing
    return values | {"device": device.partition(":")[0], "trust_remote_code": trust_remote_code}


def others(folder: Path, mine: set[str]) -> list[dict[str, Any]]:
    """Cells that are no part of a table: of other configs, and of other versions of code, data or weights."""
    found = []
    for cell in cells_of(folder):
        if cell in mine or not (folder / "cells" / f"{cell}.jsonl").is_file():
            continue
        # an incomplete last line has no line end, and is no answer
        answers = (folder / "cells" / f"{cell}.jsonl").read_bytes().count(b"\n")
        known = Run(folder).recipe(cell) if is_sound(folder, cell) else {}
        named = {key: known.get(key) for key in ("spec", "model", "task")}
        found.append({"cell": cell, **named, "answers": answers})
    return found
