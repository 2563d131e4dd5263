# SPDX-License-Identifier: Apache-2.0
"""Proof that pruning happened: counts per spec, in the log of the workers and as Prometheus counters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

log = logging.getLogger(__name__)
_MOST_LABELS = 64  # clients choose specs: a server must not hold a counter for every one of them
OTHERS = "others"


@dataclass
class SpecCounts:
    """What one spec did in this process."""

    pictures: int = 0
    dense: int = 0
    kept: int = 0
    fallbacks: int = 0


@dataclass
class Tally:
    """SpecCounts of the pictures that this process cut, logged whenever their number has one more digit."""

    by_spec: dict[str, SpecCounts] = field(default_factory=dict)

    def add(self, spec: str, dense: int, kept: int, fallback: bool) -> None:
        """One picture of ``dense`` tokens of which ``kept`` stay."""
        spec = spec if spec in self.by_spec or len(self.by_spec) < _MOST_LABELS else OTHERS
        counts = self.by_spec.setdefault(spec, SpecCounts())
        digits = len(str(counts.pictures)) if counts.pictures else 0
        counts.pictures += 1
        counts.dense += dense
        counts.kept += kept
        counts.fallbacks += fallback
        if len(str(counts.pictures)) > digits:
            log.info("vlmprune: %s", self.line(spec))

    def line(self, spec: str) -> str:
        """``fastervlm@64: 1,000 pictures, 576 -> 64 tokens each, 0 cut by uniform instead``."""
        counts = self.by_spec[spec]
        each = f"{counts.dense / counts.pictures:.6g} -> {counts.kept / counts.pictures:.6g} tokens each"
        pictures = f"{counts.pictures:,} picture" + "s" * (counts.pictures > 1)
        return f"{spec}: {pictures}, {each}, {counts.fallbacks} cut by uniform instead"


TALLY = Tally()


@cache
def _counters() -> tuple[Any, Any, Any]:
    from prometheus_client import Counter

    return (
        Counter("vlmprune_pictures", "Pictures that requests brought, by spec.", ["spec"]),
        Counter("vlmprune_dense_tokens", "Visual tokens of these pictures without pruning.", ["spec"]),
        Counter("vlmprune_kept_tokens", "Visual tokens that the language model reads for them.", ["spec"]),
    )


_labels: set[str] = set()


def count_requested(spec: str, dense: Sequence[int], kept: Sequence[int]) -> None:
    """Count the pictures of one request where requests are read, which is where an engine is asked for
    metrics; cached pictures count as well.
    """
    label = spec if spec in _labels or len(_labels) < _MOST_LABELS else OTHERS
    _labels.add(label)
    for counter, value in zip(_counters(), (len(dense), sum(dense), sum(kept)), strict=True):
        counter.labels(spec=label).inc(value)
