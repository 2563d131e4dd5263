# SPDX-License-Identifier: Apache-2.0
"""What the tests of sweeps share: a small config, and what a journal says but for times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vlmprune.evaluation.leaderboard.config import Config
from vlmprune.evaluation.leaderboard.run import Settings, leaderboard

QUESTIONS, BATCH = 20, 8
SPECS = ("fastervlm@9", "fastv(layer=2)@9")
ROWS = [
    "dense",
    "blind",
    "random(seed=0)@9",
    "random(seed=1)@9",
    "random(seed=2)@9",
    "uniform@9",
    "pool@9",
    *SPECS,
    "random@9",
]


def config(model: Path | str, **changes: Any) -> Config:
    values = {
        "models": [str(model)],
        "specs": list(SPECS),
        "limit": QUESTIONS,
        "batch_size": BATCH,
        "max_new_tokens": 2,
    }
    return Config.of(values | changes)


def sweep(model: Path | str, out: Path, settings: Settings | None = None, **changes: Any) -> dict[str, Any]:
    return leaderboard(config(model, **changes), out, settings)


def journals(out: Path) -> dict[str, dict[str, Any]]:
    """Per spec what was answered, by sample, without times; a line that stands there twice is a failure."""
    found = {}
    for path in (out / "cells").glob("*.jsonl"):
        text = path.read_text()
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        ids = [line["id"] for line in lines]
        assert len(set(ids)) == len(ids), path
        recipe = json.loads(path.with_suffix(".json").read_text())
        timed = ("seconds", "sum")
        found[recipe["spec"]] = {
            line["id"]: {k: v for k, v in line.items() if k not in timed} for line in lines
        }
    return found


def comparable(results: dict[str, Any]) -> Any:
    """Of results what does not depend on when and how often the sweep was run."""
    return results["rows"], results["headline"], results["failed"]


def in_child(model: Path | str, out: Path, **changes: Any) -> None:
    """A sweep in a forked process: its threads must not be those of the parent, which it does not have."""
    torch.set_num_threads(1)
    sweep(model, out, **changes)
