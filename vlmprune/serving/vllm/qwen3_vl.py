# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL in vLLM: DeepStack, and clips with the time of every frame in front of it.

How many tokens of a frame stay is known only when the clip was encoded, and so is where the words between
frames stand. In a pruned clip these words are given placeholders too, and their embeddings ride among the
rows of the clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl as base
from vllm.model_executor.models import qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..request import Request
from .context import in_context
from .mrope import grid_extent, split_places, with_places
from .qwen_vl import Keywords, OfQwen, PrunedQwen


class Qwen3VLProcessor(OfQwen, base.Qwen3VLMultiModalProcessor):
    """The processor of Qwen3-VL that promises fewer placeholders for images and clips."""

    @property
    def breaks(self) -> bool:
        return True


class PrunedQwen3(PrunedQwen):
    """Mixed in before the models that read pictures and clips as Qwen3-VL does.

    Features of early layers, which stand behind every row, follow the choice.
    """

    def spans(self, feature: Any, input_tokens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        if feature.modality != "video":
            yield from super().spans(feature, input_tokens)
            return
        at, grid = feature.mm_position, feature.data["video_grid_thw"].data.tolist()
        runs = _runs(input_tokens[at.offset : at.offset + at.length], self.config.video_token_id)
        extent = self._extent(grid)
        if len(runs) < grid[0]:  # a pruned clip of several frames is one run, words among its rows
            texts = self._texts(grid[0], feature.data["timestamps"].data)
            ((start, count),) = runs
            yield at.offset + start, count, grid[0] * extent + sum(map(len, texts))
            return
        for start, count in runs:
            yield at.offset + start, count, extent

    def _factor(self, seconds: float | None) -> float:
        return 1.0  # the times of frames are words

    def _extent(self, grid: Sequence[int]) -> int:
        """Positions that a frame takes."""
        return grid_extent(1, *self._merged(grid)[1:])

    def _texts(self, frames: int, timestamps: Any) -> list[list[int]]:
        """Words between frames, (frames - 1) lists of tokens, as the processor writes them."""
        config = self.config
        clip = base.Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[1] * frames,
            timestamps=timestamps,
            tokenizer=self._tokenizer,
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
        )
        apart = [
            list(run) for pad, run in groupby(clip.full, lambda one: one == config.video_token_id) if not pad
        ]
        # what stands before the first frame and behind the last is text of the prompt
        return apart[1:-1]

    def _reduced(self, words: Keywords, kwargs: dict[str, Any], request: Request | None) -> list[Tensor]:
        rows = super()._reduced(words, kwargs, request)
        if words.name != "video":
            return rows
        whole = request is None or request.budget is None
        return [
            self._clip(one, grid, None if whole else self._texts(grid[0], kwargs["timestamps"][number]))
            for number, (one, grid) in enumerate(zip(rows, kwargs["video_grid_thw"].tolist(), strict=True))
        ]

    def _clip(self, found: Tensor, grid: Sequence[int], texts: list[list[int]] | None) -> Tensor:
        """The rows of a clip, with the ``texts`` between its frames; None: of one that stays whole."""
        # (k, D), (k, 3): frame, row and column
        rows, places = split_places(found)
        frames = places[:, 0].clone()
        places[:, 0] = 0
        if texts is None:
            # every frame is a run of its own, which starts where its picture does
            return with_places(rows, places)
        device, extent = rows.device, self._extent(grid)
        lengths = [len(text) for text in texts]
        # (frames,) where each of them starts, counted from the first
        starts = torch.tensor(
            list(accumulate(lengths, lambda at, n: at + extent + n, initial=0)), device=device
        )
        places = places + starts[frames, None]
        # (n,) of all words: the frame that they follow, and their position
        counts = torch.tensor(lengths, dtype=torch.int64, device=device)
        behind = torch.arange(len(texts), device=device).repeat_interleave(counts)
        nth = torch.cat([torch.arange(n, device=device) for n in [0, *lengths]])
        spoken = self._embedded([token for text in texts for token in text], rows)
        order = torch.cat([2 * frames, 2 * behind + 1]).argsort(stable=True)
        said = (starts[behind] + extent + nth)[:, None].expand(-1, 3)
        return with_places(torch.cat([rows, spoken])[order], torch.cat([places, said])[order])

    def _embedded(self, tokens: list[int], rows: Tensor) -> Tensor:
        """(n, D) of words, with nothing of DeepStack, like ``rows``."""
        found = rows.new_zeros(len(tokens), rows.shape[1])
        ids = torch.tensor(tokens, dtype=torch.int64, device=rows.device)
        found[:, : self.width] = self.language_model.embed_input_ids(ids).to(rows)
        return found


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=in_context(base.Qwen3VLProcessingInfo),
    dummy_inputs=base.Qwen3VLDummyInputsBuilder,
)
class Qwen3VLForConditionalGeneration(PrunedQwen3, base.Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=in_context(qwen3_vl_moe.Qwen3VLMoeProcessingInfo),
    dummy_inputs=base.Qwen3VLDummyInputsBuilder,
)
class Qwen3VLMoeForConditionalGeneration(PrunedQwen3, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """The same with experts in the decoder."""


def _runs(tokens: Sequence[int], token: int) -> list[tuple[int, int]]:
    """(start, length) of every run of one token."""
    runs, at = [], 0
    for value, run in groupby(tokens):
        length = len(list(run))
        if value == token:
            runs.append((at, length))
        at += length
    return runs
