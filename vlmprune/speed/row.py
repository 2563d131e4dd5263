# SPDX-License-Identifier: Apache-2.0
"""A row of the speed card, as ``speed.json`` holds it; what the numbers mean stands in ``card.py``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One spec of one model under stated conditions; times in seconds, medians over rounds.

    Args:
        p20, p80: 20th and 80th percentile of the times and ratios, by the name of the field.
        versus_dense, versus_dense_total: how many times sooner than with dense the first token and the whole
            answer are there.
        processor_s: from the picture to the inputs of the model, where a processor makes them; a smaller
            picture is made here too.
        versus_dense_picture: how many times sooner than with dense the first token is there, counted from the
            picture: processor, vision tower and language model.
        free_k_s: first token of the ideal baseline, the same model given only the kept tokens.
        versus_free_k: first token of this row divided by that of the ideal.
        ideal_versus_dense: speed-up of the ideal.
        tokens_per_layer: visual tokens that each decoder layer reads.
        logits_difference: largest between this row and the free side: they compute the same.
    """

    spec: str
    model: str
    batch: int
    answer_tokens: int
    text_tokens: int | None = None
    device: str
    dtype: str
    attention: str
    attention_tried_s: Mapping[str, float] = field(default_factory=dict)
    threads: int | None = None
    rounds: int | None = None
    answer_rounds: int | None = None
    note: str = ""
    processor_s: float | None = None
    choosing_s: float | None = None
    first_token_s: float
    total_s: float
    versus_dense: float | None = None
    versus_dense_total: float | None = None
    versus_dense_picture: float | None = None
    free_k_s: float | None = None
    versus_free_k: float | None = None
    ideal_versus_dense: float | None = None
    p20: Mapping[str, float] = field(default_factory=dict)
    p80: Mapping[str, float] = field(default_factory=dict)
    tokens_per_layer: tuple[float, ...] = ()
    flops: int | None = None
    peak_bytes: int | None = None
    logits_difference: float | None = None

    @property
    def method(self) -> str:
        """The name of the method, as in rows of a leaderboard."""
        return re.split("[(@]", self.spec, maxsplit=1)[0]

    @property
    def keep(self) -> None:
        """A card groups its rows by conditions, not by budget."""
        return None

    @property
    def conditions(self) -> tuple[object, ...]:
        """Rows that are equal in these can be compared."""
        return (*self._measured_with, self.attention)

    @property
    def case(self) -> tuple[object, ...]:
        """Of two rows that are equal in these, the newer one counts."""
        return (self.spec, *self._measured_with)

    @property
    def _measured_with(self) -> tuple[object, ...]:
        return (
            self.model,
            self.batch,
            self.answer_tokens,
            self.text_tokens,
            self.device,
            self.dtype,
            self.threads,
        )
