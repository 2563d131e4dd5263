# SPDX-License-Identifier: Apache-2.0
"""A second architecture for the same recipe: Qwen2-VL's own classes, small. Its tower reads pictures of any
shape and has no [CLS], four patches are merged to a token, and tokens have rows and columns in the decoder.

The tower's image-level objective is the same caption, read off the mean of all patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from model import CAPTION, DENSE, EXACT, ROPE_THETA, TEXT, WORD, Grid, Trained
from torch import Tensor, nn

from vlmprune.evaluation.tasks.scenes.dataset import SIZES
from vlmprune.evaluation.tasks.scenes.vocabulary import WORDS
from vlmprune.evaluation.tasks.shapes.model import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    PAD,
    build_tokenizer,
)

VIDEO = "<video>"  # the classes want a word for clips; nothing is trained on it
ALL_WORDS = (*WORDS, VIDEO)
PATCH, MERGE = 6, 2  # pixels of a patch; patches along each side of a token
TOKEN = PATCH * MERGE
FRAMES = 2  # a picture is shown twice, as the released models do
VISION = {
    "depth": 4,
    "embed_dim": 96,
    "hidden_size": TEXT["hidden_size"],
    "num_heads": 3,
    "mlp_ratio": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES,
}
SECTIONS = [4, 6, 6]  # pairs of channels that turn by time, row and column: all 16 of a head


def build_model(seed: int) -> Any:
    """An untrained Qwen2VLForConditionalGeneration."""
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": SECTIONS}
    ends = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = transformers.Qwen2VLConfig(
        vision_config=VISION,
        text_config={
            **TEXT,
            **ends,
            "vocab_size": len(ALL_WORDS),
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": rope,
        },
        image_token_id=IMAGE,
        video_token_id=ALL_WORDS.index(VIDEO),
        # no words of their own stand round a picture: the one before it, and one that never comes
        vision_start_token_id=WORD["user:"],
        vision_end_token_id=PAD,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(**ends)
    return model


def build_image_processor() -> Any:
    """It leaves pictures of ``SIZES`` as they are; works without torchvision."""
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    areas = [height * width for height, width in SIZES]
    return kind(
        size={"shortest_edge": TOKEN**2, "longest_edge": max(areas)},  # areas, for all their names
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=FRAMES,
    )


def build_processor() -> Any:
    """Its Qwen2VLProcessor; transformers reads clips with torchvision alone, so that has to be installed."""
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": FRAMES}
    return transformers.Qwen2VLProcessor(
        image_processor=build_image_processor(),
        tokenizer=build_tokenizer(ALL_WORDS, image_token=WORDS[IMAGE], video_token=VIDEO),
        video_processor=transformers.Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def initialise(tower: Any) -> None:
    """First weights by the width that is read, as CLIP has them.

    With the 0.02 of large towers a narrow one is nearly linear at first, and 260 steps taught it no pattern.
    """
    for block in tower.blocks:
        for layer in (block.attn.qkv, block.mlp.fc1):
            layer.weight.normal_(0, layer.in_features**-0.5)
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.normal_(0, (2 * len(tower.blocks) * layer.in_features) ** -0.5)
    values = tower.patch_embed.proj.weight[0].numel()
    tower.patch_embed.proj.weight.normal_(0, values**-0.5)


class NaturalQwen(Trained):
    """Qwen2-VL: P tokens of a picture, each of MERGE x MERGE patches."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.qwen = build_model(seed)
        self.qwen.train()
        torch.manual_seed(seed)
        initialise(self.tower)
        width = VISION["embed_dim"]
        self.dense = nn.Linear(width * MERGE**2, sum(DENSE.values()) + sum(EXACT.values()))
        self.caption = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CAPTION))
        self.normalise(build_image_processor())

    @property
    def tower(self) -> Any:
        return self.qwen.model.visual

    @property
    def decoder(self) -> Any:
        return self.qwen.model.language_model

    @property
    def projector(self) -> Any:
        return self.tower.merger

    @property
    def taught(self) -> Sequence[nn.Module]:
        return self.tower.patch_embed, self.tower.blocks, self.dense, self.caption

    def packed(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(n, H, W, 3) uint8 -> patches (S, values) in the order of the processor, and their grids (n, 3)."""
        pixels = self.pixels(pictures)  # (n, 3, H, W)
        count, rows, cols = len(pixels), pixels.shape[2] // TOKEN, pixels.shape[3] // TOKEN
        cut = pixels.view(count, 3, rows, MERGE, PATCH, cols, MERGE, PATCH)
        # the patches of a token follow each other: n, row, column, row and column in it, then values
        patches = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, FRAMES, -1, -1)
        grids = torch.tensor([[1, rows * MERGE, cols * MERGE]]).expand(count, -1)
        return patches.reshape(count * rows * cols * MERGE**2, -1), grids

    def features(self, pictures: Tensor) -> Tensor:
        patches, grids = self.packed(pictures)
        hidden = self.tower(patches, grid_thw=grids).last_hidden_state  # (S, width) before the merger
        return hidden.view(len(pictures), -1, MERGE**2 * hidden.shape[-1])

    def project(self, features: Tensor) -> Tensor:
        single = features.reshape(-1, VISION["embed_dim"])
        return self.projector(single).view(*features.shape[:2], -1)

    def said(self, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.features(pictures)
        mean = features.unflatten(-1, (MERGE**2, -1)).mean((1, 2))  # (n, width)
        return self.dense(features), {"caption": self.caption(mean)}

    def places(self, grid: Grid, shown: Tensor) -> tuple[Tensor, Tensor]:
        # a token keeps its row and column, whatever else is shown; text goes on behind the longer side
        rows, cols = shown // grid[1], shown % grid[1]  # (B, n)
        inside = torch.stack([torch.zeros_like(shown), rows, cols]) + 2  # (3, B, n)
        words = torch.arange(2).expand(3, len(shown), -1)
        return torch.cat([words, inside], -1), torch.full((len(shown),), 2 + max(grid))

    def cls_rows(self, pictures: Tensor) -> Sequence[Tensor]:
        return ()

    def read_text_as(self, state: dict[str, Tensor]) -> None:
        """Take the decoder of a model that learnt text: there row and column are one number, so M-RoPE is the
        rotation that it knows. Biases, which it has not, stay 0; the word for clips stays as drawn.
        """
        own = self.decoder.state_dict()
        for name, value in state.items():
            own[name][: len(value)] = value
        self.decoder.load_state_dict(own)
