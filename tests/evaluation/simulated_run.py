# SPDX-License-Identifier: Apache-2.0
"""A run folder whose answers are drawn from a seeded simulation, over the real questions of the benchmark.

It is written in the format of ``vlmprune leaderboard`` and summed up by the same statistics, so that the page
can be looked at and tested without a model. Every answer in it is invented, and the page made of it says so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune.evaluation.answer.record import Record
from vlmprune.evaluation.leaderboard.rundir import FORMAT, cell_id, encode_line
from vlmprune.evaluation.stats.summary import summarise
from vlmprune.evaluation.tasks.shapes import shapes
from vlmprune.plain import plain

SIDE = 12  # patches per side
TOKENS = SIDE * SIDE
# method -> share of answers left at a quarter of the tokens, to general and to text questions, and how much
# it looks at objects
QUALITY = {
    "random": (0.80, 0.45, 0.0),
    "uniform": (0.84, 0.50, 0.0),
    "pool": (0.87, 0.62, 0.0),
    "fastervlm": (0.86, 0.62, 1.2),
    "divprune": (0.88, 0.48, 0.4),
    "holov": (0.89, 0.58, 0.9),
    "zooprune": (0.85, 0.55, 0.7),
    "fastv(layer=2)": (0.94, 0.82, 2.0),
}
SEEDS = (0, 1, 2)
EVIL = (
    '<script>document.title="owned"</script><img src="http://evil.example/x.png" onerror="document.title=1">'
)
NOTE = (
    "SIMULATED: every answer and time on this page was drawn at random to test the page; nothing was measured"
)


def simulate(
    folder: Path,
    *,
    samples: int = 300,
    budgets: tuple[int, ...] = (72, 36, 18, 9),
    models: tuple[str, ...] = ("simulated-vlm",),
    speed: bool = True,
    resamples: int = 2000,
    **changes: Any,
) -> Path:
    """Write a run; ``changes`` replace keys of the row of fastervlm at the first budget, to break it."""
    (folder / "cells").mkdir(parents=True)
    rows, headline = [], []
    for number, model in enumerate(models):
        made = _Simulation(folder, model, samples, seed=number)
        made.answer("dense", None, 0)
        for budget in budgets:
            for method in QUALITY:
                for seed in SEEDS if method == "random" else (0,):
                    made.answer(method, budget, seed)
        pictures = {sample.id: len(sample.images) for sample in made.samples}
        names = {"model": model, "task": made.task.name}
        found = summarise(made.records, made.task.blind, **names, pictures=pictures, resamples=resamples)
        rows += [plain(replace(row, fingerprint=made.cells.get(row.spec))) for row in found.rows]
        headline.append(plain(found.headline))
    for row in rows:
        if row["spec"] == f"fastervlm@{budgets[0]}":
            row |= changes
    provenance = {
        "note": NOTE,
        "versions": {"vlmprune": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "python": "3.11"},
        "commit": "0" * 7,
        "command": f"vlmprune leaderboard --specs {EVIL}",
        "hardware": "none",
        "date": "2026-01-01T00:00:00+00:00",
        "model": {model: {"weights": "simulated", "licence": "none"} for model in models},
        "licence": "Apache-2.0",
        "calibration": "none",
    }
    card = [row for model in models for row in _speed(model, budgets)] if speed else []
    write(
        folder / "results.json",
        {"format": FORMAT, "provenance": provenance, "rows": rows, "headline": headline, "speed": card},
    )
    write(
        folder / "run.json",
        {"format": FORMAT, "version": "0.1.0", "created": provenance["date"], "config": {}, "command": ""},
    )
    return folder


class _Simulation:
    """One model on one task."""

    def __init__(self, folder: Path, model: str, count: int, seed: int) -> None:
        self.folder, self.model, self.limit, self.task = folder, model, count, shapes()
        self.rng = np.random.default_rng(seed)
        self.samples = self.task.samples("test", count)
        self.luck = self.rng.random(count)  # shared by all specs: easy questions stay easy
        self.answers = defaultdict(set)
        for sample in self.samples:
            self.answers[sample.family] |= set(sample.answers)
        self.masks = [[_patches(mask) for mask in sample.object_masks()] for sample in self.samples]
        self.records: list[Record] = []
        self.cells: dict[str, str] = {}

    def answer(self, method: str, budget: int | None, seed: int) -> None:
        """All samples under one spec, as a cell."""
        spec = (
            method
            if budget is None
            else f"random(seed={seed})@{budget}"
            if method == "random"
            else f"{method}@{budget}"
        )
        general, text, gaze = QUALITY.get(method, (1.0, 1.0, 0.0))
        strain = np.log2(TOKENS / (budget or TOKENS)) / 2  # 1 at a quarter of the tokens
        recipe = {
            "model": self.model,
            "weights": "simulated",
            "spec": spec,
            "task": self.task.name,
            "task_fingerprint": self.task.fingerprint,
            "split": "test",
            "limit": self.limit,
            "generation": {"max_new_tokens": 8},
            "seeds": [seed],
            "versions": {"torch": "2.13.0"},
        }
        cell = self.cells[spec] = cell_id(recipe)
        write(self.folder / "cells" / f"{cell}.json", recipe)
        lines = []
        for i, sample in enumerate(self.samples):
            left = (text if sample.group == "text" else general) ** strain
            right = (
                self.rng.random() < left
                if self.luck[i] < 0.86
                else budget is not None and self.rng.random() < 0.25
            )
            lines.append({"spec": spec, **self._line(i, right, budget, gaze)})
        self.records += map(Record.read, lines)
        data = b"".join(encode_line(cell, line) for line in lines)
        (self.folder / "cells" / f"{cell}.jsonl").write_bytes(data + b'{"id": "torn')

    def _line(self, i: int, right: bool, budget: int | None, gaze: float) -> dict[str, Any]:
        sample, images = self.samples[i], len(self.samples[i].images)
        others = sorted(self.answers[sample.family] - set(sample.answers)) or ["nothing"]
        answer = sample.answers[0] if right else EVIL if i == 7 else others[self.rng.integers(len(others))]
        keep, looked = [], []
        for mask in self.masks[i]:
            score = self.rng.gumbel(size=TOKENS) + gaze * mask.reshape(-1)
            index = np.sort(np.argsort(-score)[:budget])
            keep.append({"keep_idx": index.tolist(), "grids": [[SIDE, SIDE]], "view": "stretch"})
            looked.append(float(mask.reshape(-1)[index].mean()))
        taken = (budget or TOKENS) * images
        return {
            "id": sample.id,
            "cluster": sample.cluster,
            "family": sample.family,
            "group": sample.group,
            "answer": answer,
            "score": float(right),
            "dense_tokens": TOKENS * images,
            "realised_tokens": taken,
            "layer_tokens": float(taken),
            "firings": 3,
            "on_object": float(np.mean(looked)),
            "positions": "compact",
            "encoding": "shared",
            "error": None,
            "peak_memory": None,
            "seconds": {"first_token": 0.01 + taken / 4e3, "total": 0.05 + taken / 2e3, "choosing": 0.001},
        } | ({"keep": keep} if i < 40 and budget else {})


def _patches(mask: np.ndarray) -> np.ndarray:
    side = mask.shape[0] // SIDE
    return mask[: side * SIDE, : side * SIDE].reshape(SIDE, side, SIDE, side).mean((1, 3)) > 0.1


def _speed(model: str, budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for spec, tokens in [("dense", TOKENS), *((f"fastervlm@{budget}", budget) for budget in budgets)]:
        first, total = 0.01 + tokens / 4e3, 0.05 + tokens / 2e3
        rows.append(
            {
                "spec": spec,
                "model": model,
                "batch": 1,
                "answer_tokens": 32,
                "choosing_s": 0.001,
                "first_token_s": first,
                "total_s": total,
                "tokens_per_layer": [tokens] * 4,
                "flops": 1e9 * tokens,
                "peak_bytes": 1 << 24,
                "versus_dense": 0.046 / first,
                "versus_dense_total": 0.122 / total,
                "versus_free_k": 1.05,
                "device": "none (simulated)",
                "dtype": "float32",
                "attention": "sdpa",
                "p20": {"first_token_s": first * 0.97, "total_s": total * 0.97},
                "p80": {"first_token_s": first * 1.04, "total_s": total * 1.04},
            }
        )
    return rows


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
