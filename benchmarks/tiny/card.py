# SPDX-License-Identifier: Apache-2.0
"""The card and the provenance of a shipped model, written from what the run logged and what was measured
afterwards.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

PACKAGES = ("torch", "transformers", "pillow", "numpy", "safetensors", "tokenizers")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else ())
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def provenance(run: Path, recipe: Path, measured: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Everything that led to the weights: recipe, log of every evaluation, versions, machine, final
    figures."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row.pop("stage"), []).append(row)
    return {
        "recipe": yaml.safe_load(recipe.read_text()),
        "notes": notes,
        "measured": measured,
        "cpu_seconds": {stage: max(row["cpu_seconds"] for row in log) for stage, log in stages.items()},
        "machine": cpu_name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "log": stages,
    }


def table(measured: dict[str, Any]) -> str:
    """Families by split, with the guesser's score."""
    splits = list(measured)
    blind = next(iter(measured.values()))["blind"]
    lines = ["| family | blind | " + " | ".join(splits) + " |", "|---" * (2 + len(splits)) + "|"]
    for family, guess in blind.items():
        lines.append(
            f"| {family} | {guess:.3f} | "
            + " | ".join(f"{measured[s]['families'][family]:.3f}" for s in splits)
            + " |"
        )
    mean = sum(blind.values()) / len(blind)
    return "\n".join(
        [*lines, f"| mean | {mean:.3f} | " + " | ".join(f"{measured[s]['mean']:.3f}" for s in splits) + " |"]
    )


def curve(log: list[dict[str, Any]]) -> str:
    """Dev figures of a stage, one line per evaluation."""
    names = list(log[0]["dev"])
    lines = ["| step | CPU s | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for row in log:
        figures = " | ".join(f"{row['dev'][name]:.3f}" for name in names)
        lines.append(f"| {row['step']} | {row['cpu_seconds']} | {figures} |")
    return "\n".join(lines)


def card(found: dict[str, Any], template: str) -> str:
    """Fill the template: every figure comes from the provenance."""
    measured = found["measured"]
    auc = "\n".join(
        f"| {layer} | {value:.3f} |" for layer, value in measured["test"]["cls_attention_auc"].items()
    )
    out = {f"{split} = {figures['questions_per_family']:.0f}" for split, figures in measured.items()}
    weak = [
        f for f, score in measured["test"]["families"].items() if score < measured["test"]["blind"][f] + 0.2
    ]
    low = [f for f, score in measured["test"]["families"].items() if score < 0.7]
    return template.format(
        table=table(measured),
        auc=auc,
        counts=", ".join(sorted(out)),
        machine=found["machine"],
        versions=", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        cpu=", ".join(f"{stage} {seconds}" for stage, seconds in found["cpu_seconds"].items()),
        total=sum(found["cpu_seconds"].values()),
        notes="\n".join(f"- {note}" for note in found["notes"]),
        fingerprint=measured["test"]["fingerprint"],
        curves="\n\n".join(f"### {stage}\n\n{curve(log)}" for stage, log in found["log"].items()),
        half=measured["test"]["half_width_95"],
        seed=found["recipe"]["seed"],
        weak=", ".join(weak) or "none",
        low=", ".join(low) or "none",
    )
