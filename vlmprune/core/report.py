# SPDX-License-Identifier: Apache-2.0
"""Report: what really happened in a forward; counts are realised, never announced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .keepmap import KeepMap

Grids = tuple[tuple[int, int], ...]


@dataclass(eq=False, repr=False)
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
        decode_steps: forwards of a single token after the prompt, in the thread that read it: none without a
            cache, and fewer than tokens where drafts are read several at a time.
        note: why nothing was pruned, where that is so ("no images in this call", "disabled"), or what else
            has to be known of the model.
        kept: (k,) patches of every image that stay, None for all; -1 for rows that stand for no single patch.
        grids: blocks that ``kept`` counts in, per image.
        joins: by the number of an image, of merging methods that say it: gives (N,) or (N, J) int64, for each
            patch the rows that it became part of, as in ``KeepMap.joins``.
        frames: whether the blocks of an image are frames of a clip.
        views: how boxes lie on the original picture, per image.
        left: (N,) what the model's own compression left, of all patches in ``grids``, per image; None: all.
            ``kept`` and ``joins`` count in it.
        encoded_tokens: visual tokens per image as the encoder made them: more than ``dense_tokens``, from
            which budgets count, where a compression of the model itself left fewer.
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
    left: list[Tensor | None] = field(default_factory=list, repr=False)
    encoded_tokens: list[int] = field(default_factory=list)

    @cached_property
    def keep(self) -> list[KeepMap]:
        """One KeepMap per image, one per frame of a clip; expanded beams are listed once.

        Made when first read: on an accelerator that waits for the choice.
        """
        maps: list[KeepMap] = []
        for number, grids in enumerate(self.grids):
            # not known: a row of tokens in reading order
            grids = grids or ((1, self.dense_tokens[number]),)
            count = sum(rows * cols for rows, cols in grids)
            index, left = self.kept[number], self.left[number] if self.left else None
            keep_idx = torch.arange(count if left is None else len(left)) if index is None else index.cpu()
            keep_idx = keep_idx[keep_idx >= 0].sort().values
            ask = self.joins.get(number)
            joins = None if ask is None else ask().cpu()
            if left is not None:
                keep_idx, joins = left[keep_idx], _among_all(joins, left, count)
            told: dict[str, Any] = {"method": self.method, "view": self.views[number], "index": number}
            if not self.frames[number]:
                maps.append(KeepMap(keep_idx, count, grids, joins=joins, left=left, **told))
                continue
            start = 0
            for frame, (rows, cols) in enumerate(grids):
                end = start + rows * cols
                part = None if joins is None else joins[start:end]
                rest = None if left is None else _between(left, start, end)
                own: dict[str, Any] = {"joins": part, "frame": frame, "left": rest}
                maps.append(
                    KeepMap(_between(keep_idx, start, end), rows * cols, ((rows, cols),), **own, **told)
                )
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

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy holds: joins are asked for first, since functions cannot be written."""
        asked = {number: partial(_told, joins().cpu()) for number, joins in self.joins.items()}
        return {**self.__dict__, "joins": asked}

    def fire(self, hook: str) -> None:
        self.firings[hook] = self.firings.get(hook, 0) + 1

    def __repr__(self) -> str:
        return f"Report({self})"

    def _repr_html_(self) -> str:
        from ..viz.notebook import facts

        layers = [f"{tokens:g}" for tokens in self.tokens_per_layer]
        own = self._compressed()
        rows = {
            "visual tokens of each image": f"{self.realised_tokens} of {self.dense_tokens}{own}",
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
        counts = f"{realised} of {dense} visual tokens{self._compressed()}"
        return f"{self.method}: {counts} in {images}, {choosing}{detail}"

    def _compressed(self) -> str:
        """What the model itself had dropped before, as a part of a sentence; "" where it drops nothing."""
        encoded = sum(self.encoded_tokens)
        return (
            "" if encoded in (0, sum(self.dense_tokens)) else f" (the model itself left these of {encoded})"
        )


def _told(joins: Tensor) -> Tensor:
    """Joins that were asked for already."""
    return joins


def _between(index: Tensor, start: int, end: int) -> Tensor:
    """(k,) those of ``index`` from ``start`` to ``end - 1``, counted from ``start``."""
    return index[(index >= start) & (index < end)] - start


def _among_all(joins: Tensor | None, left: Tensor, count: int) -> Tensor | None:
    """(N,) or (N, J) joins of the patches ``left`` (n,), as joins of all ``count`` patches."""
    if joins is None:
        return None
    whole = torch.full((count, *joins.shape[1:]), -1)
    whole[left] = torch.where(joins < 0, joins, left[joins.clamp_min(0)])
    return whole
