# SPDX-License-Identifier: Apache-2.0
"""Flips: questions that pruning lost or won, with the patches that were kept drawn on the pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import EvaluationError
from ..rundir import Run
from ..tasks import get_task
from .table import is_seed, setting

SMALLEST = 288  # pixels: smaller pictures are enlarged so that the outlines of patches can be seen


@dataclass(frozen=True)
class Flip:
    """One question whose answer changed. ``pictures`` are data URIs, none where the task cannot be drawn again."""

    row: dict[str, Any]
    won: bool
    sample: dict[str, Any]
    dense_answer: str
    question: str
    expected: str
    pictures: tuple[str, ...]


def flips(run: Run, limit: int) -> tuple[list[Flip], list[str]]:
    """At most ``limit`` flips, specs in turn, and what could not be drawn and why."""
    dense = {setting(row): row for row in run.rows if row["spec"] == "dense"}
    rows = [row for row in run.rows if row["spec"] != "dense" and setting(row) in dense and row.get("fingerprint")]
    rows = [row for row in rows if not is_seed(row, run.rows)]
    whole = {where: {s["id"]: s for s in run.journal(row["fingerprint"])} for where, row in dense.items()}
    tasks, notes = _Questions(run), []
    turns = [_of_row(row, run.journal(row["fingerprint"]), whole[setting(row)]) for row in rows]
    found: list[Flip] = []
    while turns and len(found) < limit:
        for turn in list(turns):
            picked = next(turn, None)
            if picked is None:
                turns.remove(turn)
            elif len(found) < limit:
                found.append(tasks.flip(*picked))
    notes += tasks.notes
    return sorted(found, key=lambda flip: (setting(flip.row), rows.index(flip.row), flip.won)), notes


def _of_row(row: dict[str, Any], samples: list[dict], dense: dict[str, dict]) -> Iterator[tuple[dict, dict, dict]]:
    """Drawable flips of one row, lost and won in turn, every family once before any comes again."""
    sides: dict[bool, list[list[tuple[dict, dict, dict]]]] = {False: [], True: []}
    seen: dict[tuple[bool, str], int] = {}
    for sample in samples:
        before = dense.get(sample["id"])
        if before is None or not sample.get("keep") or (before["score"] >= 0.5) == (sample["score"] >= 0.5):
            continue
        won = sample["score"] >= 0.5
        turn = seen[won, sample["family"]] = seen.get((won, sample["family"]), -1) + 1
        rounds = sides[won]
        rounds += [[] for _ in range(turn + 1 - len(rounds))]
        rounds[turn].append((row, sample, before))
    lost, won = ([entry for one in sides[side] for entry in one] for side in (False, True))
    for number in range(max(len(lost), len(won))):
        yield from lost[number : number + 1]
        yield from won[number : number + 1]


class _Questions:
    """Samples of the tasks of a run by id, drawn again from the recipe of their cell."""

    def __init__(self, run: Run) -> None:
        self.run, self.notes = run, []
        self._known: dict[tuple[str, str], dict[str, Any]] = {}

    def flip(self, row: dict[str, Any], sample: dict[str, Any], before: dict[str, Any]) -> Flip:
        question = self._samples(row).get(sample["id"])
        asked = "" if question is None else " / ".join([*(f"{q} {a}." for q, a in question.history), question.question])
        expected = "" if question is None else " or ".join(question.answers)
        drawn = () if question is None else tuple(_drawn(question.load_images(), sample["keep"], sample["id"]))
        return Flip(row, sample["score"] >= 0.5, sample, before["answer"], asked, expected, drawn)

    def _samples(self, row: dict[str, Any]) -> dict[str, Any]:
        where = setting(row)
        if where not in self._known:
            self._known[where] = {}
            recipe = self.run.recipe(row["fingerprint"])
            try:
                task = get_task(recipe["task"])
            except EvaluationError as error:
                self.notes.append(f"Pictures of {row['task']} cannot be drawn: {error}")
                return {}
            if task.fingerprint != recipe["task_fingerprint"]:
                self.notes.append(f"Pictures of {row['task']} are left out: its questions are not those of the run any more")
                return {}
            self._known[where] = {sample.id: sample for sample in task.samples(recipe["split"], recipe["limit"])}
        return self._known[where]


def _drawn(images: list[Any], kept: list[dict[str, Any]], name: str) -> Iterator[str]:
    from ...core.keepmap import KeepMap

    if len(images) != len(kept):
        raise EvaluationError(
            f"{name} shows {len(images)} images, its journal has kept patches of {len(kept)}; run the row again"
        )
    for image, keep in zip(images, kept, strict=True):
        factor = -(-SMALLEST // min(image.size))
        large = image.resize((image.width * factor, image.height * factor), resample=0)
        drawn = KeepMap(keep["keep_idx"], grids=tuple(map(tuple, keep["grids"])), view=keep["view"]).draw(large)
        file = io.BytesIO()
        drawn.save(file, "JPEG", quality=88, subsampling=0)
        yield "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
