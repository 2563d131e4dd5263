# SPDX-License-Identifier: Apache-2.0
"""From journals to rows: everything is computed anew from the samples on disk."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...models.tiny import BUNDLED
from ...plain import plain
from ...speed.conditions import conditions, device_name
from ..answer.record import Record
from ..stats.summary import DENSE, summarise
from ..tasks.registry import get_task
from ..tasks.sample import Sample
from .config import Config
from .plan import Setting
from .rundir import Run


def rows_of(
    folder: Path,
    setting: Setting,
    samples: Sequence[Sample],
    cells: Mapping[str, str],
    config: Config,
    matched: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one model on one task and its headline, as ``results.json`` holds them.

    Args:
        cells: of every spec that answered everything.
        matched: for specs without a budget, that of the baselines which they are compared with.
    """
    run = Run(folder)
    records = []
    # in the order of the task, whoever answered first: sums of floats depend on it
    for cell in cells.values():
        lines = {line["id"]: line for line in run.journal(cell)}
        records += [Record.read(lines[sample.id]) for sample in samples]
    task = get_task(setting.task)
    pictures = {sample.id: len(sample.images) for sample in samples}
    model, name = setting.model, setting.task
    found = summarise(records, task.blind, model=model, task=name, pictures=pictures, matched=matched)
    official = _official(task, samples, records)
    rows = []
    for row in found.rows:
        paper = config.published.find(row.spec, setting.task) if config.published else None
        fingerprint, own = cells.get(row.spec), official.get(row.spec)  # a mean over seeds has no cell
        rows.append(plain(replace(row, fingerprint=fingerprint, paper=paper, official=own)))
    return rows, plain(found.headline)


def _official(task: Any, samples: Sequence[Sample], records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Per spec the task's own numbers (F1, sums over categories, ...), where it has such."""
    if not hasattr(task, "official"):
        return {}
    answers: dict[str, dict[str, str]] = {}
    for record in records:
        answers.setdefault(record.spec, {})[record.id] = record.answer
    return {
        spec: task.official(samples, [mine[sample.id] for sample in samples])
        for spec, mine in answers.items()
    }


def complete(cells: Mapping[str, str]) -> bool:
    """Whether there is something to compare with; dense alone is a table, with blind."""
    return DENSE in cells


def provenance(settings: Sequence[Setting], device: str, command: str) -> dict[str, Any]:
    """Under which conditions the answers of a run were made."""
    found = conditions()
    accelerator = device_name(torch.device(device)) if device != "cpu" else None
    return {
        "versions": found["versions"] | dict(settings[0].versions),
        "commit": found["commit"],
        "command": command,
        "hardware": {
            "processor": found["processor"],
            "accelerator": accelerator,
            "system": platform.platform(),
        },
        "model": {
            setting.model: {"weights": setting.weights, "licence": licence(setting.model)}
            for setting in settings
        },
        "date": found["date"],
    }


def licence(model: str) -> str:
    """What the model card says, where there is one at hand."""
    if model in BUNDLED:
        return "Apache-2.0"
    card = Path(model).expanduser() / "README.md"
    if card.is_file():
        # of the lines between --- at the top of a card: "license: apache-2.0"
        stated = re.search(
            r"\A---\n(?:.*\n)*?license: *(\S+)", card.read_text(encoding="utf-8", errors="replace")
        )
        if stated:
            return stated[1]
    return "see the model card"
