# SPDX-License-Identifier: Apache-2.0
"""Flips: questions that pruning lost or won, as many of each method, with the picture before and after."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EvaluationError, SpecError
from ...plain import read
from ...spec import parse
from ..leaderboard.rundir import Run
from ..stats.estimates import RIGHT
from ..stats.summary import DENSE, Row
from ..tasks.registry import get_task
from ..tasks.sample import Sample, shows_clips
from .judge import merged, series

if TYPE_CHECKING:
    from PIL import Image

SMALLEST = 288  # pixels: smaller pictures are enlarged so that the outlines of patches can be seen
LARGEST = 4096  # pixels of a side that was enlarged: a thin picture would grow beyond what JPEG can hold
ACROSS = 4  # frames of a clip side by side
MOST = 1_000_000  # tokens of a picture; more is a broken journal


@dataclass(frozen=True)
class Kept:
    """Patches that were kept of one picture, and those that were merged into others, where that is known."""

    keep_idx: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    view: str
    merged: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Answer:
    """What the gallery reads of a line of a journal; ``keep`` is there for some questions only."""

    id: str
    family: str
    answer: str
    score: float
    realised_tokens: int
    dense_tokens: int
    on_object: float | None = None
    keep: tuple[Kept, ...] = ()


@dataclass(frozen=True)
class Shown:
    """A picture as data URIs: unpruned, and with what was kept; that is empty where it was not recorded."""

    before: str
    after: str


@dataclass(frozen=True)
class Flip:
    """One question whose answer changed; ``pictures`` is empty where the task cannot be drawn again."""

    row: Row
    answer: Answer
    dense_answer: str
    question: str
    expected: str
    merges: bool
    pictures: tuple[Shown, ...]

    @property
    def won(self) -> bool:
        return self.answer.score >= RIGHT


@dataclass
class Gallery:
    """The flips that are shown, of how many, and what must be said about them."""

    flips: list[Flip] = field(default_factory=list)
    total: int = 0
    notes: list[str] = field(default_factory=list)


def gallery(run: Run, rows: Sequence[Row], limit: int) -> Gallery:
    """At most ``limit`` flips; methods take turns, and each alternates between lost and won answers."""
    dense = {row.setting: row for row in rows if row.spec == DENSE}
    known = {where: _by_id(run, row) for where, row in dense.items()}  # setting -> id -> line of the journal
    # (model, task, spec without budget) -> what was found at each budget
    methods: dict[tuple[str, str, str], list[_Found]] = {}
    for row in _with_cells(rows):
        if row.spec != DENSE and row.setting in known:
            found = _flips_of(run, row, known[row.setting])
            methods.setdefault((*row.setting, series(row.spec)), []).append(found)
    made = Gallery(total=sum(one.count for some in methods.values() for one in some))
    never = [name for (*_, name), some in methods.items() if not any(one.count for one in some)]
    if never:
        made.notes.append(f"No answer changed under {', '.join(dict.fromkeys(never))}.")
    questions = _Questions(run, made.notes)
    # one of every method, then the next of every method, as long as there are some
    # zip_longest fills the shorter ones up with None
    picked = list(filter(None, chain.from_iterable(zip_longest(*map(_turns, methods.values())))))[:limit]
    # by identity: rows hold mappings and have no hash
    order = {id(row): number for number, row in enumerate(rows)}
    # in the order of the table, lost answers before won ones
    picked.sort(key=lambda pick: (order[id(pick.row)], _score(pick.line) >= RIGHT))
    made.flips = [questions.flip(pick) for pick in picked]
    return made


def _with_cells(rows: Sequence[Row]) -> list[Row]:
    """A mean over seeds has no answers of its own: the first of its seeds stands for it."""
    by_spec = {(*row.setting, row.spec): row for row in rows if row.band is None}
    found = []
    for row in merged(rows):
        one = by_spec.get((*row.setting, row.band.seeds[0])) if row.band else row
        if one is not None and one.fingerprint:
            found.append(one)
    return found


@dataclass(frozen=True)
class _Pick:
    row: Row
    line: Mapping[str, Any]
    before: Mapping[str, Any]


@dataclass(frozen=True)
class _Found:
    """Flips of one row in the order in which they are shown."""

    lost: list[_Pick]
    won: list[_Pick]

    @property
    def count(self) -> int:
        return len(self.lost) + len(self.won)


def _by_id(run: Run, row: Row) -> dict[str, Mapping[str, Any]]:
    return {line["id"]: line for line in run.journal(row.fingerprint or "")}


def _flips_of(run: Run, row: Row, dense: Mapping[str, Mapping[str, Any]]) -> _Found:
    sides: dict[bool, list[_Pick]] = {False: [], True: []}
    for line in run.journal(row.fingerprint or ""):
        before = dense.get(line["id"])
        # one of the two is right
        if before is not None and (_score(before) >= RIGHT) != (_score(line) >= RIGHT):
            sides[_score(line) >= RIGHT].append(_Pick(row, line, before))
    return _Found(_spread(sides[False]), _spread(sides[True]))


def _score(line: Mapping[str, Any]) -> float:
    value = line.get("score")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EvaluationError(f"sample {line.get('id')!r} has the score {value!r}; run its row again")
    return value


def _spread(picks: Sequence[_Pick]) -> list[_Pick]:
    """Those with recorded patches first, then every family once before any comes again."""
    seen: dict[tuple[bool, object], int] = {}
    ranked = []
    for number, pick in enumerate(picks):
        # (no patches recorded, family) -> how many of these came before
        key = not pick.line.get("keep"), pick.line.get("family")
        seen[key] = seen.get(key, -1) + 1
        ranked.append((key[0], seen[key], number, pick))
    # without the picks themselves, which have no order
    return [pick for *_, pick in sorted(ranked, key=lambda entry: entry[:3])]


def _turns(rows: Sequence[_Found]) -> Iterator[_Pick]:
    """Of one method: lost and won in turn, its budgets in turn on either side."""
    sides = []
    for side in ([one.lost for one in rows], [one.won for one in rows]):
        sides.append(filter(None, chain.from_iterable(zip_longest(*side))))
    yield from filter(None, chain.from_iterable(zip_longest(*sides)))


class _Questions:
    """Samples of the tasks of a run by id, drawn again from the recipe of their cell."""

    def __init__(self, run: Run, notes: list[str]) -> None:
        self.run, self.notes = run, notes
        self._known: dict[tuple[object, ...], dict[str, Sample]] = {}
        self._clips: set[str] = set()  # tasks whose images are frames of clips

    def flip(self, pick: _Pick) -> Flip:
        row = pick.row
        answer = read(Answer, pick.line, f"sample {pick.line['id']!r} of {row.spec!r}")
        sample = self._samples(row).get(answer.id)
        merges = _merges(row.spec)
        asked, expected = "", ""
        pictures: tuple[Shown, ...] = ()
        if sample is not None:
            asked = " / ".join([*(f"{q} {a}." for q, a in sample.history), sample.question])
            expected = " or ".join(sample.answers)
            images = sample.load_images()
            draw = _strips if row.task in self._clips else _pictures
            pictures = tuple(draw(images, answer, merges))
        return Flip(row, answer, str(pick.before.get("answer", "")), asked, expected, merges, pictures)

    def _samples(self, row: Row) -> dict[str, Sample]:
        recipe = self.run.recipe(row.fingerprint or "")
        # all that decides which questions are drawn
        key = tuple(recipe.get(name) for name in ("task", "task_fingerprint", "split", "limit"))
        if key not in self._known:  # models share the questions, which take a while to draw
            self._known[key] = self._load(row, recipe)
        return self._known[key]

    def _load(self, row: Row, recipe: Mapping[str, Any]) -> dict[str, Sample]:
        try:
            task = get_task(recipe["task"])
        except EvaluationError as error:
            self.notes.append(f"Pictures of {row.task} cannot be drawn: {error}")
            return {}
        # drawn by another version, the pictures would not be those of the answers
        if task.fingerprint != recipe["task_fingerprint"]:
            changed = "its questions are not those of the run any more"
            self.notes.append(f"Pictures of {row.task} are left out: {changed}")
            return {}
        if shows_clips(task):
            self._clips.add(row.task)
        return {sample.id: sample for sample in task.samples(recipe["split"], recipe["limit"])}


def _merges(spec: str) -> bool:
    """Whether other tokens are merged into the kept ones; not known of plug-ins that are not installed."""
    try:
        return parse(spec).merges
    except SpecError:
        return False


def _check_kept(images: Sequence[Image.Image], answer: Answer) -> None:
    if answer.keep and len(images) != len(answer.keep):
        given = f"shows {len(images)} images, its journal has kept patches of {len(answer.keep)}"
        raise EvaluationError(f"{answer.id} {given}; run the row again")


def _strips(images: Sequence[Image.Image], answer: Answer, merges: bool) -> Iterator[Shown]:
    """The frames of a clip as one picture."""
    from ...viz.strip import sheet

    _check_kept(images, answer)
    names = [f"frame {number + 1}" for number in range(len(images))]
    after = ""
    if answer.keep:
        drawn = [
            draw_kept(image, kept, answer.id, merges) for image, kept in zip(images, answer.keep, strict=True)
        ]
        after = _uri(sheet(drawn, names, [str(len(kept.keep_idx)) for kept in answer.keep], ACROSS))
    yield Shown(_uri(sheet(list(images), names, across=ACROSS)), after)


def _pictures(images: Sequence[Image.Image], answer: Answer, merges: bool) -> Iterator[Shown]:
    _check_kept(images, answer)
    for number, image in enumerate(images):
        # a whole number, so that pixels stay square and sharp
        factor = min(-(-SMALLEST // min(image.size)), LARGEST // max(image.size))
        large = (
            # resample=0 takes the nearest pixel
            image.resize((image.width * factor, image.height * factor), resample=0) if factor > 1 else image
        )
        after = _uri(draw_kept(large, answer.keep[number], answer.id, merges)) if answer.keep else ""
        yield Shown(_uri(large.convert("RGB")), after)


def draw_kept(image: Image.Image, kept: Kept, name: str, merges: bool) -> Image.Image:
    """Kept patches outlined on the picture; the others grey, or pale where they are merged: all of them, if
    the journal does not say which.
    """
    from ...viz.overlay import draw_keep

    count = sum(rows * cols for rows, cols in kept.grids)
    # before an array of that size is made
    named = [*kept.keep_idx, *(kept.merged or ())]
    if not 0 < count <= MOST or any(not 0 <= index < count for index in named):
        raise EvaluationError(
            f"{name}: its journal has kept patches outside grids {kept.grids}; run the row again"
        )
    mask, merged = np.zeros((2, count), dtype=bool)
    mask[list(kept.keep_idx)] = True
    merged[list(kept.merged or ())] = True
    return draw_keep(image, kept.grids, mask, kept.view, merged=merges if kept.merged is None else merged)


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
