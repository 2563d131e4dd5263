# SPDX-License-Identifier: Apache-2.0
"""Training data: pictures, what every patch shows, and packs of questions with what each word of them refers
to.

Item ``i`` of a split is a function of (seed, i) alone. Everything is kept as flat arrays, so that shards are
plain ``.npz``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from vlmprune.evaluation.tasks.shapes.model import BOS, EOS, GRID, IMAGE, PATCH
from vlmprune.evaluation.tasks.shapes.questions import TEMPLATES, Question
from vlmprune.evaluation.tasks.shapes.render import character_centres, coverage, render
from vlmprune.evaluation.tasks.shapes.scene import Scene, sample_scene
from vlmprune.evaluation.tasks.shapes.vocabulary import (
    COLORS,
    DIGITS,
    LETTERS,
    ORDER,
    SHAPES,
    SIGN,
    SIZES,
    WORDS,
)

WORD = {word: i for i, word in enumerate(WORDS)}
LABELS = ("shape", "color", "size", "character", "index", "centre", "owner")
CLASSES = {  # label 0 is "none"; the word of each other label
    "shape": (*SHAPES, SIGN),
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "character": tuple(DIGITS + LETTERS.lower()),
}
PATCHES = GRID * GRID
MAX_THINGS = 16
KIND_SHARE = {"common": 0.26, "count": 0.18, "text": 0.32, "needle": 0.24}
TWO_IMAGES = 0.14
# kinds of attention targets: a noun to its things, an answer to the things asked about, an answer to the next
# character or to
# everything to be counted; a noun to its adjective, an answer to nouns and adjectives, a patch to the word
# before its picture,
# an answer to the first and to the last noun
NOUN, ANSWER, LOOK, ADJECTIVE, WORDS_OF, PICTURE, FIRST, LAST = range(8)
SINGLE = [t for t in TEMPLATES if t.images == 1]
DOUBLE = [t for t in TEMPLATES if t.images == 2]
WEIGHTS = {  # by kind of scene: how often each family is tried
    "common": {
        "exist": 1,
        "attribute": 2,
        "count": 1,
        "spatial": 2,
        "compare": 2,
        "position": 1,
        "two_turn": 3,
    },
    "count": {
        "exist": 1,
        "attribute": 1,
        "count": 5,
        "spatial": 1,
        "compare": 1,
        "position": 1,
        "two_turn": 1,
    },
    "text": {"text": 6, "exist": 1, "position": 1},
    "needle": {"needle": 6, "exist": 1, "spatial": 1, "compare": 1, "position": 1, "count": 1},
}


def patch_labels(scene: Scene) -> np.ndarray:
    """(PATCHES, len(LABELS)) uint8."""
    out = np.zeros((GRID, GRID, len(LABELS)), np.uint8)
    most = np.full((GRID, GRID), 0.22, np.float32)  # a patch that is covered less shows nothing
    for number, thing in enumerate(scene.things):
        share = coverage((thing,)).reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))
        row, col = int(thing.y // PATCH), int(thing.x // PATCH)
        if not thing.text:
            share[row, col] = max(share[row, col], 0.5)  # the hole of a ring belongs to the ring
        here = share > most
        most = np.where(here, share, most)
        size = list(SIZES).index(thing.size) + 1 if thing.size else 0
        out[here] = (
            CLASSES["shape"].index(thing.shape) + 1,
            list(COLORS).index(thing.color) + 1,
            size,
            0,
            0,
            0,
            number + 1,
        )
        if out[row, col, 6] == number + 1:
            out[row, col, 5] = 1
        for i, (x, y) in enumerate(character_centres(thing) if thing.text else ()):
            cell = out[int(y // PATCH), int(x // PATCH)]
            cell[3], cell[4], cell[6] = (
                CLASSES["character"].index(thing.text[i].lower()) + 1,
                i + 1,
                number + 1,
            )
            cell[0], cell[1] = len(SHAPES) + 1, list(COLORS).index(thing.color) + 1
    return out.reshape(PATCHES, -1)


def encode(question: Question) -> tuple[list[int], int, list[tuple[int, int, int, int]]]:
    """``(ids, first, targets)`` of one question after the images: ids with the answer and end of text; the
    position whose next token is the first of the answer; attention targets (position, kind, bits of things,
    character index)."""
    ids: list[int] = []
    targets: list[tuple[int, int, int, int]] = []
    for turn in (*question.history, question):
        if ids:
            ids.append(WORD["user:"])
        targets += [(len(ids) + mention.word, NOUN, bits(mention.things), 0) for mention in turn.mentions]
        ids += [WORD[word] for word in turn.text.split()] + [WORD["assistant:"]]
        first = len(ids) - 1
        ids += [WORD[word] for word in turn.answer.split()] + [EOS]
    asked = bits(question.asked)
    steps = len(question.answer.split())
    for step in range(steps):
        targets.append((first + step, ANSWER, asked, 0))
        if question.family == "text":
            targets.append((first + step, LOOK, asked, step + 1))
        if question.family == "count":
            targets.append((first + step, LOOK, asked, 0))
    return ids, first, targets


def bits(things: tuple[tuple[int, int], ...]) -> int:
    return sum(1 << (image * MAX_THINGS + thing) for image, thing in things)


def item(seed: int, index: int, per_item: int) -> tuple[list[Scene], list[Question]]:
    """Scenes of one item and up to ``per_item`` different questions about them."""
    rng = np.random.default_rng([seed, 7, index])
    two = rng.random() < TWO_IMAGES
    kind = "common" if two else str(rng.choice(list(KIND_SHARE), p=list(KIND_SHARE.values())))
    scenes = [sample_scene(rng, kind) for _ in range(1 + two)]
    if two:
        pool, weight = DOUBLE, np.ones(len(DOUBLE))
    else:
        pool = [t for t in SINGLE if t.family in WEIGHTS[kind]]
        weight = np.array([WEIGHTS[kind][t.family] / sum(o.family == t.family for o in pool) for t in pool])
    questions: dict[tuple, Question] = {}
    for choice in rng.choice(len(pool), size=4 * per_item, p=weight / weight.sum()):
        template = pool[choice]
        answer = str(rng.choice(template.answers)) if template.answers else ""
        question = template.make(scenes, rng, answer)
        if question:
            questions[question.text, question.history] = question
        if len(questions) == per_item:
            break
    return scenes, list(questions.values())


def build(seed: int, start: int, count: int, per_item: int, pictures: bool) -> dict[str, np.ndarray]:
    """Flat arrays of items ``start`` to ``start + count``."""
    labels, images, scene_of = [], [], []
    ids, lengths, firsts, families, targets, target_counts, question_counts = [], [], [], [], [], [], []
    names = [t.family for t in TEMPLATES]
    order = list(dict.fromkeys(names))
    for index in range(start, start + count):
        scenes, questions = item(seed, index, per_item)
        scene_of.append([len(labels), len(labels) + 1 if len(scenes) == 2 else -1])
        labels += [patch_labels(scene) for scene in scenes]
        images += [np.asarray(render(scene)) for scene in scenes] if pictures else []
        question_counts.append(len(questions))
        for question in questions:
            tokens, first, aims = encode(question)
            ids += tokens
            targets += aims
            lengths.append(len(tokens))
            firsts.append(first)
            target_counts.append(len(aims))
            families.append(order.index(question.family))
    flat = {
        "labels": np.stack(labels),
        "scene_of": np.array(scene_of),
        "ids": np.array(ids, np.int16),
        "lengths": np.array(lengths),
        "firsts": np.array(firsts),
        "families": np.array(families),
        "targets": np.array(targets, np.int64),
        "target_counts": np.array(target_counts),
        "question_counts": np.array(question_counts),
    }
    return flat | ({"images": np.stack(images)} if pictures else {})


def write(folder: Path, seed: int, items: int, shard: int, shards: int, size: int, per_item: int) -> None:
    """Write every ``shards``-th block of ``size`` items that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for block in range(shard, items // size, shards):
        path = folder / f"{block:04d}.npz"
        if path.exists():
            continue
        begin = time.perf_counter()
        arrays = build(seed, block * size, size, per_item, pictures=True)
        images = arrays.pop("images")
        np.save(folder / f"{block:04d}.images.npy", images)
        half = folder / f"{block:04d}.part.npz"
        np.savez(half, **arrays)
        half.rename(path)
        print(
            f"{path.name}: {size} items, {len(images)} pictures, {len(arrays['lengths'])} questions, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )


PREFIX = {1: [BOS, WORD["user:"]], 2: [BOS, WORD["user:"], WORD[ORDER[0]], IMAGE, WORD[ORDER[1]], IMAGE]}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in {
        "seed": 101,
        "items": 24000,
        "shard": 0,
        "shards": 1,
        "size": 1000,
        "per-item": 13,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    write(**vars(parser.parse_args()))
