# SPDX-License-Identifier: Apache-2.0
"""Language stage: the decoder learns to answer on symbolic patches, and which patches a word refers to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from data import LOOK, PATCHES, WORD
from decoder import Places, Symbols, answer_loss, embed, initialise, run
from packs import NO_LOSS, Store, all_batches, batches, collate
from runs import Run, optimisers, rank
from torch import Tensor, distributed, nn

from vlmprune.evaluation.tasks.shapes.model import build_model
from vlmprune.evaluation.tasks.shapes.questions import FAMILIES


class Language(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.decoder = build_model(seed).model.language_model
        initialise(self.decoder, seed)
        self.symbols = Symbols(self.decoder.config.hidden_size)
        self.places = Places(self.decoder.config.hidden_size)

    def patches(self, labels: Tensor, chosen: Tensor) -> Tensor:
        """(B, images, PATCHES, labels), (B, images, N) -> (B, images * N, D)."""
        tokens = self.symbols(self.decoder.embed_tokens.weight, labels)
        index = chosen[..., None].expand(*chosen.shape, tokens.shape[-1])
        return tokens.gather(2, index).flatten(1, 2)


def train(recipe: dict[str, Any], run_: Run, store: Store, dev: Store) -> Language:
    options = recipe["language"]
    torch.manual_seed(recipe["seed"])
    rng = run_.generator("language", recipe["seed"])
    net = Language(recipe["seed"])
    steps = optimisers(net, options)
    source, weights = batches(store, options["batch"], rng), family_weights(store, options)

    def step(number: int) -> dict[str, float]:
        items = next(source)
        tokens = int(rng.choice(options["tokens"]))
        batch = collate(store, items, tokens, rng)
        labels = torch.from_numpy(store.labels[store.scene_of[items][:, : batch.scenes.shape[1]]])
        with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
            patches = net.patches(labels, batch.chosen)
            noise = options["noise"] * patches.detach().pow(2).mean().sqrt() * torch.rand(len(patches), 1, 1)
            embeds = embed(net.decoder, batch, patches + noise * torch.randn_like(patches))
            hidden, taught = run(net.decoder, embeds, batch, True, net.places)
            answer, said, right = answer_loss(hidden, net.decoder.embed_tokens.weight, batch, weights)
        share = options["attention"] * max(0.0, 1 - number / (options["anneal"] * options["steps"]))
        loss = answer + share * weighted(taught, options)
        loss.backward()
        return {
            "loss": float(answer.detach()),
            "hit": float((said == right).float().mean()),
            **{f"a{key}": float(value.detach()) for key, value in taught.items()},
        }

    run_.loop(
        "language", net, steps, step, options, lambda: accuracy(net, dev, options["bf16"], options["dev"])
    )
    return net


def weighted(taught: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """Sum of the losses of taught attention."""
    return sum(loss * (options["look"] if key.endswith(f".{LOOK}") else 1.0) for key, loss in taught.items())


def family_weights(store: Store, options: dict[str, Any]) -> Tensor:
    """(questions,) weight of every question in the loss; high counts are rarer in training scenes than in the
    benchmark.
    """
    weights = np.array([options["family_weight"].get(name, 1.0) for name in FAMILIES])[store.families]
    answers = store.ids[store.id_start[:-1] + store.firsts + 1]
    for word, factor in options["count_weight"].items():
        weights[(store.families == FAMILIES.index("count")) & (answers == WORD[word])] *= factor
    return torch.from_numpy(weights).float()


@torch.no_grad()
def accuracy(
    net: Language, store: Store, bf16: bool, limit: int | None = None, tokens: int = PATCHES
) -> dict[str, float]:
    """Share of questions whose every answer token is right, per family, all patches shown."""
    rng = np.random.default_rng(0)
    wrong, total = np.zeros(len(FAMILIES)), np.zeros(len(FAMILIES))
    for items in all_batches(store, 16, limit):
        batch = collate(store, items, tokens, rng)
        labels = torch.from_numpy(store.labels[store.scene_of[items][:, : batch.scenes.shape[1]]])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden, _ = run(
                net.decoder, embed(net.decoder, batch, net.patches(labels, batch.chosen)), batch, False
            )
            _, said, right = answer_loss(hidden, net.decoder.embed_tokens.weight, batch)
        tally(store, batch, said == right, wrong, total)
    return summary(wrong, total)


def tally(store: Store, batch: Any, good: Tensor, wrong: np.ndarray, total: np.ndarray) -> None:
    """Add the questions of a batch to the counts per family."""
    question = batch.question[batch.answers != NO_LOSS].numpy()
    bad = np.unique(question[~good.numpy()])
    np.add.at(wrong, store.families[bad], 1)
    np.add.at(total, store.families[np.unique(question)], 1)


def summary(wrong: np.ndarray, total: np.ndarray) -> dict[str, float]:
    if rank()[1] > 1:
        for counts in (wrong, total):
            distributed.all_reduce(torch.from_numpy(counts))
    rates = 1 - wrong / np.maximum(total, 1)
    return {
        "mean": float(rates[total > 0].mean()),
        **{name: float(r) for name, r in zip(FAMILIES, rates, strict=True)},
    }
