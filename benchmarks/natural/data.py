# SPDX-License-Identifier: Apache-2.0
"""A pool of pictures with packed questions, flat arrays in one file, and what batches are cut from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from model import PATCH, PATCHES, WORD, Grid
from torch import Tensor
from torch.nn import functional as F

from vlmprune.evaluation.tasks.scenes.paint import coverage, paint
from vlmprune.evaluation.tasks.scenes.questions import FAMILIES, questions_about
from vlmprune.evaluation.tasks.scenes.scene import SQUARE, Scene, Size, sample_scene
from vlmprune.evaluation.tasks.scenes.vocabulary import COLORS, PATTERNS, PLACES, SIDES
from vlmprune.evaluation.tasks.shapes.model import BOS, EOS, PAD

MOST, QUESTIONS, LENGTH = 5, 10, 10  # things of a scene, questions of a pack, tokens of a question
KEYS = torch.tensor([WORD[word] for word in (*COLORS, *PATTERNS)])
PHRASE = 6  # tokens of a caption for one thing
CAPTION = MOST * PHRASE + 4
KERNEL = torch.tensor([[0.5, 1, 0.5], [1, 2, 1], [0.5, 1, 0.5]])[None, None] / 8


@dataclass
class Pool:
    """``n`` scenes of one size and of at most MOST things. Attributes of a thing that is not there are -1.

    A patch is what becomes one visual token; P of them make a picture.
    """

    pictures: Tensor  # (n, H, W, 3) uint8
    share: Tensor  # (n, MOST, P) how much of each patch a thing covers
    thing: Tensor  # (n, MOST, 4) numbers of colour, pattern and side (-1: none), and whether it is small
    place: Tensor  # (n,)
    ids: Tensor  # (n, QUESTIONS, LENGTH)
    first: Tensor  # (n, QUESTIONS) column whose next token is the answer
    family: Tensor  # (n, QUESTIONS)
    asked: Tensor  # (n, QUESTIONS, MOST) bool

    def __len__(self) -> int:
        return len(self.place)

    def pick(self, rows: np.ndarray) -> Pool:
        return Pool(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches, which are squares."""
        height, width = self.pictures.shape[1:3]
        side = math.isqrt(height * width // self.share.shape[-1])
        return height // side, width // side

    def seen(self) -> Tensor:
        """(n, MOST, P) how much a patch knows of each thing: it has seen its eight neighbours."""
        share = self.share.float().flatten(0, 1).view(-1, 1, *self.grid)
        near = F.conv2d(share, KERNEL, padding=1).view(self.share.shape)
        known = (2 * near).clamp(max=1)
        return known / known.sum(1, keepdim=True).clamp(min=1)


def make(seed: int, count: int, path: Path, size: Size = SQUARE, patch: int = PATCH) -> Pool:
    """The pool of this seed, read from ``path`` where it was made before."""
    if not path.exists():
        rows = [_row(seed, index, size, patch) for index in range(count)]
        half = path.with_suffix(".part.npz")
        np.savez(half, **{field.name: np.stack([row[field.name] for row in rows]) for field in fields(Pool)})
        half.rename(path)
    with np.load(path) as stored:
        return Pool(**{name: torch.from_numpy(stored[name]) for name in stored.files})


def batches(pools: Sequence[Pool], size: int, rng: np.random.Generator) -> Iterator[Pool]:
    """Parts of ``size`` pictures of one pool; pools take turns, and every picture comes once before any comes
    twice.
    """
    turns = [_orders(len(pool), size, rng) for pool in pools]
    while True:
        yield from (pool.pick(next(order)) for pool, order in zip(pools, turns, strict=True))


def _orders(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        order = rng.permutation(count)
        yield from (order[at : at + size] for at in range(0, count - size + 1, size))


def _row(seed: int, index: int, size: Size, patch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, 7, index])
    scene = sample_scene(rng, size)
    rows, cols = (edge // patch for edge in size)
    share, thing = np.zeros((MOST, rows * cols), np.float16), np.full((MOST, 4), -1)
    for i, one in enumerate(scene.things):
        share[i] = coverage(one, size).reshape(rows, patch, cols, patch).mean((1, 3)).ravel()
        side = one.side(size)
        numbers = (list(COLORS).index(one.color), PATTERNS.index(one.pattern))
        thing[i] = (*numbers, SIDES.index(side) if side else -1, int(one.small))
    return {
        "pictures": paint(scene),
        "share": share,
        "thing": thing,
        "place": np.array(PLACES.index(scene.place)),
        **_pack(scene, rng),
    }


def _pack(scene: Scene, rng: np.random.Generator) -> dict[str, np.ndarray]:
    found = questions_about(scene, rng)
    order = np.concatenate([rng.permutation(len(found)) for _ in range(-(-QUESTIONS // len(found)))])
    ids, first = np.full((QUESTIONS, LENGTH), PAD), np.zeros(QUESTIONS, np.int64)
    family, asked = np.zeros(QUESTIONS, np.int64), np.zeros((QUESTIONS, MOST), bool)
    for row, pick in enumerate(order[:QUESTIONS]):
        question = found[pick]
        words = [*question.text.split(), "assistant:", question.answer]
        ids[row, : len(words) + 1] = [*(WORD[word] for word in words), EOS]
        first[row], family[row] = len(words) - 2, FAMILIES.index(question.family)
        asked[row, list(question.asked)] = True
    return {"ids": ids, "first": first, "family": family, "asked": asked}


@dataclass
class Prompt:
    """A prefix of P columns, patches or a caption, and packed questions behind it: L columns in all."""

    mask: Tensor  # (B or 1, 1, L, L) bool
    positions: Tensor  # (B, L), or (3, B, L) where tokens have places in the picture
    goal: Tensor  # (B, QUESTIONS, P) bool: columns that the answer is about
    words: Tensor  # (B, P) ids of a caption; empty where patches are shown


def block_mask(width: int) -> Tensor:
    """(1, 1, L, L): every question sees the prefix and itself."""
    length = QUESTIONS * LENGTH
    block = torch.arange(length) // LENGTH
    mask = torch.ones(width + length, width + length, dtype=torch.bool).tril()
    mask[width:, width:] &= block[:, None] == block[None]
    return mask[None, None]


def positions(prefix: Tensor, start: Tensor) -> Tensor:
    """Positions of a prefix (..., B, P), and of questions that all begin at ``start`` (B,)."""
    rest = start[:, None] + torch.arange(LENGTH).repeat(QUESTIONS)
    return torch.cat([prefix, rest.expand(*prefix.shape[:-1], -1)], -1)


class Places(Protocol):
    """Where the columns of a prompt stand for the decoder."""

    def places(self, grid: Grid, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (..., B, 2 + n) of two words and of the patches ``shown`` (B, n); the next one, (B,)."""
        ...


def of_patches(pool: Pool, net: Places, shown: Tensor | None = None) -> Prompt:
    """``<s> user:`` and patches: all of them, or those of ``shown`` (B, n), ascending."""
    share = pool.share.float()  # (B, MOST, P)
    whole = torch.arange(share.shape[-1]).expand(len(pool), -1)
    prefix, start = net.places(pool.grid, whole if shown is None else shown)
    width = prefix.shape[-1]
    filled = share >= 0.5 * share.amax(-1, keepdim=True).clamp(min=1e-3)
    goal = torch.einsum("bqm,bmp->bqp", pool.asked.float(), filled.float()) > 0
    # the place is known to all patches, so none of them is better to look at
    goal = goal | (pool.family == FAMILIES.index("place"))[..., None]
    if shown is not None:
        goal = goal.gather(2, shown[:, None].expand(-1, QUESTIONS, -1))
    goal = F.pad(goal, (2, 0))
    goal[..., 0] = ~goal.any(-1)  # where nothing is meant, the first token is looked at
    return Prompt(block_mask(width), positions(prefix, start), goal, torch.empty(len(pool), 0))


def of_captions(pool: Pool, rng: np.random.Generator) -> Prompt:
    """``<s> user:`` and phrases about things and place in any order, at no later positions than patches."""
    width, size = 2 + CAPTION, len(pool)
    room = rng.integers(1, PATCHES - CAPTION, size)
    words, where = np.full((size, width), PAD), np.tile(np.arange(width), (size, 1))
    goal = np.zeros((size, QUESTIONS, width), bool)
    asked, family = pool.asked.numpy(), pool.family.numpy()
    for b in range(size):
        words[b, :2] = BOS, WORD["user:"]
        phrases = [(i, _phrase(row)) for i, row in enumerate(pool.thing[b].tolist()) if row[0] >= 0]
        phrases.append((-1, f"behind is {PLACES[int(pool.place[b])]} ."))
        at, gaps = 2, np.sort(rng.integers(0, room[b], len(phrases)))
        for pick, gap in zip(rng.permutation(len(phrases)), gaps, strict=True):
            number, phrase = phrases[pick]
            tokens = [WORD[word] for word in phrase.split()]
            words[b, at : at + len(tokens)] = tokens
            where[b, at : at + len(tokens)] = gap + np.arange(at, at + len(tokens))
            # the last word but one: the noun, or the name of the place
            meant = asked[b, :, number] if number >= 0 else family[b] == FAMILIES.index("place")
            goal[b, :, at + len(tokens) - 2] = meant
            at += len(tokens)
    goal[..., 0] = ~goal.any(-1)
    ids = torch.from_numpy(words)
    mask = block_mask(width).repeat(size, 1, 1, 1)
    mask[:, 0, :, :width] &= (ids != PAD)[:, None]
    mask[:, 0] |= torch.eye(mask.shape[-1], dtype=torch.bool)  # padding sees itself, or its row would be NaN
    return Prompt(
        mask, positions(torch.from_numpy(where), torch.from_numpy(width + room)), torch.from_numpy(goal), ids
    )


def _phrase(row: list[int]) -> str:
    color, pattern, side, _ = row
    return f"a {SIDES[side] if side >= 0 else 'front'} {list(COLORS)[color]} {PATTERNS[pattern]} object ,"
