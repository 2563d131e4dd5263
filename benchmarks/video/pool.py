# SPDX-License-Identifier: Apache-2.0
"""Clips to learn from: what the image model sees in every frame, and questions with the patches that answer
them. Clip ``i`` of a seed is a function of (seed, i) alone; arrays of all clips are in one folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.evaluation.tasks.clips.dataset import draw, frames_of
from vlmprune.evaluation.tasks.clips.story import COUNTS, FAMILIES, FRAMES, Story
from vlmprune.evaluation.tasks.shapes.model import BOS, EOS, GRID, PAD, PATCH
from vlmprune.evaluation.tasks.shapes.render import coverage
from vlmprune.evaluation.tasks.shapes.scene import CANVAS, Thing
from vlmprune.evaluation.tasks.shapes.vocabulary import WORDS

NEW_WORDS = ("last", "frame", "comes", "or")  # in questions about clips, unknown to the image model
WORD = {word: i for i, word in enumerate((*WORDS, *NEW_WORDS))}
NAMES = tuple(kind.name for kind in FAMILIES)
PATCHES = FRAMES * GRID * GRID
QUESTIONS, LENGTH, PARTS = 4, 16, len(COUNTS)  # of a clip, tokens of one, things that one is about
SHOWN = 0.3  # of a patch that a thing covers, so that the patch shows it
FIRST_TURN = (BOS, WORD["user:"])

Seen = list[tuple[int, Thing]]  # a thing in frames, by number


@dataclass(frozen=True)
class Asked:
    """A question with its answer, and one list of places for each thing that has to be seen for it."""

    question: str
    answer: str
    parts: tuple[Seen, ...]


@dataclass
class Pool:
    """``n`` clips with QUESTIONS questions each, of which the first is that of the benchmark."""

    tokens: Tensor  # (n, PATCHES, D) float16, what the projector made of every frame
    things: Tensor  # (n, PATCHES) bool: a patch shows a thing
    ids: Tensor  # (n, QUESTIONS, LENGTH) question, answer and end of text
    first: Tensor  # (n, QUESTIONS) column whose next token is the first of the answer; -1: no question
    parts: Tensor  # (n, QUESTIONS, PARTS, PATCHES) bool: where each thing is that has to be seen
    family: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.family)

    def pick(self, rows: np.ndarray) -> Pool:
        return Pool(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def make(seed: int, count: int, shares: dict[str, int], folder: Path, model: Any, processor: Any) -> Pool:
    """The pool of this seed, read from ``folder`` where it was made before."""
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(_rows(seed, count, shares, model, processor))
        for field in fields(Pool):
            np.save(folder / f"{field.name}.npy", np.stack([row[field.name] for row in rows]))
        (folder / "done").touch()
    return Pool(**{one.name: torch.from_numpy(np.load(folder / f"{one.name}.npy")) for one in fields(Pool)})


def _rows(
    seed: int, count: int, shares: dict[str, int], model: Any, processor: Any
) -> Iterator[dict[str, np.ndarray]]:
    turns = [name for name, share in shares.items() for _ in range(share)]
    for index in range(count):
        family = turns[index % len(turns)]
        story, _ = draw(seed, family, index)
        rng = np.random.default_rng([seed, 9, index])
        pixels = processor.image_processor(frames_of(story), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            seen = model.get_image_features(pixel_values=pixels)
        # transformers 5 gives an object, older ones the features
        seen = torch.cat(list(getattr(seen, "pooler_output", seen)))
        yield {
            "tokens": seen.half().numpy(),
            "things": np.any([_patches([(t, one)]) for t, one in _all(story)], axis=0),
            "family": np.array(NAMES.index(family)),
            **_questions(story, family, rng),
        }


def _all(story: Story) -> Seen:
    return [(t, one) for t, scene in enumerate(story.frames) for one in scene.things]


def _patches(seen: Seen) -> np.ndarray:
    """(PATCHES,) bool: patches that show one of these."""
    found, masks = np.zeros((FRAMES, GRID * GRID), bool), {}
    for t, one in seen:
        if one not in masks:
            share = coverage((one,)).reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))
            share[int(one.y // PATCH), int(one.x // PATCH)] = 1  # the hole of a ring belongs to the ring
            masks[one] = share.ravel() >= SHOWN
        found[t] |= masks[one]
    return found.ravel()


def _questions(story: Story, family: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    more = extra(story, family, rng)
    asked = [*main(story, family), *(more[i] for i in rng.permutation(len(more)))][:QUESTIONS]
    ids, first = np.full((QUESTIONS, LENGTH), PAD), np.full(QUESTIONS, -1)
    parts = np.zeros((QUESTIONS, PARTS, PATCHES), bool)
    for row, one in enumerate(asked):
        words = [*one.question.split(), "assistant:", *one.answer.split()]
        ids[row, : len(words) + 1] = [*(WORD[word] for word in words), EOS]
        first[row] = words.index("assistant:")
        for part, seen in enumerate(one.parts):
            parts[row, part] = _patches(seen)
    return {"ids": ids, "first": first, "parts": parts}


def main(story: Story, family: str) -> list[Asked]:
    """The question of the benchmark; for two that come one after the other, also with their names swapped."""
    seen = [(t, story.frames[t].things[i]) for t, some in enumerate(story.asked) for i in some]
    if family == "count":
        return [Asked(story.question, story.answer, tuple([one] for one in seen))]
    if family == "order":
        early = [(t, one) for t, one in seen if t < FRAMES // 2]
        words = story.question.split()
        swapped = " ".join([*words[:5], *words[9:11], *words[7:9], *words[5:7], *words[11:]])
        return [Asked(text, story.answer, (early,)) for text in (story.question, swapped)]
    if family == "move":
        seen = [(t, one) for t, one in seen if t == FRAMES - 1]
    return [Asked(story.question, story.answer, () if story.answer == "no" else (seen,))]


def extra(story: Story, family: str, rng: np.random.Generator) -> list[Asked]:
    """More about the same clip, of kinds that the benchmark asks about: nothing of what is counted."""
    counted = {story.frames[t].things[i].shape for t, some in enumerate(story.asked) for i in some}
    seen = [(t, one) for t, one in _all(story) if family != "count" or one.shape not in counted]
    found = []
    for shape in dict.fromkeys(one.shape for _, one in seen):
        its = [(t, one) for t, one in seen if one.shape == shape]
        colors, last = {one.color for _, one in its}, [its[-1]] if its[-1][0] == FRAMES - 1 else []
        if len(colors) == 1:
            found.append(Asked(f"what color is the {shape} ?", its[0][1].color, (its,)))
        for t, one in last:
            found.append(Asked(f"what color is the {shape} in the last frame ?", one.color, ([(t, one)],)))
            if min(abs(one.x - CANVAS / 2), abs(one.y - CANVAS / 2)) > 8:
                where = f"where is the {one.color} {shape} in the last frame ?"
                found.append(Asked(where, " ".join(one.place()), ([(t, one)],)))
        other = str(rng.choice([color for color in _colors(story) if color not in colors] or ["cyan"]))
        color, there = (str(rng.choice(sorted(colors))), True) if rng.random() < 0.5 else (other, False)
        if there or other not in colors:
            text = f"is there {'an' if color == 'orange' else 'a'} {color} {shape} ?"
            its = [(t, one) for t, one in its if one.color == color]
            found.append(Asked(text, "yes" if there else "no", (its,) if there else ()))
    return found


def _colors(story: Story) -> list[str]:
    return sorted({one.color for _, one in _all(story)})
