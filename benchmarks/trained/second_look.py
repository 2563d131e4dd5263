# SPDX-License-Identifier: Apache-2.0
"""What a second look (`vlmprune.refine`, CARVE) is worth on the questions of configs/trained.yaml:

    python benchmarks/trained/second_look.py [SPEC ...]

Questions with one picture and one turn alone: a second look adds a picture of its own. Rows go to
benchmarks/results/second_look.json, from which `python benchmarks/tables.py` takes them; a spec that is there
is not asked again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import vlmprune
from vlmprune.evaluation.leaderboard.config import load
from vlmprune.evaluation.tasks.shapes import shapes

ROOT = Path(__file__).parents[2]
OUT = ROOT / "benchmarks" / "results" / "second_look.json"
SPECS = ("dense", "fastervlm@36")


@dataclass(frozen=True)
class Looked:
    """Shares of right answers, before and after the second look."""

    spec: str
    questions: int
    first: float
    second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="*", help=f"{', '.join(SPECS)} by default")
    specs = parser.parse_args().specs or SPECS
    torch.set_num_threads(1)
    rows = [Looked(**row) for row in json.loads(OUT.read_text())] if OUT.is_file() else []
    for spec in specs:
        if spec not in [row.spec for row in rows]:
            rows.append(looked(spec))
            print(rows[-1], flush=True)
            OUT.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def looked(spec: str) -> Looked:
    """Ask every question under a spec, twice."""
    model, processor = vlmprune.load("tiny")
    task, limit = shapes(), load(ROOT / "configs" / "trained.yaml").limit
    asked = [one for one in task.samples("test", limit) if len(one.images) == 1 and not one.history]
    first = second = 0.0
    with vlmprune.prune(model, spec):
        for one in asked:
            (picture,) = one.load_images()
            found = vlmprune.refine(model, processor, picture, one.question, max_new_tokens=8)
            first += task.score(one, found.first)
            second += task.score(one, found.answer)
    return Looked(spec, len(asked), first / len(asked), second / len(asked))


if __name__ == "__main__":
    main()
