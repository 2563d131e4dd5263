# SPDX-License-Identifier: Apache-2.0
"""The natural model, untrained: real LLaVA classes with a [CLS] tower, and what training adds to them.

The stages ask a model only for what ``Trained`` lists, so that ``qwen.py`` can be another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmprune.evaluation.tasks.scenes.scene import CANVAS
from vlmprune.evaluation.tasks.scenes.vocabulary import COLORS, PATTERNS, PLACES, SIDES, WORDS
from vlmprune.evaluation.tasks.shapes.model import build_llava, build_processor

Grid = tuple[int, int]  # rows and columns of patches
PATCH = 8
GRID = CANVAS // PATCH
PATCHES = GRID * GRID
ROPE_THETA = 1e4
WORD = {word: i for i, word in enumerate(WORDS)}
VISION = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 3}
TEXT = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
FEATURES = 4  # blocks of the tower that the projector reads behind: all but the last
EARLY = 3  # decoder layers that learn from text alone and never change again
# heads that a patch is trained with: what is round it (soft), the place, its row and column
DENSE = {"color": len(COLORS) + 1, "pattern": len(PATTERNS) + 1, "side": len(SIDES) + 1}
EXACT = {"place": len(PLACES), "row": GRID, "column": GRID}
CAPTION = len(COLORS) * len(PATTERNS) + len(PLACES)


def processor() -> Any:
    return build_processor(WORDS, CANVAS, PATCH)


class Trained(nn.Module):
    """A model to ship, with throw-away heads for the vision stage; P patches of a picture become P tokens.

    Attributes:
        decoder, projector: parts of the model. taught: what the vision stage teaches.
        dense: head that says what a patch of ``features`` has seen.
    """

    decoder: Any
    projector: nn.Module
    taught: Sequence[nn.Module]
    dense: nn.Module

    def normalise(self, images: Any) -> None:
        """Take the mean and the deviation of colours from an image processor."""
        self.register_buffer("mean", torch.tensor(images.image_mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(images.image_std).view(3, 1, 1) * 255, persistent=False)

    def pixels(self, pictures: Tensor) -> Tensor:
        """(n, H, W, 3) uint8 -> (n, 3, H, W)."""
        return (pictures.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def features(self, pictures: Tensor) -> Tensor:
        """(n, H, W, 3) uint8 -> (n, P, F): what the projector reads of each patch."""
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """(n, P, F) -> (n, P, D)."""
        raise NotImplementedError

    def said(self, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(n, P, classes) of every patch, and (n, CAPTION) of the whole picture, by the name of its loss."""
        raise NotImplementedError

    def places(self, grid: Grid, shown: Tensor) -> tuple[Tensor, Tensor]:
        """As ``data.Places`` says."""
        raise NotImplementedError

    def cls_rows(self, pictures: Tensor) -> Sequence[Tensor]:
        """(n, P) of every block: attention of [CLS], mean over heads; none without [CLS]."""
        raise NotImplementedError


class Natural(Trained):
    """LLaVA with a CLIP tower."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.llava = build_llava(VISION, TEXT, WORDS, CANVAS, PATCH, ROPE_THETA, seed)
        self.llava.train()
        torch.manual_seed(seed)
        width = VISION["hidden_size"]
        self.dense = nn.Linear(width, sum(DENSE.values()) + sum(EXACT.values()))
        self.caption, self.early_caption = nn.Linear(width, CAPTION), nn.Linear(width, CAPTION)
        self.normalise(processor().image_processor)

    @property
    def tower(self) -> Any:
        tower = self.llava.model.vision_tower
        return getattr(tower, "vision_model", tower)

    @property
    def decoder(self) -> Any:
        return self.llava.model.language_model

    @property
    def projector(self) -> Any:
        return self.llava.model.multi_modal_projector

    @property
    def taught(self) -> Sequence[nn.Module]:
        return self.tower, self.dense, self.caption, self.early_caption

    def see(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """(n, H, W, 3) uint8 -> hidden states (n, 1 + PATCHES, D): the input of every block, then the last
        output.
        """
        hidden = [self.tower.pre_layrnorm(self.tower.embeddings(self.pixels(pictures)))]
        for block in self.tower.encoder.layers:
            out = block(hidden[-1], attention_mask=None)
            hidden.append(out[0] if isinstance(out, tuple) else out)
        return tuple(hidden)

    def features(self, pictures: Tensor) -> Tensor:
        return self.see(pictures)[FEATURES][:, 1:]

    def project(self, features: Tensor) -> Tensor:
        return self.projector(features)

    def said(self, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.see(pictures)
        late = self.caption(self.tower.post_layernorm(hidden[-1][:, 0]))
        early = self.early_caption(hidden[FEATURES][:, 0])
        return self.dense(hidden[FEATURES][:, 1:]), {"caption": late, "early": early}

    def places(self, grid: Grid, shown: Tensor) -> tuple[Tensor, Tensor]:
        # one after the other, however many are shown
        width = 2 + shown.shape[1]
        return torch.arange(width).expand(len(shown), -1), torch.full((len(shown),), width)

    def cls_rows(self, pictures: Tensor) -> Sequence[Tensor]:
        return list(cls_rows(self.tower, self.see(pictures)))


@torch.no_grad()
def cls_rows(tower: Any, hidden: tuple[Tensor, ...]) -> Tensor:
    """Attention of [CLS] to the patches, mean over heads, of every block (blocks, n, PATCHES)."""
    rows = []
    for block, entering in zip(tower.encoder.layers, hidden, strict=False):
        attention, x = block.self_attn, block.layer_norm1(entering)
        q = attention.q_proj(x[:, :1]).unflatten(-1, (attention.num_heads, -1))  # (n, 1, H, d)
        k = attention.k_proj(x).unflatten(-1, (attention.num_heads, -1))
        logits = torch.einsum("nqhd,nkhd->nhk", q, k).float() / q.shape[-1] ** 0.5
        rows.append(logits.softmax(-1)[..., 1:].mean(1))
    return torch.stack(rows)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative; .5 where there are none."""
    n, ranks = positive.sum(), scores.argsort().argsort() + 1
    if n in (0, len(scores)):
        return 0.5
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))
