# SPDX-License-Identifier: Apache-2.0
"""The decoder goes on from the image model: clips of which it is shown a part, questions packed behind them,
and a hint about where an answer looks, which fades to nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from decoder import rotate
from pool import FIRST_TURN, LENGTH, NAMES, PATCHES, QUESTIONS, Pool
from runs import Run, optimisers
from torch import Tensor
from torch.nn import functional as F

from vlmprune.evaluation.tasks.shapes.model import PAD

# layer -> heads that are told where an answer looks; in the image model the same heads look at what is asked
HINTED = {1: (2, 3), 2: (0, 1, 2, 3)}
COUNTING = {3: (0, 1, 2, 3), 4: (0, 1, 2, 3), 5: (0, 1, 2, 3)}
COUNT = NAMES.index("count")


@dataclass
class Prompt:
    """B clips of which K patches are shown, and their questions: L columns."""

    hidden: Tensor  # (B, L, D) embeddings
    positions: Tensor  # (B, L)
    mask: Tensor  # (1, 1, L, L) bool
    answers: Tensor  # (B, QUESTIONS) columns before the answers
    parts: Tensor  # (B, QUESTIONS, PARTS, K) bool: where the things are that have to be seen
    counts: Tensor  # (B, QUESTIONS) bool: the answer is a number of things
    known: Tensor  # (B, QUESTIONS) bool: what has to be seen is shown


def show(decoder: Any, part: Pool, shown: Tensor, gaps: bool) -> Prompt:
    """``shown`` (B, K) patches, ascending; with ``gaps`` positions are those of the whole clip."""
    size, count = shown.shape
    width, length = len(FIRST_TURN) + count, QUESTIONS * LENGTH
    patches = part.tokens.gather(1, shown[..., None].expand(-1, -1, part.tokens.shape[-1])).float()
    start = decoder.embed_tokens(torch.tensor(FIRST_TURN))[None].expand(size, -1, -1)
    hidden = torch.cat([start, patches, decoder.embed_tokens(part.ids.flatten(1))], 1)
    block = torch.arange(length) // LENGTH
    mask = torch.ones(width + length, width + length, dtype=torch.bool).tril()
    mask[width:, width:] &= block[:, None] == block[None]
    places = shown if gaps else torch.arange(count).expand(size, -1)
    end = len(FIRST_TURN) + (PATCHES if gaps else count)
    texts = (end + torch.arange(LENGTH).repeat(QUESTIONS)).expand(size, -1)
    begin = torch.arange(len(FIRST_TURN)).expand(size, -1)
    parts = part.parts.gather(3, shown[:, None, None].expand(-1, *part.parts.shape[1:3], -1))
    wanted = part.parts.any(-1)  # (B, QUESTIONS, PARTS)
    counts = (part.family == COUNT)[:, None] & (torch.arange(QUESTIONS) == 0)
    return Prompt(
        hidden,
        torch.cat([begin, places + len(FIRST_TURN), texts], 1),
        mask[None, None],
        width + torch.arange(QUESTIONS) * LENGTH + part.first.clamp(min=0),
        parts,
        counts,
        (part.first >= 0) & (parts.any(-1) == wanted).all(-1),
    )


def run(decoder: Any, prompt: Prompt, teach: bool) -> tuple[Tensor, Tensor]:
    """Hidden states (B, L, D) after the last norm, and the sum of the hints."""
    hidden, hints = prompt.hidden, torch.zeros(())
    cos, sin = (part[:, None] for part in decoder.rotary_emb(hidden, prompt.positions))
    for number, layer in enumerate(decoder.layers):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (
            part(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        if teach:
            for heads, counting in ((HINTED.get(number), False), (COUNTING.get(number), True)):
                asked = prompt.known & (prompt.counts if counting else torch.tensor(True))
                if heads and asked.any():
                    hints = hints + hint(q, k, prompt, asked, list(heads))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=prompt.mask)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return decoder.norm(hidden), hints


def hint(q: Tensor, k: Tensor, prompt: Prompt, asked: Tensor, heads: list[int]) -> Tensor:
    """Mean cross-entropy of attention to equal shares of the things that have to be seen, of the first
    token where there are none, and of both where things are counted: the share of one says how many.
    """
    rows, which = asked.nonzero(as_tuple=True)  # (A,)
    columns = prompt.answers[rows, which]
    mine = q.transpose(1, 2)[rows, columns][:, heads]  # (A, heads, d)
    logits = torch.einsum("ahd,ahld->ahl", mine, k[rows][:, heads])
    allowed = prompt.mask[0, 0, columns][:, None]  # (A, 1, L)
    shares = (logits / math.sqrt(q.shape[-1])).masked_fill(~allowed, float("-inf")).log_softmax(-1)
    parts = prompt.parts[rows, which]  # (A, PARTS, K)
    count = parts.shape[-1]
    there = parts.any(-1)  # (A, PARTS)
    patches = shares[..., len(FIRST_TURN) : len(FIRST_TURN) + count]  # (A, heads, K)
    mass = patches[:, :, None].masked_fill(~parts[:, None], -1e4).logsumexp(-1)  # (A, heads, PARTS)
    sink = (prompt.counts[rows, which] | ~there.any(-1)).float()[:, None]  # (A, 1)
    said = (mass * there[:, None]).sum(-1) + shares[..., 0] * sink
    return -(said / (there.sum(-1)[:, None] + sink)).mean()


def losses(decoder: Any, hidden: Tensor, part: Pool, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Loss of the answers that can be known, and which answers are right (B, QUESTIONS)."""
    width = hidden.shape[1] - QUESTIONS * LENGTH
    states = hidden[:, width:].unflatten(1, (QUESTIONS, LENGTH))[:, :, :-1]
    logits = F.linear(states, decoder.embed_tokens.weight)  # (B, QUESTIONS, LENGTH - 1, words)
    wanted = part.ids[:, :, 1:]
    asked = (part.first >= 0)[..., None] & (wanted != PAD)
    answer = asked & (torch.arange(LENGTH - 1) >= part.first[..., None])
    right = ((logits.argmax(-1) == wanted) | ~answer).all(-1)
    learnt = answer & prompt.known[..., None]
    weight = torch.where(torch.arange(QUESTIONS) < 2, 1.0, 0.4)[None, :, None].expand(learnt.shape)[learnt]
    wrong = F.cross_entropy(logits[learnt], wanted[learnt], reduction="none")
    return (wrong * weight).sum() / weight.sum(), right


