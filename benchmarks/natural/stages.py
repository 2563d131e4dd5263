# SPDX-License-Identifier: Apache-2.0
"""The stages of the decoder: it reads captions (text), the projector learns to speak its words (align), then
layers behind the early ones answer about pictures (joint). The tower stays as the vision stage left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from data import Pool, batches, of_captions, of_patches
from decoder import initialise, losses, prefix_of_patches, run
from model import EARLY, WORD, Trained
from runs import Run, optimisers
from torch import Tensor
from vision import soft_labels

from vlmprune.evaluation.tasks.scenes.questions import FAMILIES
from vlmprune.evaluation.tasks.scenes.vocabulary import COLORS, PATTERNS, PLACES, SIDES

Pools = Sequence[Pool]


def text(recipe: dict[str, Any], run_: Run, net: Trained, pools: Pools, dev: Pools) -> None:
    """The whole decoder on captions and questions about them: no picture."""
    options = recipe["text"]
    rng = run_.generator("text", recipe["seed"])
    if not (run_.folder / "text.pt").exists():
        initialise(net.decoder, recipe["seed"])
    net.requires_grad_(False)
    net.decoder.requires_grad_(True)
    source = batches(pools, options["batch"], rng)

    def step(number: int) -> dict[str, float]:
        batch = next(source)
        prompt = of_captions(batch, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
            hidden, hints = run(net.decoder, net.decoder.embed_tokens(prompt.words), batch, prompt)
            answer, other, right = losses(net.decoder, hidden, batch, prompt)
        fade = max(0.0, 1 - number / (options["fade"] * options["steps"]))
        (answer + options["words"] * other + fade * options["hints"] * sum(hints.values())).backward()
        return {"loss": float(answer.detach()), "hit": float(right.float().mean()), **as_floats(hints)}

    def evaluate() -> dict[str, float]:
        fixed = np.random.default_rng(0)

        def answers(part: Pool) -> Tensor:
            prompt = of_captions(part, fixed)
            hidden, _ = run(net.decoder, net.decoder.embed_tokens(prompt.words), part, prompt)
            return losses(net.decoder, hidden, part, prompt)[2]

        return by_family(dev, answers)

    run_.loop("text", net, optimisers(net, options), step, options, evaluate)
    net.requires_grad_(True)


def align(recipe: dict[str, Any], run_: Run, net: Trained, pools: Pools, dev: Pools) -> None:
    """The projector alone, on a regression: a patch says the words of what is in and round it."""
    options = recipe["align"]
    rng = run_.generator("align", recipe["seed"])
    net.requires_grad_(False)
    net.projector.requires_grad_(True)
    source = batches(pools, options["batch"], rng)

    def error(part: Pool) -> Tensor:
        with torch.no_grad():
            patches, right = net.features(part.pictures), spoken(net, part)
        weight = 0.25 + part.seen().sum(1)
        wrong = (net.project(patches) - right).pow(2).mean(-1) / right.pow(2).mean()
        return (wrong * weight).sum() / weight.sum()

    def step(number: int) -> dict[str, float]:
        loss = error(next(source))
        loss.backward()
        return {"error": float(loss.detach())}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        return {"error": float(error(dev[0].pick(np.arange(64))))}

    run_.loop("align", net, optimisers(net, options), step, options, evaluate)
    net.requires_grad_(True)


def spoken(net: Trained, pool: Pool) -> Tensor:
    """(n, P, D) sums of word vectors: colour, pattern and side of what a patch saw; and the place,
    which all patches know, less where there are things.
    """
    table = net.decoder.embed_tokens.weight
    total = torch.zeros(*pool.seen().shape[::2], table.shape[1])
    for name, words in {"color": tuple(COLORS), "pattern": PATTERNS, "side": SIDES}.items():
        rows_ = table[torch.tensor([WORD[word] for word in words])]
        total = total + soft_labels(pool)[name][..., 1:] @ rows_
    places = table[torch.tensor([WORD[word] for word in PLACES])][pool.place]
    bare = 1 - pool.seen().sum(1)[..., None]  # (n, P, 1)
    return total + (0.4 + 0.6 * bare) * places[:, None]


def joint(recipe: dict[str, Any], run_: Run, net: Trained, pools: Pools, dev: Pools) -> None:
    """Projector and the layers behind the early ones, on questions about pictures."""
    options = recipe["joint"]
    rng = run_.generator("joint", recipe["seed"])
    net.requires_grad_(False)
    for part in (net.projector, *net.decoder.layers[EARLY:], net.decoder.norm):
        part.requires_grad_(True)
    source = batches(pools, options["batch"], rng)
    most = max(pool.share.shape[-1] for pool in pools)

    def answered(part: Pool, count: int = most) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            patches = net.features(part.pictures)
        shown = None
        if count < patches.shape[1]:
            order = torch.from_numpy(rng.random(patches.shape[:2])).argsort(1)
            shown = order[:, :count].sort(1).values
            patches = patches.gather(1, shown[..., None].expand(-1, -1, patches.shape[-1]))
        prompt = of_patches(part, net, shown)
        prefix = prefix_of_patches(net.decoder, net.project(patches))
        hidden, hints = run(net.decoder, prefix, part, prompt)
        answer, _, right = losses(net.decoder, hidden, part, prompt)
        return answer, right, hints

    def step(number: int) -> dict[str, float]:
        # a decoder of the real size knows prompts of all lengths from its text; this one has to be shown some
        few = int(np.exp(rng.uniform(np.log(options["fewest"]), np.log(most))))
        count = few if number % options["thin_every"] == 0 else most
        with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
            answer, right, hints = answered(next(source), count)
        fade = max(0.0, 1 - number / (options["fade"] * options["steps"]))
        (answer + fade * options["hints"] * sum(hints.values())).backward()
        return {"loss": float(answer.detach()), "hit": float(right.float().mean()), **as_floats(hints)}

    run_.loop(
        "joint",
        net,
        optimisers(net, options),
        step,
        options,
        lambda: by_family(dev, lambda p: answered(p)[1]),
    )
    net.requires_grad_(True)


def as_floats(hints: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in hints.items()}


@torch.no_grad()
def by_family(dev: Pools, answers: Any, limit: int = 128, batch: int = 32) -> dict[str, float]:
    """Share of right answers by family, over packed questions."""
    parts = []
    for pool in dev:
        parts += [pool.pick(np.arange(at, at + batch)) for at in range(0, min(limit, len(pool)), batch)]
    right = torch.cat([answers(part) for part in parts]).flatten()
    family = torch.cat([part.family for part in parts]).flatten()
    rates = {name: float(right[family == i].float().mean()) for i, name in enumerate(FAMILIES)}
    return {"mean": float(np.mean(list(rates.values()))), **rates}
