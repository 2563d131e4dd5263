# SPDX-License-Identifier: Apache-2.0
"""The table of what every method asks of a device: launches, waits and uploads beyond a dense run.

``vlmprune bench --count`` prints it; ``kernels/device_counts.csv`` holds it, and a test compares the two, so
that no change makes pruning slower on a GPU unseen, on machines without one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from pathlib import Path

from ..api import prune
from ..checks import check_cuts
from ..errors import SpecError, UnsupportedError
from ..spec import parse
from .conformance import default_spec, generate, report_of
from .device import Counts, Phase, count
from .tiny import tiny_inputs, tiny_model

FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl")
ALSO = {"zooprune": ("zooprune(estimator=zo)",)}  # the paper's own form, whose default here is another one
BATCHES = {"one": (1,), "ragged": (1, 2, 0, 1)}  # images per row


@dataclass(frozen=True)
class CountRow:
    """One line of the table; ``batch`` is "one" prompt, or a "ragged" batch of four."""

    family: str
    spec: str
    batch: str
    phase: str
    launches: int
    waits: int
    uploads: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the numbers are of."""
        return self.family, self.spec, self.batch, self.phase


@lru_cache(maxsize=8)
def _counted(family: str, batch: str, spec: str | None) -> dict[Phase, Counts]:
    inputs = tiny_inputs(family, images=BATCHES[batch])
    return count(lambda: tiny_model(family), inputs, spec)


def count_rows(
    methods: Iterable[str], families: Sequence[str] = FAMILIES, batches: Sequence[str] = tuple(BATCHES)
) -> Iterator[CountRow]:
    """Rows of methods, by name or spec, on families; what a family does not support has none."""
    for family in families:
        for spec in [default_spec(one) for name in methods for one in (name, *ALSO.get(name, ()))]:
            for batch in batches:
                # from the cache for all methods but the first
                dense = _counted(family, batch, None)
                try:
                    require_cut(family, batch, spec)
                    found = _counted(family, batch, spec)
                except UnsupportedError:
                    continue
                for phase, counts in found.items():
                    more = counts.minus(dense[phase])
                    yield CountRow(family, spec, batch, phase, more.launches, more.waits, more.uploads)


def require_cut(family: str, batch: str, spec: str) -> None:
    """Refuse a budget in tokens that leaves all pictures of a batch whole: nothing could be counted."""
    budgets = [plan.budget for plan in parse(spec).build()]
    if not any(isinstance(budget.keep, int) for budget in budgets if budget is not None):
        return
    model, inputs = tiny_model(family), tiny_inputs(family, images=BATCHES[batch])
    with prune(model, spec) as run:
        generate(model, inputs, max_new_tokens=1)
    report = report_of(run)
    what, instead = f"the tiny {family}", "time a larger model without --count"
    check_cuts(spec, report.dense_tokens, report.realised_tokens, what, instead)


def write(rows: Iterable[CountRow], path: Path) -> None:
    """The table as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([one.name for one in fields(CountRow)])
        writer.writerows(astuple(row) for row in rows)


def read(path: Path) -> list[CountRow]:
    """The rows of a CSV that ``write`` wrote."""
    names = [one.name for one in fields(CountRow)]
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file)
        if lines.fieldnames != names:
            raise SpecError(f"{path} has the columns {lines.fieldnames}; expected {names}")
        return [
            CountRow(
                line["family"],
                line["spec"],
                line["batch"],
                line["phase"],
                int(line["launches"]),
                int(line["waits"]),
                int(line["uploads"]),
            )
            for line in lines
        ]
