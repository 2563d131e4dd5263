# SPDX-License-Identifier: Apache-2.0
"""M-RoPE: tokens that stay keep their row and column, which are known only when a picture was encoded.

vLLM makes positions when a request arrives. Every placeholder is given the position at which its picture
starts; what a token adds to it rides behind its embedding, as six more columns, and is added in the forward.
So nothing is asked of vLLM's runner. Its own channel for pruned clips is not used: it is dead on CPUs, loses
its place when a chunk ends before a picture, and puts the text behind a tall picture at its width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UnsupportedError

COLUMNS = 6  # (t, h, w), two digits each
BASE = 256  # half precision holds integers up to it exactly

Model: Any = nn.Module if TYPE_CHECKING else object  # the family's class comes behind the mixin


def with_places(rows: Tensor, places: Tensor) -> Tensor:
    """(k, D + 6): rows (k, D) with what they add to the position of their picture, (k, 3) integers."""
    # (k, 6), the high digits of t, h and w in front
    digits = torch.cat([places // BASE, places % BASE], dim=1)
    return torch.cat([rows, digits.to(rows)], dim=1)


def split_places(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (k, D) and places (k, 3) of ``with_places``."""
    high, low = rows[:, -COLUMNS:].long().chunk(2, dim=1)
    return rows[:, :-COLUMNS], high * BASE + low


def grid_places(frames: int, rows: int, cols: int, factor: float = 1.0) -> Tensor:
    """(frames * rows * cols, 3) what every token adds: its moment, row and column."""
    # (3, frames, rows, cols) -> (n, 3)
    places = torch.from_numpy(np.indices((frames, rows, cols)).reshape(3, -1).T.copy())
    if factor != 1.0:
        places[:, 0] = (places[:, 0] * factor).long()
    return places


def grid_extent(frames: int, rows: int, cols: int, factor: float = 1.0) -> int:
    """Positions that a picture or clip takes: text behind it starts so much after it."""
    return max(int((frames - 1) * factor) + 1, rows, cols)


def refuse_shared_positions(config: Any) -> None:
    """Refuse what hands positions on without the forward of the whole model."""
    parallel, multimodal = config.parallel_config, config.model_config.get_multimodal_config()
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "micro-batches (enable_dbo)": getattr(parallel, "enable_dbo", False),
        "speculative decoding": config.speculative_config is not None,
        "mm_encoder_tp_mode='data'": multimodal.mm_encoder_tp_mode == "data",
        "vLLM's own video_pruning_rate": bool(multimodal.video_pruning_rate),
    }
    for name, asked in refused.items():
        if asked:
            raise UnsupportedError(
                f"{name} cannot be combined with pruning in models with M-RoPE; start without it"
            )


class MRopePlaces(Model):
    """Mixed in before a model with M-RoPE whose ``embed_multimodal`` gives rows ``with_places``."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_shared_positions(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        most = vllm_config.scheduler_config.max_num_batched_tokens
        # it stays where it is: CUDA graphs read it at the address that they were captured with
        self.places = torch.zeros(most, 3, dtype=torch.int64)
        self.placed = 0  # rows of it that may differ from zero

    def spans(self, feature: Any, input_tokens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Per picture of an item: offset and number of its placeholders, and the positions that it takes."""
        raise NotImplementedError

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """(3, L) where the picture of a placeholder starts, and text where it stands in the whole prompt."""
        positions = np.empty(len(input_tokens), dtype=np.int64)
        # columns that have their position, and the position that comes next
        done = at = 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            for offset, count, extent in self.spans(feature, input_tokens):
                # text in front of the picture
                positions[done:offset] = np.arange(offset - done) + at
                at += offset - done
                # all tokens of a picture stand at its start; the forward adds their places
                positions[offset : offset + count] = at
                # text goes on behind the whole picture, however little of it stayed
                at += extent
                done = offset + count
        positions[done:] = np.arange(len(input_tokens) - done) + at
        at += len(input_tokens) - done
        # the second says what generated tokens add to their place in the shorter prompt
        return torch.from_numpy(positions).expand(3, -1).contiguous(), at - len(input_tokens)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        # those of the step before
        self.places[: self.placed] = 0
        self.placed = 0
        if multimodal_embeddings is None or not len(multimodal_embeddings) or is_multimodal is None:
            return super().embed_input_ids(input_ids, is_multimodal=is_multimodal)
        split = [split_places(one) for one in multimodal_embeddings]
        self._make_room(len(input_ids))
        self.placed = len(input_ids)
        mask = is_multimodal.to(self.places.device, non_blocking=True)
        # no index of the mask: the host would wait for its count
        self.places[: self.placed].masked_scatter_(mask[:, None], torch.cat([place for _, place in split]))
        return super().embed_input_ids(input_ids, [rows for rows, _ in split], is_multimodal=is_multimodal)

    def _make_room(self, count: int) -> None:
        if count > len(self.places):
            self.places = self.places.new_zeros(count, 3)

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._make_room(positions.shape[-1])
        # (3, L); the places of text are zero
        return super().forward(input_ids, positions + self.places[: positions.shape[-1]].T, *args, **kwargs)
