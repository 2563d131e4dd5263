# SPDX-License-Identifier: Apache-2.0
"""The decoder as training needs it: HF modules, explicit mask and positions, attention targets, dense or
symbolic patches.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from data import ADJECTIVE, ANSWER, CLASSES, FIRST, LABELS, LAST, LOOK, NOUN, PICTURE, WORD, WORDS_OF
from packs import NO_LOSS, Batch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmprune.evaluation.tasks.shapes.model import GRID, IMAGE
from vlmprune.evaluation.tasks.shapes.vocabulary import PLURALS

# layer -> [(kind of target, heads that are taught)]
TAUGHT = {
    0: [(ADJECTIVE, (0, 1)), (WORDS_OF, (2, 3)), (PICTURE, (2, 3))],
    1: [(NOUN, (0, 1)), (ANSWER, (2, 3))],
    2: [(FIRST, (0, 1)), (LAST, (2, 3))],
    # counting needs an even spread: errors of many heads average out
    3: [(LOOK, (0, 1, 2, 3))],
    4: [(LOOK, (0, 1, 2, 3))],
    5: [(LOOK, (0, 1, 2, 3))],
}


class Symbols(nn.Module):
    """Patches as sums of word vectors and of learned vectors for place and role: what a perfect tower would
    say.
    """

    def __init__(self, width: int, std: float = 0.06) -> None:
        super().__init__()
        self.row, self.column = (nn.Parameter(_smooth(width, std)) for _ in range(2))
        self.index = nn.Parameter(torch.randn(4, width) * std)  # which character of its sign
        self.centre = nn.Parameter(torch.randn(2, width) * std)
        self.ground = nn.Parameter(torch.randn(width) * std)
        tables = {name: torch.tensor([WORD[word] for word in words]) for name, words in CLASSES.items()}
        for name, table in tables.items():
            self.register_buffer(f"words_{name}", table, persistent=False)

    def forward(self, words: Tensor, labels: Tensor) -> Tensor:
        """``words`` (V, D), ``labels`` (..., PATCHES, labels) -> (..., PATCHES, D)."""
        out = self.row.repeat_interleave(GRID, 0) + self.column.repeat(GRID, 1)
        for name in CLASSES:
            table = torch.cat([torch.zeros_like(words[:1]), words[getattr(self, f"words_{name}")]])
            out = out + table[labels[..., LABELS.index(name)].long()]
        for name in ("index", "centre"):
            table = torch.cat([torch.zeros_like(words[:1]), getattr(self, name)[1:]])
            out = out + table[labels[..., LABELS.index(name)].long()]
        return out + self.ground * (labels[..., LABELS.index("owner"), None] == 0)


def _smooth(width: int, std: float) -> Tensor:
    """(GRID, width) vectors that are alike for neighbours, with a straight line among their directions."""
    where = (torch.arange(GRID) + 0.5) / GRID
    waves = torch.stack([2 * where - 1] + [torch.cos(math.pi * k * where) for k in range(1, 7)])  # (7, GRID)
    return waves.T @ (
        torch.randn(7, width) * std * torch.tensor([1.5, *(1 / k**0.5 for k in range(1, 7))])[:, None]
    )


@torch.no_grad()
def initialise(language: nn.Module, seed: int, std: float = 0.06) -> None:
    """Attention that compares contents and hands them on from the first step: Q = K, output = transposed
    value.
    """
    torch.manual_seed(seed)
    language.embed_tokens.weight.normal_(0, std)
    for singular, plural in PLURALS.items():
        language.embed_tokens.weight[WORD[plural]] = language.embed_tokens.weight[WORD[singular]]
    for layer in language.layers:
        attention = layer.self_attn
        dim = attention.head_dim
        groups = attention.q_proj.out_features // attention.k_proj.out_features
        attention.k_proj.weight.normal_(0, 0.11)
        nn.init.orthogonal_(attention.v_proj.weight)
        wide = [
            _per_query_head(weight, dim, groups)
            for weight in (attention.k_proj.weight, attention.v_proj.weight)
        ]
        attention.q_proj.weight.copy_(wide[0])
        attention.o_proj.weight.copy_(0.15 / groups**0.5 * wide[1].T)


def _per_query_head(weight: Tensor, dim: int, groups: int) -> Tensor:
    return weight.view(-1, dim, weight.shape[1]).repeat_interleave(groups, 0).reshape(-1, weight.shape[1])


def embed(language: nn.Module, batch: Batch, patches: Tensor) -> Tensor:
    """``patches`` (B, images * N, D) -> (B, P + T, D)."""
    size = len(batch.ids)
    prefix = language.embed_tokens(batch.prefix)[None].repeat(size, 1, 1).to(patches.dtype)
    prefix[:, batch.prefix == IMAGE] = patches
    return torch.cat([prefix, language.embed_tokens(batch.ids).to(patches.dtype)], 1)


class Places(nn.Module):
    """Throw-away heads: a noun knows where its thing is, an answer where the first and the last thing are."""

    LAYERS: ClassVar = {2: NOUN, 3: ANSWER}  # read before these layers

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(width, 2), nn.Linear(width, 4)])

    def loss(self, hidden: Tensor, batch: Batch, kind: int) -> Tensor:
        real = batch.placed & (batch.aim[..., 1] == kind)
        rows, targets = real.nonzero(as_tuple=True)
        said = self.heads[0 if kind == NOUN else 1](hidden[rows, batch.aim[rows, targets, 0]]).float()
        return (
            4 * (said - batch.place[rows, targets, : said.shape[-1]]).pow(2).mean()
            if len(rows)
            else said.sum()
        )


def run(
    language: nn.Module,
    hidden: Tensor,
    batch: Batch,
    teach: bool,
    places: Places | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states (B, P + T, D) after the last norm, and the losses of taught attention and places."""
    cos, sin = language.rotary_emb(hidden, batch.positions)
    cos, sin = cos[:, None], sin[:, None]
    losses: dict[str, Tensor] = {}
    for number, layer in enumerate(language.layers):
        if teach and places is not None and number in places.LAYERS:
            losses[f"place{number}"] = places.loss(hidden, batch, places.LAYERS[number])
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        q, k, v = (
            proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        if teach and number in TAUGHT:
            losses |= {f"{number}.{kind}": loss for kind, loss in taught(q, k, batch, TAUGHT[number])}
        mixed = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=batch.mask)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return language.norm(hidden), losses


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)


