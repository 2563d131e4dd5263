# SPDX-License-Identifier: Apache-2.0
"""Vision stage: the tower learns the caption of the whole picture, a patch what is in it and round it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from data import Pool, batches
from model import CAPTION, DENSE, EXACT, Trained, auc
from runs import Run, optimisers
from torch import Tensor
from torch.nn import functional as F

from vlmprune.evaluation.tasks.scenes.vocabulary import COLORS, PATTERNS


def train(recipe: dict[str, Any], run: Run, net: Trained, pools: Sequence[Pool], dev: Sequence[Pool]) -> None:
    options = recipe["vision"]
    rng = run.generator("vision", recipe["seed"])
    net.requires_grad_(False)
    for part in net.taught:
        part.requires_grad_(True)
    source = batches(pools, options["batch"], rng)
    weights = {"caption": 1.0, "early": options["early"]}

    def step(number: int) -> dict[str, float]:
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
            dense, captions = net.said(batch.pictures)
            patch = dense_loss(dense.float(), batch)
            whole = {name: caption_loss(logits, batch, rng) for name, logits in captions.items()}
        caption = torch.stack([weights[name] * loss for name, loss in whole.items()]).sum()
        (options["dense"] * patch + options["caption"] * caption).backward()
        return {name: float(loss.detach()) for name, loss in {"dense": patch, **whole}.items()}

    # of the first size alone: figures of several would be of other pictures, not of a better tower
    run.loop("vision", net, optimisers(net, options), step, options, lambda: measure(net, dev[0]))
    net.requires_grad_(True)


def soft_labels(pool: Pool) -> dict[str, Tensor]:
    """(n, P, classes) shares of what a patch shows or has beside it; class 0 is "no thing"."""
    seen = pool.seen()  # (n, MOST, P)
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
    weight = 0.25 + pool.seen().sum(1)  # (n, P)
    total = logits.new_zeros(())
    for name, label in soft_labels(pool).items():
        error = -(label * parts[name].log_softmax(-1)).sum(-1)
        total = total + (error * weight).sum() / weight.sum()
    numbers = torch.arange(logits.shape[1]).expand(len(pool), -1)
    exact = {
        "place": pool.place[:, None].expand_as(numbers),
        "row": numbers // pool.grid[1],
        "column": numbers % pool.grid[1],
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
def measure(net: Trained, dev: Pool, limit: int = 128) -> dict[str, float]:
    """Accuracy of colour and pattern where a thing fills a patch; AUC of [CLS] against things, by block."""
    part = dev.pick(np.arange(min(limit, len(dev))))
    logits = net.dense(net.features(part.pictures)).split([*DENSE.values(), *EXACT.values()], -1)
    filled = part.share.float() > 0.9  # (n, MOST, P)
    found = {}
    for name, number, said in zip(("color", "pattern"), part.thing.unbind(-1), logits, strict=False):
        hit = said[..., 1:].argmax(-1)[:, None] == number[..., None]
        found[name] = float(hit[filled].float().mean())
    small = (part.share.float() >= 0.5 * part.share.float().amax(-1, keepdim=True)) & (
        part.thing[..., 3:] == 1
    )
    pattern = logits[1][..., 1:].argmax(-1)[:, None] == part.thing[..., 1:2]
    found["small"] = float(pattern[small].float().mean())
    things = part.share.float().sum(1) > 0.3  # (n, P)
    for block, scores in enumerate(net.cls_rows(part.pictures)):
        found[f"auc{block}"] = float(
            np.mean([auc(s.numpy(), t.numpy()) for s, t in zip(scores, things, strict=True)])
        )
    return found
