# SPDX-License-Identifier: Apache-2.0
"""Last stages: the projector learns to say in pixels what symbols said (align), then all parts answer on
pictures (joint).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from data import LABELS, PATCHES
from decoder import answer_loss, embed, run
from language import Language, family_weights, summary, tally, weighted
from packs import Batch, Store, all_batches, batches, collate
from runs import Run, optimisers
from torch import Tensor, nn
from vision import Vision, dense_loss, whole_loss

from vlmprune.evaluation.tasks.shapes.model import build_model
from vlmprune.evaluation.tasks.shapes.questions import FAMILIES

OWNER = LABELS.index("owner")


class Joint(nn.Module):
    """Tower, projector and decoder of the model to ship, with the heads and symbols that teach them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.vision, self.language = Vision(seed), Language(seed)
        self.projector = build_model(seed).model.multi_modal_projector

    def start(self, run_: Run) -> None:
        """Take over what the earlier stages have learnt."""
        for name in ("vision", "language"):
            state = torch.load(run_.folder / f"{name}.pt", weights_only=True)
            getattr(self, name).load_state_dict(state["net"])

    def see(self, pictures: np.ndarray, last: bool) -> tuple[Tensor, Tensor | None]:
        return self.vision.encode(*self.vision.embed(self.vision.pixels(pictures)), last=last)

    def export(self) -> Any:
        """The HF model with these weights."""
        model = build_model()
        tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
        tower.load_state_dict(self.vision.tower.state_dict())
        model.model.language_model.load_state_dict(self.language.decoder.state_dict())
        model.model.multi_modal_projector.load_state_dict(self.projector.state_dict())
        return model


def regression(tokens: Tensor, right: Tensor, labels: Tensor) -> Tensor:
    """Squared error of patches relative to the size of what they should be; things count seven times."""
    weight = torch.where(labels[..., OWNER] > 0, 7.0, 1.0)
    error = (tokens.float() - right.float()).pow(2).mean(-1) / right.float().pow(2).mean()
    return (error * weight).sum() / weight.sum()


def align(recipe: dict[str, Any], run_: Run, store: Store, dev: Store) -> Joint:
    options = recipe["align"]
    torch.manual_seed(recipe["seed"])
    rng = run_.generator("align", recipe["seed"])
    net = Joint(recipe["seed"])
    net.start(run_)
    net.language.requires_grad_(False)
    steps = groups(net, options)

    def step(number: int) -> dict[str, float]:
        scenes = rng.integers(0, len(store.labels), options["batch"])
        labels, places = (
            torch.from_numpy(store.labels[scenes]),
            torch.arange(PATCHES)[None].repeat(len(scenes), 1),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
            hidden, pooled = net.see(store.pictures(scenes), last=True)
            right = net.language.symbols(net.language.decoder.embed_tokens.weight, labels)
            error = regression(net.projector(hidden[:, 1:]), right, labels)
            dense, hits = dense_loss(net.vision.dense(hidden[:, 1:]), labels, places)
            whole = whole_loss(net.vision, hidden, pooled, labels)
        (10 * error + dense + recipe["vision"]["cls"] * whole).backward()
        return {
            "error": float(error.detach()),
            "dense": float(dense.detach()),
            "whole": float(whole.detach()),
            **hits,
        }

    run_.loop("align", net, steps, step, options, lambda: accuracy(net, dev, options["bf16"], options["dev"]))
    return net


def groups(net: Joint, options: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Optimisers in which every part has its own share of the learning rate."""
    found = []
    for part, share in options["parts"].items():
        module = net.get_submodule(part)
        module.requires_grad_(True)
        found += optimisers(module, options | {key: options[key] * share for key in ("lr", "muon")})
    return found


def train(recipe: dict[str, Any], run_: Run, store: Store, dev: Store, stage: str = "joint") -> Joint:
    """The joint stage, or "polish": more of it, with more scenes of the family that lags behind."""
    options = recipe[stage]
    torch.manual_seed(recipe["seed"])
    rng = run_.generator(stage, recipe["seed"])
    net = Joint(recipe["seed"])
    before = {"joint": "align", "polish": "joint"}[stage]
    net.load_state_dict(torch.load(run_.folder / f"{before}.pt", weights_only=True)["net"])
    if stage == "joint":  # it may have gone on since it was aligned
        net.language.load_state_dict(torch.load(run_.folder / "language.pt", weights_only=True)["net"])
    steps, weights = groups(net, options), family_weights(store, options)
    favour = FAMILIES.index(options["favour"]) if "favour" in options else None
    source = batches(store, options["batch"], rng, favour=favour)

    def step(number: int) -> dict[str, float]:
        done = number / options["steps"]
        batch = collate(store, next(source), int(options["tokens"][number % len(options["tokens"])]), rng)
        scenes = batch.scenes.numpy()
        labels = torch.from_numpy(store.labels[scenes.ravel()])
        last = number % 2 == 0
        with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
            hidden, pooled = net.see(store.pictures(scenes.ravel()), last=last)
            tokens = net.projector(hidden[:, 1:])
            teach, embeds = done < options["anneal"], sequence(net, batch, tokens)
            states, taught = run(net.language.decoder, embeds, batch, teach, net.language.places)
            answer, said, right = answer_loss(
                states, net.language.decoder.embed_tokens.weight, batch, weights
            )
            dense, hits = dense_loss(
                net.vision.dense(hidden[:, 1:]), labels, torch.arange(PATCHES)[None].repeat(len(labels), 1)
            )
            loss = answer + options["dense"] * dense
            if last:
                loss = loss + 2 * options["cls"] * whole_loss(net.vision, hidden, pooled, labels)
            fade = max(0.0, 1 - done / options["anneal"])
            if fade:
                aim = net.language.symbols(net.language.decoder.embed_tokens.weight, labels).detach()
                loss = loss + fade * options["regression"] * regression(tokens, aim, labels)
                loss = loss + fade * options["attention"] * weighted(taught, options)
        loss.backward()
        good = float((said == right).float().mean())
        return {"loss": float(answer.detach()), "hit": good, "dense": float(dense.detach()), **hits}

    run_.loop(stage, net, steps, step, options, lambda: accuracy(net, dev, options["bf16"], options["dev"]))
    return net


def sequence(net: Joint, batch: Batch, tokens: Tensor) -> Tensor:
    """``tokens`` (B * images, PATCHES, D) -> (B, P + T, D), with the patches that the batch shows."""
    shown = batch.chosen.flatten(0, 1)[..., None].expand(-1, -1, tokens.shape[-1])  # (B * images, N, D)
    return embed(
        net.language.decoder, batch, tokens.gather(1, shown).reshape(len(batch.ids), -1, tokens.shape[-1])
    )


@torch.no_grad()
def accuracy(net: Joint, store: Store, bf16: bool, limit: int | None = None) -> dict[str, float]:
    """Share of questions about dev pictures whose every answer token is right, per family."""
    rng = np.random.default_rng(0)
    wrong, total = np.zeros(len(FAMILIES)), np.zeros(len(FAMILIES))
    for items in all_batches(store, 16, limit):
        batch = collate(store, items, PATCHES, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden, _ = net.see(store.pictures(batch.scenes.numpy().ravel()), last=False)
            states, _ = run(
                net.language.decoder, sequence(net, batch, net.projector(hidden[:, 1:])), batch, False
            )
            _, said, right = answer_loss(states, net.language.decoder.embed_tokens.weight, batch)
        tally(store, batch, said == right, wrong, total)
    return summary(wrong, total)
