# SPDX-License-Identifier: Apache-2.0
"""Vision stage: every patch learns to say what it shows and where it is, [CLS] learns to say what is in the
picture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from data import CLASSES, LABELS, PATCHES
from packs import Store
from runs import Run, optimisers
from torch import Tensor, nn
from torch.nn import functional as F

from vlmprune.evaluation.tasks.shapes.model import GRID, build_model, build_processor
from vlmprune.evaluation.tasks.shapes.vocabulary import COLORS, SHAPES

DENSE = {
    "shape": len(SHAPES) + 2,
    "color": len(COLORS) + 1,
    "size": 4,
    "character": len(CLASSES["character"]) + 1,
    "index": 4,
    "centre": 2,
    "row": GRID,
    "column": GRID,
}
GROUND_WEIGHT = {"shape": 0.15, "color": 0.15, "size": 0.15, "character": 0.05, "index": 0.05, "centre": 0.3}
PLACE_WEIGHT = 0.1
PAIRS = (len(SHAPES) + 1) * len(COLORS)


class Vision(nn.Module):
    """The tower with throw-away heads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        tower = build_model(seed).model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)
        width = self.tower.config.hidden_size
        torch.manual_seed(seed)
        self.dense = nn.Linear(width, sum(DENSE.values()))
        self.whole, self.whole_early = (nn.Linear(width, PAIRS + DENSE["character"] - 1) for _ in range(2))
        images = build_processor().image_processor
        self.register_buffer("mean", torch.tensor(images.image_mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(images.image_std).view(3, 1, 1) * 255, persistent=False)

    def pixels(self, pictures: np.ndarray) -> Tensor:
        """(n, H, W, 3) uint8 -> normalised (n, 3, H, W), as the processor gives it."""
        return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - self.mean) / self.std

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[CLS] (n, 1, D) and patches (n, PATCHES, D), with positions."""
        hidden = self.tower.embeddings(pixels)
        return hidden[:, :1], hidden[:, 1:]

    def encode(self, cls: Tensor, patches: Tensor, last: bool) -> tuple[Tensor, Tensor | None]:
        """Hidden states one layer before the end (n, 1 + N, D), and the pooled [CLS] where the last layer is
        run.
        """
        hidden = self.tower.pre_layrnorm(torch.cat([cls, patches], 1))
        for layer in self.tower.encoder.layers[:-1]:
            hidden = plain(layer, hidden)
        if not last:
            return hidden, None
        return hidden, self.tower.post_layernorm(plain(self.tower.encoder.layers[-1], hidden)[:, 0])


def plain(layer: nn.Module, hidden: Tensor) -> Tensor:
    """One encoder layer."""
    attention, x = layer.self_attn, layer.layer_norm1(hidden)
    q, k, v = (
        proj(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(q, k, v)
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def dense_loss(logits: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, dict[str, float]]:
    """``logits`` (n, N, sum of classes), ``labels`` (n, N, labels), ``places`` (n, N) numbers; with
    foreground accuracies.
    """
    total, hits = logits.new_zeros(()), {}
    for name, part in zip(DENSE, logits.float().split(list(DENSE.values()), -1), strict=True):
        if name in ("row", "column"):
            right = places // GRID if name == "row" else places % GRID
            total = total + PLACE_WEIGHT * F.cross_entropy(part.flatten(0, 1), right.flatten())
            continue
        right = labels[..., LABELS.index(name)].long()
        weight = torch.ones(DENSE[name], device=logits.device)
        weight[0] = GROUND_WEIGHT[name]
        total = total + F.cross_entropy(part.flatten(0, 1), right.flatten(), weight)
        here = right > 0
        if here.any():
            hits[name] = float((part.argmax(-1) == right)[here].float().mean())
    return total, hits


def whole_targets(labels: Tensor) -> Tensor:
    """(n, PATCHES, labels) -> (n, pairs + characters) what is in the picture."""
    shape, color, character = (
        labels[..., LABELS.index(name)].long() for name in ("shape", "color", "character")
    )
    out = torch.zeros(len(labels), 1 + PAIRS + DENSE["character"] - 1, device=labels.device)
    out.scatter_(1, torch.where(shape > 0, 1 + (shape - 1) * len(COLORS) + color - 1, 0), 1.0)
    out.scatter_(1, torch.where(character > 0, PAIRS + character, 0), 1.0)
    return out[:, 1:]


def whole_loss(net: Vision, hidden: Tensor, pooled: Tensor, labels: Tensor) -> Tensor:
    right, weight = whole_targets(labels), torch.tensor(4.0, device=labels.device)
    late, early = net.whole(pooled).float(), net.whole_early(hidden[:, 0]).float()
    return F.binary_cross_entropy_with_logits(
        late, right, pos_weight=weight
    ) + 0.3 * F.binary_cross_entropy_with_logits(early, right, pos_weight=weight)


def windows(labels: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """(n, side * side) patch numbers of a square round something that is shown, or anywhere in an empty
    picture.
    """
    score = (labels[..., LABELS.index("owner")] > 0) + rng.random(labels.shape[:2]) * 0.5
    centre = score.argmax(1)
    corner = np.stack([centre // GRID, centre % GRID], 1) - rng.integers(0, side, (len(labels), 2))
    corner = np.clip(corner, 0, GRID - side)
    row = corner[:, :1] + np.arange(side).repeat(side)
    return row * GRID + corner[:, 1:] + np.tile(np.arange(side), side)


def train(recipe: dict[str, Any], run: Run, store: Store, dev: Store) -> Vision:
    options = recipe["vision"]
    torch.manual_seed(recipe["seed"])
    rng = run.generator("vision", recipe["seed"])
    net = Vision(recipe["seed"])
    steps = optimisers(net, options)

    def step(number: int) -> dict[str, float]:
        whole = number % options["whole_every"] == 0 or number > options["windows_until"] * options["steps"]
        scenes = rng.integers(0, len(store.labels), options["batch"] if whole else options["batch_windows"])
        labels = store.labels[scenes]
        numbers = (
            np.tile(np.arange(PATCHES), (len(scenes), 1))
            if whole
            else windows(labels, options["window"], rng)
        )
        seen, places = (
            torch.from_numpy(np.take_along_axis(labels, numbers[..., None], 1)),
            torch.from_numpy(numbers),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
            cls, patches = net.embed(net.pixels(store.pictures(scenes)))
            patches = patches.gather(1, places[..., None].expand(-1, -1, patches.shape[-1]))
            hidden, pooled = net.encode(cls, patches, last=whole)
            loss, hits = dense_loss(net.dense(hidden[:, 1:]), seen, places)
            if whole:
                loss = loss + options["cls"] * whole_loss(net, hidden, pooled, seen)
        loss.backward()
        return {"loss" if whole else "loss_window": float(loss.detach()), **(hits if whole else {})}

    run.loop("vision", net, steps, step, options, lambda: accuracy(net, dev, options["bf16"], options["dev"]))
    return net


@torch.no_grad()
def accuracy(net: Vision, store: Store, bf16: bool, limit: int) -> dict[str, float]:
    """Foreground accuracy per kind of label, and the AUC of [CLS] attention against the things, one layer
    before the end.
    """
    sums: dict[str, list[float]] = {}
    for start in range(0, limit, 25):
        scenes = np.arange(start, min(start + 25, limit))
        labels = torch.from_numpy(store.labels[scenes])
        places = torch.arange(PATCHES)[None].repeat(len(scenes), 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden, _ = net.encode(*net.embed(net.pixels(store.pictures(scenes))), last=False)
            _, hits = dense_loss(net.dense(hidden[:, 1:]), labels, places)
        for name, value in hits.items():
            sums.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in sums.items()}
