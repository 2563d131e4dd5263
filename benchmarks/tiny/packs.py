# SPDX-License-Identifier: Apache-2.0
"""Batches: one image prefix and many questions behind it under a block mask, with targets for attention."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from data import (
    ADJECTIVE,
    ANSWER,
    FIRST,
    LABELS,
    LAST,
    LOOK,
    MAX_THINGS,
    NOUN,
    PATCHES,
    PICTURE,
    WORD,
    WORDS_OF,
)
from runs import rank
from torch import Tensor

from vlmprune.evaluation.tasks.shapes.model import BOS, EOS, GRID, IMAGE, PAD
from vlmprune.evaluation.tasks.shapes.vocabulary import COLORS, ORDER

CENTRE, OWNER, INDEX = LABELS.index("centre"), LABELS.index("owner"), LABELS.index("index")
NO_LOSS = -100
COLOR_IDS, ORDER_IDS = ({WORD[word] for word in words} for words in (COLORS, ORDER))
RELATION_IDS = {WORD[word] for word in ("left", "right", "above", "below", "larger", "smaller")}
TAUGHT_PATCHES = 8  # per picture, where there are two


class Store:
    """All shards of a folder as one set of arrays; pictures stay on disk."""

    def __init__(self, folder: Path, pictures: bool = True) -> None:
        shards = [dict(np.load(path)) for path in sorted(Path(folder).glob("[0-9][0-9][0-9][0-9].npz"))]
        if not shards:
            raise FileNotFoundError(f"no shards in {folder}; run data.py first")
        scenes = np.cumsum([0] + [len(s["labels"]) for s in shards])
        for first, shard in zip(scenes, shards, strict=False):
            shard["scene_of"] = np.where(shard["scene_of"] >= 0, shard["scene_of"] + first, -1)
        joined = {key: np.concatenate([s[key] for s in shards]) for key in shards[0]}
        self.labels, self.scene_of = joined["labels"], joined["scene_of"]
        self.ids, self.firsts, self.families, self.targets = (
            joined[k] for k in ("ids", "firsts", "families", "targets")
        )
        self.id_start = np.concatenate([[0], np.cumsum(joined["lengths"])])
        self.target_start = np.concatenate([[0], np.cumsum(joined["target_counts"])])
        self.question_start = np.concatenate([[0], np.cumsum(joined["question_counts"])])
        self.text_length = np.diff(self.id_start[self.question_start])  # of all questions of an item
        self.two = self.scene_of[:, 1] >= 0
        self._first = scenes
        self._pictures = (
            [np.load(p, mmap_mode="r") for p in sorted(Path(folder).glob("*.images.npy"))] if pictures else []
        )

    def __len__(self) -> int:
        return len(self.scene_of)

    def pictures(self, scenes: np.ndarray) -> np.ndarray:
        """(n, H, W, 3) uint8."""
        shard = np.searchsorted(self._first, scenes, side="right") - 1
        return np.stack([self._pictures[k][i - self._first[k]] for k, i in zip(shard, scenes, strict=True)])


@dataclass
class Batch:
    """B items of the same number of images, P columns of prefix, T of text, E attention targets per item."""

    scenes: Tensor  # (B, images)
    chosen: Tensor  # (B, images, N) patches shown, ascending
    prefix: Tensor  # (P,) ids, IMAGE where a patch stands
    ids: Tensor  # (B, T)
    positions: Tensor  # (B, P + T)
    mask: Tensor  # (B, 1, P + T, P + T) bool
    answers: Tensor  # (B, T) next token where it counts, else NO_LOSS
    question: Tensor  # (B, T) number of the question in the store, or -1
    aim: Tensor  # (B, E, 4): column, kind, how many things are meant, whether it is a target at all
    goal: Tensor  # (B, E, P + T) columns that are looked for
    # (B, E, 4) row and column of the one thing a noun means, or of the first and the last thing of an answer
    place: Tensor
    placed: Tensor  # (B, E) bool: whether there are such things
    counted: Tensor  # (B, E) bool: attention is to be spread over things, one more share for the first token

    def to(self, device: torch.device) -> Batch:
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def collate(store: Store, items: np.ndarray, tokens: int, rng: np.random.Generator) -> Batch:
    """Pack items; ``tokens`` patches per image are shown: what shows a thing first, then background at
    random.
    """
    images = 1 + int(store.two[items[0]])
    scenes = store.scene_of[items][:, :images]
    labels = store.labels[scenes]  # (B, images, PATCHES, labels)
    order = np.argsort((labels[..., OWNER] == 0) + rng.random(labels.shape[:3]) * 0.5, axis=-1)
    chosen = np.sort(order[..., :tokens], axis=-1)
    kept = np.take_along_axis(labels, chosen[..., None], axis=2)
    owner = kept[..., OWNER].astype(np.int64) + np.arange(images)[:, None] * MAX_THINGS * (
        kept[..., OWNER] > 0
    )
    prefix: list[int] = [BOS, WORD["user:"]]
    for image in range(images):
        prefix += ([WORD[ORDER[image]]] if images > 1 else []) + [IMAGE] * tokens
    where = np.flatnonzero(np.array(prefix) == IMAGE)
    size, width = len(items), len(prefix)
    length = int(-(-store.text_length[items].max() // 16) * 16)
    ids, answers = np.full((size, length), PAD), np.full((size, length), NO_LOSS)
    block, offset, question = (np.full((size, length), -1) for _ in range(3))
    aims: list[list[tuple[int, int, int, int]]] = []
    bits: list[list[tuple[int, int]]] = []
    nouns: list[list[int]] = [[] for _ in items]
    answered: list[list[tuple[int, int, int]]] = [
        [] for _ in items
    ]  # (target of an answer, of its first noun, of its last)
    goals: list[tuple[int, int, list[int]]] = []  # (row, target, columns) where words are looked for
    for row, item in enumerate(items):
        at = 0
        aims.append([])
        bits.append([])
        for q in range(store.question_start[item], store.question_start[item + 1]):
            words = store.ids[store.id_start[q] : store.id_start[q + 1]]
            n, first = len(words), int(store.firsts[q])
            ids[row, at : at + n], block[row, at : at + n], offset[row, at : at + n] = words, q, np.arange(n)
            answers[row, at + first : at + n - 1] = words[first + 1 :]
            question[row, at : at + n] = q
            nouns[row] = []
            targets = store.targets[store.target_start[q] : store.target_start[q + 1]].tolist()
            for position, kind, meant, index in targets:
                nouns[row] += [len(aims[-1])] if kind == NOUN else []
                answered[row] += [(len(aims[-1]), nouns[row][0], nouns[row][-1])] if kind == ANSWER else []
                aims[-1].append((width + at + position, kind, meant.bit_count(), 1))
                bits[-1].append((meant, index))
            for position, kind, columns in word_targets(words.tolist(), targets):
                goals.append((row, len(aims[-1]), [width + at + column for column in columns]))
                aims[-1].append((width + at + position, kind, 0, 1))
                bits[-1].append((0, 0))
            at += n
        for image in range(images if images > 1 else 0):
            first = 3 + image * (tokens + 1)
            for column in rng.choice(tokens, TAUGHT_PATCHES, replace=False) + first:
                goals.append((row, len(aims[-1]), [first - 1]))
                aims[-1].append((int(column), PICTURE, 0, 1))
                bits[-1].append((0, 0))
    most = max(map(len, aims))
    aim = np.array([rows + [(0, 0, 0, 0)] * (most - len(rows)) for rows in aims])
    meant = np.array([rows + [(0, 0)] * (most - len(rows)) for rows in bits])
    goal = np.zeros((size, most, width + length), bool)
    flat = owner.reshape(size, 1, -1)
    hit = (flat > 0) & ((meant[:, :, :1] >> np.maximum(flat - 1, 0)) & 1 > 0)
    index, look = meant[:, :, 1:], (aim[:, :, 1] == LOOK)[:, :, None]
    hit &= (index == 0) | (kept[..., INDEX].reshape(size, 1, -1) == index)
    hit &= (
        ~look | (index > 0) | (kept[..., CENTRE].reshape(size, 1, -1) > 0)
    )  # things to count are looked at in their centres
    goal[:, :, where] = hit
    place, placed = places(hit, chosen, aim, answered)
    for row, target, columns in goals:
        goal[row, target, columns] = True
    count = (look[..., 0]) & (index[..., 0] == 0)
    goal[:, :, 0] |= count | ~goal.any(
        -1
    )  # the first token is where nothing is: a sink, and the one more of a count
    return Batch(
        **{
            name: torch.from_numpy(np.ascontiguousarray(array))
            for name, array in {
                "scenes": scenes,
                "chosen": chosen,
                "prefix": np.array(prefix),
                "ids": ids,
                "answers": answers,
                "question": question,
                "positions": np.concatenate(
                    [np.tile(np.arange(width), (size, 1)), width + np.maximum(offset, 0)], 1
                ),
                "mask": block_mask(width, block),
                "aim": aim,
                "goal": goal,
                "counted": count,
                "place": place,
                "placed": placed,
            }.items()
        }
    )


def places(
    hit: np.ndarray,
    chosen: np.ndarray,
    aim: np.ndarray,
    answered: list[list[tuple[int, int, int]]],
) -> tuple[np.ndarray, np.ndarray]:
    """(B, E, 4) rows and columns in [-1, 1], and (B, E) where they are known; ``hit`` (B, E, images * N) is
    what is meant.
    """
    flat = chosen.reshape(len(chosen), -1)
    where = np.stack([flat // GRID, flat % GRID], -1) / ((GRID - 1) / 2) - 1  # (B, images * N, 2)
    shown = hit.sum(-1)
    mean = (
        np.einsum("ben,bnc->bec", hit.astype(np.float32), where.astype(np.float32))
        / np.maximum(shown, 1)[..., None]
    )
    place = np.concatenate([mean, mean], -1)
    placed = (aim[..., 1] == NOUN) & (aim[..., 2] == 1) & (aim[..., 3] > 0) & (shown > 0)
    for row, found in enumerate(answered):
        for target, first, last in found:
            place[row, target] = np.concatenate([mean[row, first], mean[row, last]])
            placed[row, target] = placed[row, first] and placed[row, last]
    return place, placed


def word_targets(words: list[int], targets: list[list[int]]) -> list[tuple[int, int, list[int]]]:
    """Which words of its question a noun or an answer looks at: (position, kind, positions looked for)."""
    found, content, nouns = [], [], [position for position, kind, _, _ in targets if kind == NOUN]
    for position, kind, _, _ in targets:
        if kind == NOUN:
            content.append(position)
            if words[position - 1] in COLOR_IDS:
                content.append(position - 1)
                found.append((position, ADJECTIVE, [position - 1]))
            if words[2] in ORDER_IDS:  # in the second image , ...
                content.append(2)
                found.append((position, WORDS_OF, [2]))
    content += [position for position, word in enumerate(words) if word in RELATION_IDS]
    for position in [position for position, kind, _, _ in targets if kind == ANSWER]:
        found += [(position, WORDS_OF, content), (position, FIRST, nouns[:1]), (position, LAST, nouns[-1:])]
    return found


def block_mask(width: int, block: np.ndarray) -> np.ndarray:
    """(B, 1, P + T, P + T): everybody sees the prefix up to here; text sees its own question up to here;
    padding sees itself.
    """
    size, length = block.shape
    whole = np.tril(np.ones((width + length, width + length), bool))[None].repeat(size, 0)
    whole[:, width:, width:] &= block[:, :, None] == block[:, None, :]
    return whole[:, None]


def batches(
    store: Store, size: int, rng: np.random.Generator, cost_two: float = 0.5, favour: int | None = None
):
    """Endless batches of items of equal kind and similar length, in random order.

    With ``favour``, the number of a family, two of three items have at least three questions of it.
    """
    rich = np.zeros(len(store), bool)
    if favour is not None:
        item = np.repeat(np.arange(len(store)), np.diff(store.question_start))
        rich = np.bincount(item[store.families == favour], minlength=len(store)) >= 3
    while True:
        order = rng.permutation(len(store))
        if rich.any():
            order = rng.permutation(
                np.concatenate([order[rich[order]], order[~rich[order]][: rich.sum() // 2]])
            )
        todo = []
        for two in (False, True):
            step = max(1, round(size * cost_two)) if two else size
            part = order[store.two[order] == two]
            for start in range(0, len(part), step * 8):  # sort by length within pools of eight batches
                pool = part[start : start + step * 8]
                pool = pool[np.argsort(store.text_length[pool], kind="stable")]
                todo += [pool[i : i + step] for i in range(0, len(pool) - step + 1, step)]
        if not todo:
            raise ValueError(f"{len(store)} items are too few for batches of {size}; make more with data.py")
        yield from (todo[i] for i in rng.permutation(len(todo)))


def all_batches(store: Store, size: int, limit: int | None = None):
    """The first ``limit`` items once each, shared out over ranks."""
    for two in (False, True):
        part = np.flatnonzero(store.two[:limit] == two)[rank()[0] :: rank()[1]]
        part = part[np.argsort(store.text_length[part], kind="stable")]
        yield from (part[i : i + size] for i in range(0, len(part), size))


__all__ = ["EOS", "NO_LOSS", "PATCHES", "Batch", "Store", "all_batches", "batches", "collate"]
