# SPDX-License-Identifier: Apache-2.0
"""Training of TextMonkey's block: the kept tokens learn to take in what the filter drops.

The filter chooses, the block changes the rows that stay, and the frozen language model reads the shorter
sequence, as it will when the method is used. The loss is

    cross entropy of the answers + 0.5 KL to the answers of the dense model,

and the number that stays is drawn in each step from half the budget, the budget, and twice it, so that one
file serves several. W_2 starts at zero: before the first step the block is the filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.select import top_k
from ..errors import SpecError
from ..methods.textmonkey import SHAPES, largest_cosine, resampled
from .data import Exercise, answer_loss, batch_of, rows_that_answer, visual_of
from .frozen import OfFrozen

TEACHER = 0.5  # weight of the divergence from the dense model


class ResamplerTraining(OfFrozen):
    """What the loop trains for TextMonkey.

    Args:
        model, processor: the model, which stays frozen.
        keep: r, visual tokens of a picture.
        width: of the block and of its attention; None: 1024, or half the width of a small model.
        seed: of the first weights.
    """

    method = "textmonkey"

    def __init__(self, model: Any, processor: Any, keep: int, width: int | None, seed: int) -> None:
        super().__init__(model, processor, seed)
        self.keep, self.width = keep, min(1024, self.wide // 2) if width is None else width
        self.heads = 8 if self.width >= 512 else 4
        if self.width % self.heads:
            raise SpecError(
                f"width={self.width}; expected a multiple of {self.heads}, the heads of the block"
            )
        sizes = {"D": self.wide, "m": self.width, "a": self.width, "2a": 2 * self.width, "i": self.width}
        self.module = self.parameters((name, _first(name, axes, sizes)) for name, axes in SHAPES.items())

    @property
    def keeps(self) -> list[int]:
        """Numbers of tokens that are trained."""
        return [max(1, self.keep // 2), self.keep, 2 * self.keep]

    @property
    def settings(self) -> dict[str, Any]:
        """What the file says of the training beside the settings of the loop."""
        return {"keep": self.keep, "keeps": self.keeps, "width": self.width, "teacher": TEACHER}

    def facts(self, asked: Sequence[Exercise] | None) -> dict[str, Any]:
        """What the method reads beside the weights."""
        return {"heads": self.heads}

    def rivals(self, keep: int | None) -> dict[str, str]:
        """The filter alone, and methods without a training at the same budget."""
        names = {"filter": "textmonkey", "uniform": "uniform", "divprune": "divprune"}
        return {name: f"{method}@{keep}" for name, method in names.items()}

    def loss(self, asked: list[Exercise], progress: float) -> Tensor:
        """The loss of a batch of questions."""
        inputs, labels = batch_of(self.model, self.processor, asked)
        visual, count = visual_of(self.adapter, inputs["input_ids"], self.keep)  # (B, L)
        keep = self.keep
        if self.module.training:
            # never empty: visual_of asks for more than keep tokens
            fitting = [one for one in self.keeps if one < count]
            keep = fitting[int(torch.randint(len(fitting), ()))]
        with torch.no_grad():
            teacher = self.model(**inputs, use_cache=False).logits[rows_that_answer(labels)]  # (R, V)
        logits, labels = self.student(inputs, labels, visual, keep)
        own = logits[rows_that_answer(labels)].float().log_softmax(dim=-1)
        apart = F.kl_div(own, teacher.float().log_softmax(dim=-1), log_target=True, reduction="batchmean")
        return answer_loss(logits, labels) + TEACHER * apart

    def student(
        self, inputs: dict[str, Any], labels: Tensor, visual: Tensor, keep: int
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, l, V) and labels (B, l) of the shorter sequence, ``keep`` tokens of each picture."""
        found: list[Tensor] = []

        def shorter(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            embeds = kwargs["inputs_embeds"]  # (B, L, D)
            batch, width = embeds.shape[0], embeds.shape[2]
            x = embeds[visual].view(batch, -1, width).float()
            with self.exactly():
                kept = top_k(-largest_cosine(x, "later"), keep)  # (B, keep)
                own = x.gather(1, kept[..., None].expand(-1, -1, width))
                # the rows that stay read all tokens, the dropped ones too
                rows = resampled(x, own, self.tensors(), self.heads).to(embeds.dtype)
            chosen = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, kept, True)
            # (B, L), text and the tokens that stay
            stays = (~visual).masked_scatter(visual, chosen)
            found.append(stays)
            # (B, l, 1), where a visual token stands in the shorter sequence
            left = visual[stays].view(batch, -1, 1)
            embeds = embeds[stays].view(batch, -1, width).masked_scatter(left, rows)
            mask = kwargs["attention_mask"][stays].view(batch, -1)
            # counted anew, as the method does; padding is on the right and is not read
            places = torch.arange(mask.shape[1], device=mask.device)[None]
            return args, {**kwargs, "inputs_embeds": embeds, "attention_mask": mask, "position_ids": places}

        hook = self.language_model.register_forward_pre_hook(shorter, with_kwargs=True)
        try:
            logits = self.model(**inputs, use_cache=False).logits
        finally:
            hook.remove()
        # labels lose the same columns
        return logits, labels[found[0]].view(len(labels), -1)


def _first(name: str, axes: tuple[str, ...], sizes: dict[str, int]) -> Tensor:
    """A tensor as it starts."""
    shape = [int(axis) if axis.isdigit() else sizes[axis] for axis in axes]
    # the block adds nothing at first: see W_2 above
    if name == "mlp_out.weight" or name.endswith("bias"):
        return torch.zeros(shape)
    if name == "scale" or "norm" in name:
        return torch.ones(shape)
    return nn.init.xavier_uniform_(torch.empty(shape))
