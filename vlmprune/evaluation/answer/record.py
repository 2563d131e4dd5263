# SPDX-License-Identifier: Apache-2.0
"""Record: the answer of one model under one spec to one question, and what pruning really did meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...core.keepmap import KeepMap


@dataclass(frozen=True)
class Record:
    """One answer.

    Args:
        spec: canonical text of what was attached.
        id, cluster, family, group: of the sample.
        answer: decoded text, stripped; may be empty.
        score: what the task gives for it, 0 to 1.
        dense_tokens, realised_tokens: visual tokens of the sample's images, all of them and those that were
            read (after the last cut, for methods inside the language model).
        layer_tokens: visual tokens averaged over the decoder layers: what was really computed.
        firings: how often the hooks did their work in the call that answered this sample; 0 only without
            images.
        on_object: share of the kept tokens that lie on the object asked about; None where nothing is asked
            about, or was kept, or where tiles of an image are pictures of their own.
        positions: position ids after the cut, "compact" or "original".
        encoding: "shared" (images were encoded once for all specs), "each" (anew for this spec), or "none"
            (no images).
        seconds: shares of this sample in its batch, that is the batch's time / its rows: ``encode`` (tower
            and projector, once for all specs where shared), ``choosing``, ``first_token`` (without encoding
            where shared), ``total`` (likewise).
        batch: rows that were answered together.
        peak_memory: bytes on the accelerator while the batch was answered; None on the CPU.
        keep: one KeepMap per image, to draw or count what was kept; none where tiles of an image are pictures
            of their own.
    """

    spec: str
    id: str
    cluster: str
    family: str
    group: str
    answer: str
    score: float
    dense_tokens: int
    realised_tokens: int
    layer_tokens: float
    firings: int
    on_object: float | None
    positions: str
    encoding: str
    seconds: Mapping[str, float]
    batch: int = 1
    peak_memory: int | None = None
    keep: tuple[KeepMap, ...] = field(default=(), repr=False, compare=False)

    @property
    def empty(self) -> bool:
        """Whether the model said nothing."""
        return not self.answer

    def line(self, keep: bool = False) -> dict[str, Any]:
        """Plain values for a journal; ``keep`` adds the kept patches of each image, for drawing."""
        values = {name: value for name, value in vars(self).items() if name != "keep"}
        values["seconds"] = dict(self.seconds)
        return values | ({"keep": [_plain(one) for one in self.keep]} if keep else {})

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Record:
        """A record from what ``line`` gave; kept patches and other keys of a journal are ignored."""
        return cls(
            **{name: line[name] for name in cls.__dataclass_fields__ if name in line and name != "keep"}
        )


def _plain(kept: KeepMap) -> dict[str, Any]:
    values = {"keep_idx": kept.keep_idx.tolist(), "grids": kept.grids, "view": kept.view}
    return values if kept.merged is None else values | {"merged": kept.merged.nonzero()[:, 0].tolist()}
