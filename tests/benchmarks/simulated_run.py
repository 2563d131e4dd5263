# SPDX-License-Identifier: Apache-2.0
"""A run folder whose answers are drawn from a seeded simulation, over the real questions of the built-in benchmark.

It is written through the format that ``vlmprune leaderboard`` writes, so that the page can be looked at and tested without a
model. Every number in it is invented and the page that is made of it says so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune.benchmarks.rundir import FORMAT, cell_id
from vlmprune.benchmarks.shapes import shapes

SIDE = 12  # patches per side
MODEL = "simulated-vlm"
# method -> accuracy left at a quarter of the tokens, on general and on text questions, and how much it looks at objects
QUALITY = {
    "random": (0.80, 0.45, 0.0), "uniform": (0.84, 0.50, 0.0), "pool": (0.87, 0.62, 0.0), "fastervlm": (0.86, 0.62, 1.2),
    "divprune": (0.88, 0.48, 0.4), "holov": (0.89, 0.58, 0.9), "zooprune": (0.85, 0.55, 0.7), "fastv(layer=2)": (0.93, 0.80, 2.0),
}  # fmt: skip
EVIL = '<script>document.title="owned"</script><img src="http://evil.example/x.png" onerror="document.title=1">'


def simulate(
    folder: Path, *, samples: int = 300, budgets: tuple[int, ...] = (72, 36, 18, 9), seed: int = 0, speed: bool = True, **changes: Any
) -> Path:
    """Write a run; ``changes`` replace keys of the row of fastervlm at the first budget, to break it."""
    (folder / "cells").mkdir(parents=True)
    made = _Simulation(folder, samples, seed)
    made.dense()
    for budget in budgets:
        for method in QUALITY:
            seeds = (0, 1, 2) if method == "random" else (None,)
            for each in seeds:
                made.pruned(method, budget, each)
            if method == "random":
                made.band(budget)
    for row in made.rows:
        if row["spec"] == f"fastervlm@{budgets[0]}":
            row |= changes
    provenance = {
        "note": "SIMULATED: every answer and time on this page was drawn at random to test the page; nothing was measured",
        "versions": {"vlmprune": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "python": "3.11"},
        "commit": "0" * 7, "command": f"vlmprune leaderboard --specs {EVIL}", "hardware": "none", "date": "2026-01-01T00:00:00+00:00",
        "model": {MODEL: {"weights": "simulated"}}, "licence": "Apache-2.0", "calibration": "none",
    }  # fmt: skip
    results = {"format": FORMAT, "provenance": provenance, "rows": made.rows, "headline": {"families": [
        family for family in made.task.families if family != "count"], "excluded": {"count": "the dense model does not beat a blind guess"}},
        "speed": _speed(budgets) if speed else []}  # fmt: skip
    _write(folder / "results.json", results)
    _write(folder / "run.json", {"format": FORMAT, "version": "0.1.0", "created": provenance["date"], "config": {}, "command": ""})
    return folder


class _Simulation:
    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self.folder, self.task, self.rng = folder, shapes(), np.random.default_rng(seed)
        self.samples = self.task.samples("test", count)
        self.limit = count
        self.luck = self.rng.random(count)  # shared by all specs: easy questions stay easy
        self.answers = defaultdict(set)
        for sample in self.samples:
            self.answers[sample.family] |= set(sample.answers)
        self.masks = [[_patches(mask) for mask in sample.object_masks()] for sample in self.samples]
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[str, np.ndarray] = {}

    def dense(self) -> None:
        self._row("dense", "dense", None, self.luck < 0.86, None, 0.0)

    def pruned(self, method: str, budget: int, seed: int | None) -> None:
        general, text, gaze = QUALITY[method]
        strain = np.log2(SIDE * SIDE / budget) / 2  # 1 at a quarter of the tokens
        keep = np.array([(text if sample.group == "text" else general) ** strain for sample in self.samples])
        if not method.startswith(("random", "uniform", "pool")):
            keep = np.where([sample.family == "needle" for sample in self.samples], keep * 0.85, keep)
        fresh = self.rng.random(len(self.samples))
        right = np.where(self.luck < 0.86, fresh < keep, fresh < 0.25)
        text = method if seed is None or not seed else f"{method}(seed={seed})"
        self._row(f"{text}@{budget}", method.partition("(")[0], budget, right, seed, gaze)

    def _row(self, spec: str, method: str, budget: int | None, right: np.ndarray, seed: int | None, gaze: float) -> None:
        recipe = {
            "model": MODEL, "weights": "simulated", "spec": spec, "task": self.task.name, "task_fingerprint": self.task.fingerprint,
            "split": "test", "limit": self.limit, "generation": {"max_new_tokens": 8}, "seeds": [seed or 0], "versions": {"torch": "2.13.0"},
        }  # fmt: skip
        cell = cell_id(recipe)
        _write(self.folder / "cells" / f"{cell}.json", recipe)
        lines = [self._sample(i, bool(right[i]), budget, gaze) for i in range(len(self.samples))]
        (self.folder / "cells" / f"{cell}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"id": "torn', "utf-8")
        score = np.array([line["score"] for line in lines])
        self.scores[spec] = score
        self.rows.append(self._summary(spec, method, budget, cell, score, lines))

    def _sample(self, i: int, right: bool, budget: int | None, gaze: float) -> dict[str, Any]:
        sample = self.samples[i]
        others = sorted(self.answers[sample.family] - set(sample.answers)) or ["nothing"]
        answer = sample.answers[0] if right else EVIL if i == 7 else others[self.rng.integers(len(others))]
        keep, on_object, images = [], None, len(sample.images)
        for mask in self.masks[i]:
            score = self.rng.gumbel(size=SIDE * SIDE) + gaze * mask.reshape(-1)
            index = np.sort(np.argsort(-score)[:budget])
            keep.append({"keep_idx": index.tolist(), "grids": [[SIDE, SIDE]], "view": "stretch"})
            on_object = float(mask.reshape(-1)[index].mean())
        taken = budget or SIDE * SIDE
        return {
            "id": sample.id, "cluster": sample.cluster, "family": sample.family, "group": sample.group, "answer": answer,
            "score": float(right), "dense_tokens": SIDE * SIDE * images, "realised_tokens": taken * images,
            "layer_tokens": taken * images, "firings": 3, "on_object": on_object, "error": None, "peak_memory": None,
            "seconds": {"first_token": 0.01 + taken / 4e3, "total": 0.05 + taken / 2e3, "choosing": 0.001},
        } | ({"keep": keep} if i < 40 and budget else {})  # fmt: skip

    def _summary(self, spec: str, method: str, budget: int | None, cell: str | None, score: np.ndarray, lines: list) -> dict[str, Any]:
        dense = self.scores["dense"]
        families, whole = self._by("family", score), self._by("family", dense)
        worst = min(families, key=lambda family: families[family] / whole[family])
        random = self.scores.get(f"random@{budget}")
        hard = self.scores.get(f"pool@{budget}", np.ones(1)) == 0
        images = np.mean([len(sample.images) for sample in self.samples])
        return {
            "spec": spec, "model": MODEL, "task": self.task.name, "n": len(score), "accuracy": float(score.mean()), "ci": _interval(score),
            "families": families, "groups": self._by("group", score), "keep": None if budget is None else str(budget), "method": method,
            "worst": {"family": worst, "accuracy": families[worst], "retained": families[worst] / whole[worst]},
            "realised_tokens": float((budget or SIDE * SIDE) * images), "dense_tokens": float(SIDE * SIDE * images),
            "layer_tokens": float((budget or SIDE * SIDE) * images), "retained": float(score.mean() / dense.mean()),
            "vs_dense": None if budget is None else _paired(score, dense),
            "vs_random": None if random is None or method == "random" else _paired(score, random),
            "flips": {"lost": int((dense > score).sum()), "won": int((score > dense).sum())}, "agreement": float((score == dense).mean()),
            "hard": {"n": int(hard.sum()), "accuracy": float(score[hard].mean())} if hard.any() and len(hard) > 1 else None,
            "mdd": 0.05, "on_object": None if budget is None else 0.2, "firings": sum(line["firings"] for line in lines), "failed": 0,
            "empty": 0, "band": None, "fingerprint": cell, "calibrated": False, "paper": None,
        }  # fmt: skip

    def band(self, budget: int) -> None:
        specs = [f"random{text}@{budget}" for text in ("", "(seed=1)", "(seed=2)")]
        rows = [row for row in self.rows if row["spec"] in specs]
        values = [row["accuracy"] for row in rows]
        merged = self._summary(specs[0], "random", budget, None, np.mean([self.scores[spec] for spec in specs], axis=0), [])
        merged |= {"firings": sum(row["firings"] for row in rows), "band": {"seeds": [0, 1, 2], "low": min(values), "high": max(values)}}
        self.rows.append(merged)

    def _by(self, key: str, score: np.ndarray) -> dict[str, float]:
        names = np.array([getattr(sample, key) for sample in self.samples])
        return {str(name): float(score[names == name].mean()) for name in dict.fromkeys(names)}


def _interval(score: np.ndarray) -> list[float]:
    half = 1.96 * score.std() / np.sqrt(len(score))
    return [float(score.mean() - half), float(score.mean() + half)]


def _paired(score: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    low, high = _interval(score - other)
    p = float(np.exp(-abs((score - other).mean()) / max((score - other).std(), 1e-9) * len(score) ** 0.5))
    return {"difference": float((score - other).mean()), "ci": [low, high], "p": p, "p_holm": min(1.0, 8 * p)}


def _patches(mask: np.ndarray) -> np.ndarray:
    side = mask.shape[0] // SIDE
    return mask[: side * SIDE, : side * SIDE].reshape(SIDE, side, SIDE, side).mean((1, 3)) > 0.1


def _speed(budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for spec, tokens in [("dense", SIDE * SIDE), *((f"fastervlm@{budget}", budget) for budget in budgets)]:
        first, total = 0.01 + tokens / 4e3, 0.05 + tokens / 2e3
        rows.append({
            "spec": spec, "model": MODEL, "batch": 1, "answer_tokens": 32, "choosing_s": 0.001, "first_token_s": first, "total_s": total,
            "tokens_per_layer": [tokens] * 4, "flops": 1e9 * tokens, "peak_bytes": 1 << 24, "versus_dense": 0.046 / first,
            "versus_dense_total": 0.122 / total, "versus_free_k": 1.05, "device": "none (simulated)", "dtype": "float32", "attention": "sdpa",
            "p20": {"first_token_s": first * 0.97, "total_s": total * 0.97}, "p80": {"first_token_s": first * 1.04, "total_s": total * 1.04},
        })  # fmt: skip
    return rows


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")
