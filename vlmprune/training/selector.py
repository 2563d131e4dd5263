# SPDX-License-Identifier: Apache-2.0
"""Training of VisionSelector's scorer: a soft top-k of the visual tokens, end to end from the answers.

    m_i = sigmoid((s_i - c) / T), with c such that the m of a picture sum up to k

log m is added to the logits of each visual key in every layer: m = 1 is the dense model, m = 0 a cut. T falls
geometrically over the steps, in units of the spread of s, so that the soft choice becomes a hard one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.visionselector import importance
from .data import Exercise, answer_loss, batch_of, visual_of
from .frozen import OfFrozen

FIRST_HEAT, LAST_HEAT = 1.0, 0.05  # of the spread of the scores
_LEAST = 1e-6  # of m, whose logarithm must stay finite


class SelectorTraining(OfFrozen):
    """What the loop trains for VisionSelector.

    Args:
        model, processor: the model, which stays frozen.
        keep: k, visual tokens of a picture.
        width: h of the scorer; None: half the width of the model, as published.
        seed: of the first weights.
    """

    method = "visionselector"

    def __init__(self, model: Any, processor: Any, keep: int, width: int | None, seed: int) -> None:
        super().__init__(model, processor, seed)
        self.keep, self.width = keep, self.wide // 2 if width is None else width
        self.module = nn.ModuleDict(
            {name: nn.Linear(self.wide, self.width, device=model.device) for name in ("q_proj", "k_proj")}
        )
        for weight in self.module.parameters():
            nn.init.normal_(weight, std=1e-4)

    @property
    def settings(self) -> dict[str, Any]:
        """What the file says of the training beside the settings of the loop."""
        return {"keep": self.keep, "width": self.width, "heat": [FIRST_HEAT, LAST_HEAT]}

    def facts(self, asked: Sequence[Exercise] | None) -> dict[str, Any]:
        """Nothing: the weights say it all."""
        return {}

    def rivals(self, keep: int | None) -> dict[str, str]:
        """Methods without a training at the same budget."""
        return {"uniform": f"uniform@{keep}", "divprune": f"divprune@{keep}"}

    def loss(self, asked: list[Exercise], progress: float) -> Tensor:
        """Cross entropy of the answers under a soft top-k; ``progress`` runs from 0 to 1."""
        inputs, labels = batch_of(self.model, self.processor, asked)
        visual, count = visual_of(self.adapter, inputs["input_ids"], self.keep)  # (B, L)
        heat = FIRST_HEAT * (LAST_HEAT / FIRST_HEAT) ** progress

        def weighed(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            embeds = kwargs["inputs_embeds"]
            # rows of the mask have ``count`` tokens each, so that the flat result can be folded
            x = embeds[visual].view(len(embeds), count, -1).float()  # (B, N, D)
            with self.exactly():
                m = soft_top_k(importance(x, self.tensors()), self.keep, heat)
            bias = torch.zeros_like(visual, dtype=torch.float32).masked_scatter(
                visual, m.clamp_min(_LEAST).log()
            )
            # a 4-D mask is handed on as it is, where a 2-D one would be made anew
            mask = causal_with(bias, inputs["attention_mask"].bool()).to(embeds.dtype)
            return args, {**kwargs, "attention_mask": mask}

        hook = self.language_model.register_forward_pre_hook(weighed, with_kwargs=True)
        try:
            logits = self.model(**inputs, use_cache=False).logits
        finally:
            hook.remove()
        return answer_loss(logits, labels)


def soft_top_k(scores: Tensor, k: int, heat: float, steps: int = 50) -> Tensor:
    """(B, N) weights in (0, 1) of scores (B, N) that sum up to k per row; small heat makes them hard.

    The offset is found by bisection, and has the gradient that keeps the sum.
    """
    spread = scores.detach().std(dim=1, keepdim=True).clamp_min(1e-12)
    # mean and spread are constants to the gradient
    z = (scores - scores.detach().mean(dim=1, keepdim=True)) / (spread * heat)
    with torch.no_grad():
        # at these ends every sigmoid is as good as 1, or 0
        low, high = z.amin(dim=1, keepdim=True) - 30, z.amax(dim=1, keepdim=True) + 30
        for _ in range(steps):
            middle = (low + high) / 2
            too_many = torch.sigmoid(z - middle).sum(dim=1, keepdim=True) > k
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        offset = (low + high) / 2
        # derivative of the sigmoid; written so, it keeps small values that 1 - m would lose
        slope = torch.sigmoid(z - offset) * torch.sigmoid(offset - z)
        share = slope / slope.sum(dim=1, keepdim=True).clamp_min(1e-30)
    # the derivative of the offset by z is its share; its value is what was found
    moved = (share * (z - z.detach())).sum(dim=1, keepdim=True) + offset
    return torch.sigmoid(z - moved)


def causal_with(bias: Tensor, valid: Tensor) -> Tensor:
    """(B, 1, L, L) additive mask: causal, without padding (B, L), with ``bias`` (B, L) on the keys."""
    length = valid.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril() & valid[:, None, None]
    # rows of padding look at themselves, or they would be NaN
    seen = seen | torch.eye(length, dtype=torch.bool, device=valid.device)
    return bias[:, None, None].expand(-1, 1, length, -1).masked_fill(~seen, torch.finfo(torch.float32).min)
