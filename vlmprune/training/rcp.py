# SPDX-License-Identifier: Apache-2.0
"""Training of RCP's pruners and repairs: nothing is cut, attention to what left is taken away.

From its pruning layer on a token's columns are multiplied by c, which is 0 or 1, and the rows add up to one
again. That is what a cut does, and c has a gradient: of y = sigmoid((logit + noise) / T), which it rounds.
T falls over the steps and the noise ends before them. In each step some of the learned queries, whole, and
some of what scores single tokens are left out. The loss is

    1.5 task + 0.1 repair + 20 sparsity,

the cross entropy of the answers; how far the rows that answer, once repaired, are from those of the dense
model, in mean and variance of every channel; and how far the share of tokens is from its target, which falls
from all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SpecError, UnsupportedError
from ..hooks.attention_call import AttentionCall
from ..hooks.attention_tap import tap
from ..hooks.slots.repairs import attention_norm
from ..methods.rcp import part_of
from ..methods.rcp.losses import repair_loss, sparsity_loss
from ..methods.rcp.pruner import SHAPES, pruner_scores
from ..methods.rcp.repair import CONTEXT_SHAPES, REPAIR_SHAPES, dropped_embedding, mask_embedding, repaired
from .data import Exercise, answer_loss, batch_of, question_columns, rows_that_answer, visual_of
from .frozen import OfFrozen

TASK, REPAIR, SPARSITY = 1.5, 0.1, 20.0  # weights of the terms
FIRST_HEAT, LAST_HEAT = 1.5, 0.5
COOL, QUIET, RISE = 0.6, 0.8, 0.1  # shares of the steps: heat has fallen, noise ends, target is reached
DROP = 0.2  # share of learned queries, and of what scores single tokens, left out of a step
CUT_AT, REPAIRED_AT = (4, 14, 24), (13, 22, 29)  # of 32 layers, as published
FEWEST_LAYERS = 8


class RCPTraining(OfFrozen):
    """What the loop trains for RCP.

    Args:
        model, processor: the model, which stays frozen.
        keep: visual tokens of a picture, on average over all layers.
        width: d of the pruners; None: 512, or half the width of a small model.
        seed: of the first weights.
    """

    method = "rcp"

    def __init__(self, model: Any, processor: Any, keep: int, width: int | None, seed: int) -> None:
        super().__init__(model, processor, seed)
        self.keep, self.depth = keep, self.adapter.depth
        if self.depth < FEWEST_LAYERS:
            raise UnsupportedError(
                f"rcp prunes at three layers and repairs behind each; a language model of {self.depth} "
                f"layers has no room for them, at least {FEWEST_LAYERS} are needed"
            )
        # published for 32 layers, scaled to this depth
        self.layers = [self.depth * layer // 32 for layer in CUT_AT]
        self.repairs = [
            [self.depth * layer // 32, cut] for layer, cut in zip(REPAIRED_AT, self.layers, strict=True)
        ]
        d = min(512, self.wide // 2) if width is None else width
        self.heads = 4
        if d % self.heads:
            raise SpecError(f"width={d}; expected a multiple of {self.heads}, the heads of a pruner")
        # letters of the shapes in ``SHAPES`` and its like; a small model gets small modules
        self.sizes = {
            "D": self.wide,
            "d": d,
            "q": 16 if d >= 256 else 8,
            "r": max(8, d // 2 if d < 512 else d),
        }
        self.sizes |= {"e": 64 if d >= 256 else 16, "N": self._patches()}
        self.module = self.parameters((name, self._first(name, axes)) for name, axes in self._shapes())

    def _patches(self) -> int:
        """N, tokens of a picture, for the table of places; others are drawn out or together."""
        config = self.model.config.vision_config
        return (config.image_size // config.patch_size) ** 2

    def _shapes(self) -> list[tuple[str, tuple[str, ...]]]:
        found = [(f"pruner.{layer}.{name}", axes) for layer in self.layers for name, axes in SHAPES.items()]
        found += [(f"context.{name}", axes) for name, axes in CONTEXT_SHAPES.items()]
        return found + [
            (f"repair.{layer}.{name}", axes)
            for layer, _ in self.repairs
            for name, axes in REPAIR_SHAPES.items()
        ]

    def _first(self, name: str, axes: tuple[str, ...]) -> Tensor:
        """A tensor as it starts: what scores and what repairs begin with no say."""
        shape = [int(axis) if axis.isdigit() else self.sizes[axis] for axis in axes]
        # pruner.4.token_out.weight -> token_out, weight
        last = name.rsplit(".", 2)[-2:]
        if last[-1] == "keep_bias":
            return torch.full(shape, 2.0)  # begin by keeping
        if last[-1] == "alpha":
            return torch.full(shape, 0.1)
        if last[-1] in ("queries", "position", "mask_query"):
            return 0.02 * torch.randn(shape)
        if last[-1] == "bias":
            return torch.zeros(shape)
        if last[0].endswith("norm"):
            return torch.ones(shape)
        # the term of single tokens, and what a context does to a repair
        if last[0] in ("token_out", "gamma", "beta"):
            return torch.zeros(shape)
        if last[0] == "aggregator":
            return torch.full(shape, 1 / shape[1])
        return nn.init.xavier_uniform_(torch.empty(shape), gain=0.1)

    @property
    def settings(self) -> dict[str, Any]:
        """What the file says of the training beside the settings of the loop."""
        return {
            "keep": self.keep,
            "loss": [TASK, REPAIR, SPARSITY],
            "heat": [FIRST_HEAT, LAST_HEAT],
            "drop": DROP,
            **self.sizes,
        }

    def facts(self, asked: Sequence[Exercise] | None) -> dict[str, Any]:
        """What the method reads beside the weights; shares are measured on questions, 1 without any."""
        shares = [1.0] * len(self.layers)
        if asked:
            with torch.no_grad():
                found = [
                    self._student(*batch_of(self.model, self.processor, [one]), None).shares for one in asked
                ]
            shares = torch.cat(found).mean(dim=0).tolist()
        return {"layers": self.layers, "repairs": self.repairs, "heads": self.heads, "shares": shares}

    def rivals(self, keep: int | None) -> dict[str, str]:
        """Methods without a training that spend as much."""
        return {"pyramiddrop": f"pyramiddrop@{keep}", "fastv": f"fastv@{keep}", "random": f"random@{keep}"}

    def loss(self, asked: list[Exercise], progress: float) -> Tensor:
        """The loss of a batch of questions; ``progress`` runs from 0 to 1."""
        inputs, labels = batch_of(self.model, self.processor, asked)
        with torch.no_grad():
            teacher = self._rows(inputs, labels)
        heat = _Heat(
            FIRST_HEAT + (LAST_HEAT - FIRST_HEAT) * min(1.0, progress / COOL), noisy=progress < QUIET
        )
        made = self._student(inputs, labels, heat)
        task = answer_loss(made.logits, labels)
        # from all tokens to the goal, as half a cosine over the first RISE of the steps
        goal = self.keep / made.count
        target = goal + (1 - goal) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress / RISE)))
        sparsity = sparsity_loss(made.shares, self.layers, self.depth, target)
        repair = repair_loss(made.rows, teacher)
        return TASK * task + REPAIR * repair + SPARSITY * sparsity

    def _rows(self, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """(layers, R, D) of the dense model at the output of the repair layers, rows that answer."""
        found: dict[int, Tensor] = {}
        answering = rows_that_answer(labels)

        def keep_rows(index: int, module: Any, args: tuple, output: Any) -> None:
            # older transformers return a tuple from a layer
            found[index] = (output[0] if isinstance(output, tuple) else output)[answering].float()

        handles = [
            self.language_model.layers[layer].register_forward_hook(partial(keep_rows, layer))
            for layer, _ in self.repairs
        ]
        try:
            self.model(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[layer] for layer, _ in self.repairs])

    def _student(self, inputs: dict[str, Any], labels: Tensor, heat: _Heat | None) -> _Made:
        """A pass with pruners and repairs; ``heat`` None: hard choices."""
        visual, _ = visual_of(self.adapter, inputs["input_ids"], self.keep)
        # every layer from the first cut on is watched: what left must stay away from all of them
        run = _Pass(self, visual, inputs["attention_mask"].bool(), labels, heat)
        handles: list[Any] = []
        try:
            for index in range(self.layers[0], self.depth):
                layer = self.language_model.layers[index]
                handles.append(layer.register_forward_pre_hook(partial(run.enters, index), with_kwargs=True))
                handles.append(tap(layer, index, self.method, partial(run.attends, index)))
            for index, source in self.repairs:
                layer = self.language_model.layers[index]
                handles.append(layer.register_forward_hook(partial(run.leaves, index, source)))
            logits = self.model(**inputs, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return _Made(logits, torch.stack(run.rows), torch.stack(run.shares, dim=1), run.count)


@dataclass(frozen=True)
class _Heat:
    """How soft a choice is in training."""

    value: float
    noisy: bool


@dataclass(frozen=True, eq=False)
class _Made:
    """What a pass gives: logits (B, L, V), rows (layers, R, D) that answer, shares (B, cuts), N."""

    logits: Tensor
    rows: Tensor
    shares: Tensor
    count: int


@dataclass(eq=False)
class _Pass:
    """One forward with pruners and repairs.

    Args:
        visual, valid: (B, L) bool, columns of the picture, and of tokens.
        labels: (B, L), of the answers.
    """

    training: RCPTraining
    visual: Tensor
    valid: Tensor
    labels: Tensor
    heat: _Heat | None
    shares: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    contexts: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hidden = torch.empty(0)  # (B, L, D) what entered the layer that runs
        self.count = int(self.visual[0].sum())
        self.c = torch.ones(len(self.visual), self.count, device=self.visual.device)
        self.question = question_columns(self.visual, self.valid, self.labels)
        self.weights = self.training.tensors()

    def enters(self, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.hidden = args[0] if args else kwargs["hidden_states"]

    def attends(self, index: int, call: AttentionCall, output: Tensor) -> Tensor:
        """The output (B, L, H, d) of a layer's attention without what left."""
        batch, length = self.visual.shape
        rows = torch.arange(length, device=output.device).expand(batch, -1)
        with self.training.exactly():
            A = self._masked(call.attention(rows).float())  # (B, H, L, L)
            if index in self.training.layers:
                self._prune(index, A)
                A = self._masked(A)
            return call.weigh(A).to(output.dtype)

    def _masked(self, A: Tensor) -> Tensor:
        """(B, H, L, L) attention without what left."""
        # (B, L), 1 for text
        columns = torch.ones(A.shape[0], A.shape[3], device=A.device).masked_scatter(self.visual, self.c)
        A = A * columns[:, None, None]
        return A / (A.sum(dim=-1, keepdim=True) + 1e-8)

    def _prune(self, index: int, A: Tensor) -> None:
        batch, hidden = len(self.visual), self.hidden
        states = hidden[self.visual].view(batch, self.count, -1).float()
        norm = attention_norm(self.training.language_model.layers[index])
        # what attention reads, where ``states`` are what entered the layer
        V = norm(hidden)[self.visual].view(batch, self.count, -1).float()
        # (B, 1, L, 1), rows of the question
        asking = self.question[:, None, :, None]
        mean = torch.where(asking, A, 0.0).sum(dim=2).mean(dim=1) / self.question.sum(dim=1, keepdim=True)
        a = mean[self.visual].view(batch, self.count)  # (B, N)
        alive = self.c.detach() > 0.5
        w = part_of(self.weights, f"pruner.{index}.")
        # a hard choice is that of the method, which drops nothing
        drop = DROP if self.heat is not None and self.training.module.training else 0.0
        Q = hidden.float()
        logits = pruner_scores(w, self.training.heads, V, a, alive, Q, self.question, drop).logits
        # a product, so that a token that left never comes back
        self.c = self.c * self._kept(logits, alive)
        left = self.c.detach() > 0.5
        context = part_of(self.weights, "context.")
        self.contexts[index] = mask_embedding(context, self.c) + dropped_embedding(
            context, states, alive & ~left
        )
        self.shares.append(self.c.mean(dim=1))

    def _kept(self, logits: Tensor, alive: Tensor) -> Tensor:
        """(B, N) 1 or 0, with the gradient of a soft choice in training; the best token always stays."""
        best = logits.detach().masked_fill(~alive, -torch.inf).argmax(dim=1, keepdim=True)
        if self.heat is None:
            return (logits > 0).float().scatter(1, best, 1.0)
        noise = torch.zeros_like(logits)
        if self.heat.noisy:
            u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            # logistic noise, the difference of two Gumbel variables
            noise = u.log() - (-u).log1p()
        y = torch.sigmoid((logits + noise) / self.heat.value)
        hard = (y > 0.5).float().scatter(1, best, 1.0)
        # the value of hard, the gradient of y
        return hard + y - y.detach()

    def leaves(self, index: int, source: int, module: Any, args: tuple, output: Any) -> Any:
        """The output of a repair layer with the rows that answer repaired."""
        hidden = output[0] if isinstance(output, tuple) else output
        answering = rows_that_answer(self.labels)
        w = part_of(self.weights, f"repair.{index}.")
        with self.training.exactly():
            fixed = repaired(w, hidden.float(), self.contexts[source])
        self.rows.append(fixed[answering])
        hidden = torch.where(answering[..., None], fixed.to(hidden.dtype), hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