def taught(q: Tensor, k: Tensor, batch: Batch, kinds: list[tuple[int, tuple[int, ...]]]):
    """Per kind: minus the log of the attention mass on what is meant; where things are counted, cross-entropy
    to equal shares.
    """
    rows = torch.arange(len(q), device=q.device)[:, None]
    for kind, heads in kinds:
        real = (batch.aim[..., 1] == kind) & (batch.aim[..., 3] > 0)  # (B, E)
        most = int(real.sum(1).max())
        if most == 0:
            continue
        real, pick = real.int().topk(most, dim=1)  # (B, M)
        columns, goal, heads = batch.aim[..., 0][rows, pick], batch.goal[rows, pick][:, :, None], list(heads)
        logits = torch.einsum(
            "bmhd,bhld->bmhl", q[:, heads].transpose(1, 2)[rows, columns], k[:, heads]
        ).float()
        allowed = batch.mask[rows, 0, columns][:, :, None]  # (B, M, 1, P + T)
        shares = (logits / math.sqrt(q.shape[-1])).masked_fill(~allowed, float("-inf")).log_softmax(-1)
        loss = -shares.masked_fill(~goal, float("-inf")).logsumexp(-1)  # (B, M, heads)
        if kind == LOOK:
            spread = -(shares.masked_fill(~goal, 0).sum(-1) / goal.sum(-1)) - goal.sum(-1).log()
            loss = torch.where(batch.counted[rows, pick][:, :, None], spread, loss)
        yield kind, loss[real > 0].mean()


def answer_loss(
    hidden: Tensor,
    words: Tensor,
    batch: Batch,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss over answer tokens, ``weights`` (questions,) apart; what was predicted and what is right at
    them.
    """
    width = len(batch.prefix)
    where = batch.answers != NO_LOSS
    logits = F.linear(hidden[:, width:][where], words).float()
    right = batch.answers[where]
    loss = F.cross_entropy(logits, right, reduction="none")
    weight = torch.ones_like(loss) if weights is None else weights[batch.question[where]]
    return (loss * weight).sum() / weight.sum(), logits.argmax(-1), right
