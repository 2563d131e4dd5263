# SPDX-License-Identifier: Apache-2.0
"""Report: what really happened in a forward; counts are realised, never announced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .keepmap import KeepMap

Grids = tuple[tuple[int, int], ...]


@dataclass(repr=False)
class Report:
    """The last forward that read images or began a prompt; decode steps that continue it are counted in
    ``decode_steps``.

    Args:
        method: spec of what was attached.
        dense_tokens: visual tokens per image (or clip) without pruning, newline and [CLS] slots not counted.
        realised_tokens: visual tokens per image that the language model read.
        layer_tokens: visual tokens of every image in each decoder layer.
        sequence: (dense, realised) padded length of the sequence that the decoder layers read.
        firings: how often each hook did its work in this forward: encode, enter, stage, exit.
        seconds: host seconds in score, select and place; on an accelerator launches only, not their
            completion.
        decode_steps: tokens that were decoded after the prompt.
        note: why nothing was pruned, where that is so ("no images in this call", "disabled"), or what else
            has to be known of the model.
        kept: (k,) patches of every image that stay, None for all; -1 for rows that stand for no single patch.
        grids: blocks that ``kept`` counts in, per image.
        joins: by the number of an image, of merging methods that say it: gives (N,) or (N, J) int64, for each
            patch the rows that it became part of, as in ``KeepMap.joins``.
        frames: whether the blocks of an image are frames of a clip.
        views: how boxes lie on the original picture, per image.
    """

    method: str
    dense_tokens: list[int] = field(default_factory=list)
    realised_tokens: list[int] = field(default_factory=list)
    layer_tokens: list[list[int]] = field(default_factory=list)
    sequence: tuple[int, int] = (0, 0)
    firings: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    decode_steps: int = 0
    note: str = ""
    kept: list[Tensor | None] = field(default_factory=list, repr=False)
    grids: list[Grids] = field(default_factory=list, repr=False)
    joins: dict[int, Callable[[], Tensor]] = field(default_factory=dict, repr=False)
    frames: list[bool] = field(default_factory=list, repr=False)
    views: list[str] = field(default_factory=list, repr=False)

    @cached_property
    def keep(self) -> list[KeepMap]:
        """One KeepMap per image, one per frame of a clip; expanded beams are listed once.

        Made when first read: on an accelerator that waits for the choice.
        """
        maps: list[KeepMap] = []
        for number, grids in enumerate(self.grids):
            grids = grids or ((1, self.dense_tokens[number]),)  # not known: a row of tokens in reading order
            count = sum(rows * cols for rows, cols in grids)
            index = self.kept[number]
            keep_idx = torch.arange(count) if index is None else index.cpu()
            keep_idx = keep_idx[keep_idx >= 0].sort().values
            ask = self.joins.get(number)
            joins = None if ask is None else ask().cpu()
            told: dict[str, Any] = {"method": self.method, "view": self.views[number], "index": number}
            if not self.frames[number]:
                maps.append(KeepMap(keep_idx, count, grids, joins=joins, **told))
                continue
            start = 0
            for frame, (rows, cols) in enumerate(grids):
                end = start + rows * cols
                here = keep_idx[(keep_idx >= start) & (keep_idx < end)] - start
                part = None if joins is None else joins[start:end]
                maps.append(KeepMap(here, rows * cols, ((rows, cols),), joins=part, frame=frame, **told))
                start = end
        return maps

    @property
    def tokens_per_layer(self) -> list[float]:
        """Mean visual tokens per image in each decoder layer."""
        return [sum(layer) / len(layer) for layer in zip(*self.layer_tokens, strict=True)]

    @property
    def pruned(self) -> bool:
        """Whether any visual token was removed."""
        return self.realised_tokens != self.dense_tokens

    def fire(self, hook: str) -> None:
        self.firings[hook] = self.firings.get(hook, 0) + 1

    def __repr__(self) -> str:
        return f"Report({self})"

    def _repr_html_(self) -> str:
        from ..viz.notebook import facts

        layers = [f"{tokens:g}" for tokens in self.tokens_per_layer]
        rows = {
            "visual tokens of each image": f"{self.realised_tokens} of {self.dense_tokens}",
            "visual tokens in each layer": ", ".join(layers) or "-",
            "sequence": f"{self.sequence[1]} of {self.sequence[0]}",
            "decode steps": self.decode_steps,
            "hooks fired": ", ".join(f"{name} {times}" for name, times in self.firings.items()) or "-",
        }
        return facts(str(self), rows)

    def __str__(self) -> str:
        dense, realised = sum(self.dense_tokens), sum(self.realised_tokens)
        images = f"{len(self.dense_tokens)} image{'' if len(self.dense_tokens) == 1 else 's'}"
        detail = f" ({self.note})" if self.note else ""
        choosing = f"{self.seconds * 1e3:.1f} ms to choose"
        return f"{self.method}: {realised} of {dense} visual tokens in {images}, {choosing}{detail}"
