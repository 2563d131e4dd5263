# SPDX-License-Identifier: Apache-2.0
"""Proof that pruning happened: counts per spec, in the log of the workers and as Prometheus counters.

Pictures are cut in workers, but metrics are asked for where requests are read. A fallback is rare, so that
each worker leaves its counts in a file of a folder that the environment names, and the reader adds them up.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
from collections import Counter as Sums
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .names import FALLBACKS_VARIABLE

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
        # 0 has a digit too, but the first picture is to be logged
        digits = len(str(counts.pictures)) if counts.pictures else 0
        counts.pictures += 1
        counts.dense += dense
        counts.kept += kept
        counts.fallbacks += fallback
        if len(str(counts.pictures)) > digits:
            log.info("vlmprune: %s", self.line(spec))

    def publish(self) -> None:
        """Leave the fallbacks of this process where a reader of metrics finds them."""
        folder = os.environ.get(FALLBACKS_VARIABLE)
        if not folder:
            return
        counts = {spec: one.fallbacks for spec, one in self.by_spec.items() if one.fallbacks}
        # a file per process: nobody writes into that of another
        file = Path(folder, f"{os.getpid()}.json")
        fresh = file.with_suffix(".new")
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.write_text(json.dumps(counts), encoding="utf-8")
            fresh.replace(file)  # at once: a reader never finds half of it
        # said while pictures are encoded, where an error would end the server, and the log has each of them
        except OSError as error:
            log.error("vlmprune: %s cannot be written, and /metrics lacks fallbacks: %s", file, error)

    def line(self, spec: str) -> str:
        """``fastervlm@64: 1,000 pictures, 576 -> 64 tokens each, 0 cut by uniform instead``."""
        counts = self.by_spec[spec]
        each = f"{counts.dense / counts.pictures:.6g} -> {counts.kept / counts.pictures:.6g} tokens each"
        pictures = f"{counts.pictures:,} picture" + "s" * (counts.pictures > 1)
        return f"{spec}: {pictures}, {each}, {counts.fallbacks} cut by uniform instead"


TALLY = Tally()


def published() -> dict[str, int]:
    """Fallbacks by spec of all processes of this server on this machine."""
    folder, sums = os.environ.get(FALLBACKS_VARIABLE), Sums[str]()
    for file in Path(folder).glob("*.json") if folder else ():
        # adds up, where a dict would replace
        sums.update(json.loads(file.read_text(encoding="utf-8")))
    return dict(sums)


class FallbackCollector:
    """Gives what was published to Prometheus whenever metrics are asked for."""

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(
            "vlmprune_fallbacks", "Pictures that were cut by uniform instead, by spec.", labels=["spec"]
        )
        for spec, count in sorted(published().items()):
            family.add_metric([spec], count)
        yield family


# once per process: Prometheus refuses a name that it has already
@cache
def _counters() -> tuple[Any, Any, Any]:
    from prometheus_client import REGISTRY, Counter

    REGISTRY.register(FallbackCollector())
    if folder := os.environ.get(FALLBACKS_VARIABLE):
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return (
        Counter("vlmprune_pictures", "Pictures that requests brought, by spec.", ["spec"]),
        Counter("vlmprune_dense_tokens", "Visual tokens of these pictures without pruning.", ["spec"]),
        Counter("vlmprune_kept_tokens", "Visual tokens that the language model reads for them.", ["spec"]),
    )


# labels in use, ``OTHERS`` among them once there are too many specs
_labels: set[str] = set()


def count_requested(spec: str, dense: int, kept: int) -> None:
    """Count one image or clip of a request where requests are read, which is where an engine is asked for
    metrics; those that are cached count as well.
    """
    label = spec if spec in _labels or len(_labels) < _MOST_LABELS else OTHERS
    _labels.add(label)
    for counter, value in zip(_counters(), (1, dense, kept), strict=True):
        counter.labels(spec=label).inc(value)
