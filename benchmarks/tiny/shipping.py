# SPDX-License-Identifier: Apache-2.0
"""What the shipped models say of their making: recipe, log, versions, notes; a table; and the last files."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from files import seal

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")


def making(run: Path) -> dict[str, Any]:
    """How the model of a run was made; ``log`` has a row for each evaluation."""
    return {
        "recipe": yaml.safe_load((run / "recipe.yaml").read_text()),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "notes": notes(run),
        "log": [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()],
    }


def notes(run: Path) -> list[str]:
    """What a person wrote down about the run, a line each; "as the recipe says" where nothing was."""
    path = run / "notes.txt"
    return path.read_text().splitlines() if path.exists() else ["all in one go, as the recipe says"]


def by_stage(log: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in log:
        stages.setdefault(row["stage"], []).append({key: row[key] for key in row if key != "stage"})
    return stages


def told(found: dict[str, Any]) -> dict[str, Any]:
    """What every card has a place for."""
    return {
        "seed": found["recipe"]["seed"],
        "notes": bullets(found["notes"]),
        "versions": ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
    }


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """In Markdown."""
    rows = [head, ("---",) * len(head), *lines]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


def finish(out: Path, found: dict[str, Any], card: str) -> None:
    """Write card and provenance beside the model, then the hashes of all."""
    (out / "provenance.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "card.md").write_text(card)
    seal(out)