def choose(part: Pool, count: int, rng: np.random.Generator) -> Tensor:
    """(B, count) patches of the whole clip, ascending: at random, those of things more often."""
    order = rng.random(part.things.shape) - rng.uniform(0, 0.8, (len(part), 1)) * part.things.numpy()
    return torch.from_numpy(np.sort(np.argsort(order, axis=1)[:, :count], axis=1))


def train(recipe: dict[str, Any], run_: Run, model: Any, pool: Pool, dev: Pool) -> None:
    options = recipe["decoder"]
    rng = run_.generator("decoder", recipe["seed"])
    model.requires_grad_(False)
    decoder = model.model.language_model
    decoder.requires_grad_(True)

    def step(number: int) -> dict[str, float]:
        dense = number % options["dense_every"] == 0
        few = int(np.exp(rng.uniform(np.log(options["fewest"]), np.log(options["most"]))))
        size = options["dense_batch"] if dense else options["batch"]
        part = pool.pick(rng.integers(0, len(pool), size))
        shown = choose(part, PATCHES if dense else few, rng)
        prompt = show(decoder, part, shown, gaps=number % 2 == 0)
        fade = max(0.0, 1 - number / (options["fade"] * options["steps"]))
        hidden, hints = run(decoder, prompt, teach=fade > 0)
        loss, right = losses(decoder, hidden, part, prompt)
        (loss + fade * options["hints"] * hints).backward()
        hit = right[prompt.known].float().mean()
        return {"loss": float(loss.detach()), "hit": float(hit), "hints": float(hints.detach())}

    run_.loop("decoder", model, optimisers(decoder, options), step, options, lambda: measure(decoder, dev))


@torch.no_grad()
def measure(decoder: Any, dev: Pool, count: int = 3 * PATCHES // 10, batch: int = 14) -> dict[str, float]:
    """Right answers to the questions of the benchmark by family, where things are shown first."""
    fixed, right = np.random.default_rng(0), []
    for at in range(0, len(dev), batch):
        part = dev.pick(np.arange(at, min(at + batch, len(dev))))
        order = fixed.random(part.things.shape) - 2 * part.things.numpy()
        shown = torch.from_numpy(np.sort(np.argsort(order, axis=1)[:, :count], axis=1))
        prompt = show(decoder, part, shown, gaps=False)
        right.append(losses(decoder, run(decoder, prompt, teach=False)[0], part, prompt)[1][:, 0])
    rates = {name: float(torch.cat(right)[dev.family == i].float().mean()) for i, name in enumerate(NAMES)}
    return {"mean": float(np.mean(list(rates.values()))), **rates}
