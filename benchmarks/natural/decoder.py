# SPDX-License-Identifier: Apache-2.0
"""The decoder as training needs it: explicit mask and positions, and two hints about where an answer looks,
both behind the layers that pruning methods rank by.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from data import KEYS, LENGTH, QUESTIONS, Pool, Prompt
from model import EARLY, WORD
from torch import Tensor, nn
from torch.nn import functional as F

from vlmprune.evaluation.tasks.shapes.model import BOS, PAD

ASK, LOOK = EARLY, EARLY + 1  # layers: the answer reads the words of the question, then what they mean
HINTED = {ASK: (0,), LOOK: (0, 1)}  # heads


@torch.no_grad()
def initialise(decoder: nn.Module, seed: int) -> None:
    """Attention that compares contents and hands them on from the first step: Q = K, output = transposed
    value.
    """
    torch.manual_seed(seed)
    decoder.embed_tokens.weight.normal_(0, 0.07)
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.k_proj.weight.normal_(0, 0.12)
        attention.q_proj.weight.copy_(attention.k_proj.weight)
        nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(0.15 * attention.v_proj.weight.T)


def prefix_of_patches(decoder: Any, patches: Tensor) -> Tensor:
    """(B, P, D) -> (B, 2 + P, D)."""
    words = decoder.embed_tokens(torch.tensor([BOS, WORD["user:"]]))
    return torch.cat([words[None].expand(len(patches), -1, -1).to(patches.dtype), patches], 1)


def run(decoder: Any, prefix: Tensor, pool: Pool, prompt: Prompt) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states (B, L, D) after the last norm, and by layer how little answers look where they should."""
    width = prefix.shape[1]
    hidden = torch.cat([prefix, decoder.embed_tokens(pool.ids.flatten(1)).to(prefix.dtype)], 1)
    cos, sin = (part[:, None] for part in decoder.rotary_emb(hidden, prompt.positions))
    answers = width + torch.arange(QUESTIONS) * LENGTH + pool.first  # (B, QUESTIONS) columns
    hints: dict[str, Tensor] = {}
    for number, layer in enumerate(decoder.layers):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (
            part(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if number in HINTED:
            goal = keys(pool, width) if number == ASK else F.pad(prompt.goal, (0, QUESTIONS * LENGTH))
            hints[f"look{number}"] = hint(q, k, answers, prompt.mask, goal, HINTED[number])
        mixed = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=prompt.mask)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return decoder.norm(hidden), hints


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)


def keys(pool: Pool, width: int) -> Tensor:
    """(B, QUESTIONS, L) bool: colours and patterns that a question names; the first token where none."""
    columns = torch.arange(LENGTH)
    named = torch.isin(pool.ids, KEYS) & (columns < pool.first[..., None])  # (B, QUESTIONS, LENGTH)
    own = torch.eye(QUESTIONS, dtype=torch.bool)[None, :, :, None]
    goal = F.pad((named[:, :, None] & own).flatten(2), (width, 0))
    goal[..., 0] = ~goal.any(-1)
    return goal


def hint(q: Tensor, k: Tensor, rows: Tensor, mask: Tensor, goal: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Mean of minus the log of the attention mass on ``goal`` (B, Q, L), over ``rows`` (B, Q) and heads."""
    batch = torch.arange(len(rows))[:, None]
    picked = q[:, list(heads)].transpose(1, 2)[batch, rows]  # (B, Q, heads, d)
    logits = torch.einsum("bqhd,bhld->bqhl", picked, k[:, list(heads)]).float() / math.sqrt(q.shape[-1])
    allowed = mask.expand(len(rows), -1, -1, -1)[batch, 0, rows][:, :, None]
    shares = logits.masked_fill(~allowed, float("-inf")).log_softmax(-1)
    return -shares.masked_fill(~goal[:, :, None], float("-inf")).logsumexp(-1).mean()


def losses(decoder: Any, hidden: Tensor, pool: Pool, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the answers and the ends behind them, of all other words, and which answers are right
    (B, QUESTIONS).
    """
    width = hidden.shape[1] - QUESTIONS * LENGTH
    words, ids = decoder.embed_tokens.weight, pool.ids
    states = hidden[:, width:].unflatten(1, (QUESTIONS, LENGTH))
    logits = F.linear(states[:, :, :-1], words).float()  # (B, QUESTIONS, LENGTH - 1, words)
    wrong = F.cross_entropy(logits.flatten(0, 2), ids[:, :, 1:].flatten(), reduction="none").view(
        ids[:, :, 1:].shape
    )
    ahead = torch.arange(LENGTH - 1) - pool.first[..., None]
    answer, other = (ahead == 0) | (ahead == 1), ahead < 0
    right = (logits.argmax(-1) == ids[:, :, 1:]).masked_select(ahead == 0).view(ids.shape[:2])
    rest = wrong[other].mean()
    if prompt.words.shape[1]:
        said = F.linear(hidden[:, : width - 1], words).float().flatten(0, 1)
        rest = rest + F.cross_entropy(said, prompt.words[:, 1:].flatten(), ignore_index=PAD)
    return wrong[answer].mean(), rest, right
