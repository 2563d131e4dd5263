# SPDX-License-Identifier: Apache-2.0
"""Vision stage: [CLS] learns the caption of the whole picture, a patch what is in it and round it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from data import Pool
from model import CAPTION, DENSE, EXACT, FEATURES, GRID, PATCHES, Natural, auc, cls_rows
from runs import Run, optimisers
from torch import Tensor
from torch.nn import functional as F

from vlmprune.evaluation.tasks.scenes.vocabulary import COLORS, PATTERNS


def train(recipe: dict[str, Any], run: Run, net: Natural, pool: Pool, dev: Pool) -> None:
    options = recipe["vision"]
    rng = run.generator("vision", recipe["seed"])
    taught = [net.tower, net.dense, net.caption, net.early_caption]
    net.requires_grad_(False)
    for part in taught:
        part.requires_grad_(True)
    source = rows(len(pool), options["batch"], rng)

    def step(number: int) -> dict[str, float]:
        batch = pool.pick(next(source))
        with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
            hidden = net.see(batch.pictures)
            patch = dense_loss(net.dense(hidden[FEATURES][:, 1:]).float(), batch)
            late = caption_loss(net.caption(net.tower.post_layernorm(hidden[-1][:, 0])), batch, rng)
            early = caption_loss(net.early_caption(hidden[FEATURES][:, 0]), batch, rng)
        loss = options["dense"] * patch + options["caption"] * (late + options["early"] * early)
        loss.backward()
        return {
            "dense": float(patch.detach()),
            "caption": float(late.detach()),
            "early": float(early.detach()),
        }

    run.loop("vision", net, optimisers(net, options), step, options, lambda: measure(net, dev))
    net.requires_grad_(True)


def rows(size: int, batch: int, rng: np.random.Generator) -> Any:
    """Numbers of a batch, every one once before any comes twice."""
    while True:
        order = rng.permutation(size)
        yield from (order[at : at + batch] for at in range(0, size - batch + 1, batch))


def soft_labels(pool: Pool) -> dict[str, Tensor]:
    """(n, PATCHES, classes) shares of what a patch shows or has beside it; class 0 is "no thing"."""
    seen = pool.seen()  # (n, MOST, PATCHES)
    found = {}
    for column, (name, classes) in enumerate(DENSE.items()):
        number = pool.thing[..., column].clamp(min=-1) + 1  # a thing at no side counts as no thing
        one_hot = F.one_hot(number, classes).float()
        shares = torch.einsum("nmp,nmc->npc", seen, one_hot)
        shares[..., 0] += 1 - seen.sum(1)
        found[name] = shares
    return found


def dense_loss(logits: Tensor, pool: Pool) -> Tensor:
    """Cross-entropy to what is in and round each patch; patches near things count more."""
    parts = dict(zip((*DENSE, *EXACT), logits.split([*DENSE.values(), *EXACT.values()], -1), strict=True))
    weight = 0.25 + pool.seen().sum(1)  # (n, PATCHES)
    total = logits.new_zeros(())
    for name, label in soft_labels(pool).items():
        error = -(label * parts[name].log_softmax(-1)).sum(-1)
        total = total + (error * weight).sum() / weight.sum()
    numbers = torch.arange(PATCHES).expand(len(pool), -1)
    exact = {
        "place": pool.place[:, None].expand(-1, PATCHES),
        "row": numbers // GRID,
        "column": numbers % GRID,
    }
    for name, label in exact.items():
        share = 0.3 if name == "place" else 0.1
        total = total + share * F.cross_entropy(parts[name].flatten(0, 1), label.flatten())
    return total


def caption_loss(logits: Tensor, pool: Pool, rng: np.random.Generator) -> Tensor:
    """What a caption of the whole picture names: large things, the place, and a small thing now and then."""
    color, pattern, _, small = pool.thing.unbind(-1)  # (n, MOST)
    said = (color >= 0) & ((small == 0) | torch.from_numpy(rng.random(color.shape) < 0.3))
    named = torch.zeros(len(pool), CAPTION + 1)
    pair = (color * len(PATTERNS) + pattern).masked_fill(~said, CAPTION)
    named.scatter_(1, pair, 1.0)
    named.scatter_(1, len(COLORS) * len(PATTERNS) + pool.place[:, None], 1.0)
    return F.binary_cross_entropy_with_logits(
        logits.float(), named[:, :CAPTION], pos_weight=torch.tensor(4.0)
    )


@torch.no_grad()
def measure(net: Natural, dev: Pool, limit: int = 128) -> dict[str, float]:
    """Accuracy of colour and pattern where a thing fills a patch; AUC of [CLS] against things, by block."""
    part = dev.pick(np.arange(min(limit, len(dev))))
    hidden = net.see(part.pictures)
    logits = net.dense(hidden[FEATURES][:, 1:]).split([*DENSE.values(), *EXACT.values()], -1)
    filled = part.share.float() > 0.9  # (n, MOST, PATCHES)
    found = {}
    for name, number, said in zip(("color", "pattern"), part.thing.unbind(-1), logits, strict=False):
        hit = said[..., 1:].argmax(-1)[:, None] == number[..., None]
        found[name] = float(hit[filled].float().mean())
    small = (part.share.float() >= 0.5 * part.share.float().amax(-1, keepdim=True)) & (
        part.thing[..., 3:] == 1
    )
    pattern = logits[1][..., 1:].argmax(-1)[:, None] == part.thing[..., 1:2]
    found["small"] = float(pattern[small].float().mean())
    things = part.share.float().sum(1) > 0.3  # (n, PATCHES)
    for block, scores in enumerate(cls_rows(net.tower, hidden)):
        found[f"auc{block}"] = float(
            np.mean([auc(s.numpy(), t.numpy()) for s, t in zip(scores, things, strict=True)])
        )
    return found
