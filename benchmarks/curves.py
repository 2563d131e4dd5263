# SPDX-License-Identifier: Apache-2.0
"""Accuracy curves of all registered methods on the model and the benchmark that ship with the package.

    python benchmarks/curves.py --limit 2000 --out benchmarks/results/curves_tiny.json --plot docs/curves.png

Every method at 100, 50, 25, 12.5 and 6.25 % of the tokens, random with several seeds, answers from greedy
decoding, each image encoded once. Keeping all tokens is the dense model for every method, so 100 % is one
run. Intervals (95 %) are over images. Points have two places on the abscissa: the budget as
announced, and the visual tokens that a decoder layer reads on average: methods that cut inside the language
model read everything before they cut.

``--journal`` keeps every answer, one per line; a run that was killed goes on from there. ``--replot`` draws a
result again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmprune.errors import EvaluationError, VlmPruneError
from vlmprune.evaluation.answer.evaluate import evaluate
from vlmprune.evaluation.answer.record import Record
from vlmprune.evaluation.report.curve_plot import draw_curves
from vlmprune.evaluation.stats.curves import KEEPS, Curves, curves, plan
from vlmprune.evaluation.stats.saliency import saliency
from vlmprune.evaluation.tasks.registry import get_task
from vlmprune.evaluation.tasks.sample import Sample
from vlmprune.evaluation.tasks.shapes.render import mask
from vlmprune.models.loading import load
from vlmprune.speed.conditions import conditions, system_load


class Journal:
    """Every answer as a line of a file; the first line says what for."""

    def __init__(self, path: Path | None, stamp: dict[str, Any]) -> None:
        self.path, self.stamp = path, stamp
        self.held: dict[tuple[str, str], Record] = {}

    def __enter__(self) -> Journal:
        path = self.path or Path(os.devnull)
        data = path.read_bytes() if self.path and path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a killed run leaves half a line
        head, *lines = whole.decode().splitlines() or [json.dumps(self.stamp)]
        if json.loads(head) != self.stamp:
            raise EvaluationError(
                f"{self.path} holds {head}, this run is {json.dumps(self.stamp)}; name another file"
            )
        self.held = {
            (record.spec, record.id): record for record in (Record.read(json.loads(line)) for line in lines)
        }
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        self.file = path.open("a", encoding="utf-8")  # what stands there is never written again
        if not whole:
            self.file.write(head + "\n")
        return self

    def add(self, record: Record) -> None:
        if (record.spec, record.id) not in self.held:
            self.file.write(json.dumps(record.line()) + "\n")
        self.held[record.spec, record.id] = record

    def __exit__(self, *error: object) -> None:
        self.file.close()


def answer(
    bundle: tuple[Any, Any],
    task: Any,
    samples: Sequence[Sample],
    specs: list[str],
    options: argparse.Namespace,
) -> list[Record]:
    """All records, those of an earlier run from the journal."""
    stamp = {"task": task.fingerprint, "weights": fingerprint(bundle[0]), "positions": options.positions}
    with Journal(options.journal, stamp) as journal:
        missing = [
            sample for sample in samples if any((spec, sample.id) not in journal.held for spec in specs)
        ]
        started, rows = time.perf_counter(), options.batch_size * len(specs)
        run = evaluate(
            *bundle, missing, specs, task, batch_size=options.batch_size, positions=options.positions
        )
        for number, record in enumerate(run, 1):
            journal.add(record)
            if number % rows == 0:
                rate = number / (time.perf_counter() - started)
                left = (len(missing) * len(specs) - number) / rate
                done = f"{number // len(specs)} of {len(missing)} questions"
                print(f"{done}, {rate:.0f} answers/s, {left:.0f} s left", file=sys.stderr)
        return [journal.held[spec, sample.id] for spec in specs for sample in samples]


def fingerprint(model: Any) -> str:
    """Of the weights, as loaded."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def all_objects(sample: Any) -> list[Any]:
    """Masks of everything that the images of a sample show."""
    return [mask(tuple(scene.things)) for scene in sample.scenes]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    bundle = load(options.model)
    task = get_task("shapes")
    samples = task.samples("test", options.limit)
    points, skipped = plan(bundle[0], options.keeps, range(options.seeds), options.methods)
    specs = [spec for point in points for spec in point.specs]
    start = conditions()
    began = time.perf_counter()
    records = answer(bundle, task, samples, specs, options)
    spent = time.perf_counter() - began
    shown = samples[: options.saliency]
    found = {
        "model": {"name": options.model, "weights": fingerprint(bundle[0])},
        "task": {
            "name": task.name,
            "fingerprint": task.fingerprint,
            "split": "test",
            "blind": dict(task.blind),
        },
        "saliency": {
            "all objects": saliency(*bundle, shown, all_objects),
            "object asked about": saliency(*bundle, shown, lambda sample: sample.object_masks()),
        },
        "skipped": skipped,
    }
    timing = {
        "seconds": spent,
        "answers": len(records),
        "threads": torch.get_num_threads(),
        "batch_size": options.batch_size,
    }
    command = "python benchmarks/curves.py " + " ".join(sys.argv[1:])
    provenance = start | {"command": command, "load_after": system_load(), **timing}
    return found | {"provenance": provenance} | curves(records, points, task.blind).plain()


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="the model of the package, or a folder")
    parser.add_argument("--limit", type=int, default=2000, help="test questions, balanced over the families")
    parser.add_argument(
        "--saliency", type=int, default=500, help="questions whose images the [CLS] attention is looked at on"
    )
    parser.add_argument(
        "--methods", nargs="+", help="default: all that are registered; random must be among them"
    )
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    parser.add_argument("--seeds", type=int, default=5, help="of methods that are random")
    parser.add_argument(
        "--positions", choices=["compact", "original"], help="default: as each method declares"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--journal", type=Path, help="file to keep every answer in, and to go on from")
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--plot", type=Path, help="picture of the result")
    parser.add_argument("--replot", type=Path, help="draw this result and measure nothing")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = parse_arguments(words)
    torch.set_num_threads(options.threads)
    try:
        result = json.loads(options.replot.read_text()) if options.replot else measure(options)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        if options.plot:
            found = Curves.read(result, str(options.replot or "the result"))
            draw_curves(found, f"{result['model']['name']} on {result['task']['name']}", options.plot)
    except VlmPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in result["rows"]:
        value, low, high = row["accuracies"]["all"]["all"]
        print(
            f"{row['spec']:34} {value:.3f} [{low:.3f}, {high:.3f}]  reads {row['layer_share']:.1%} of the "
            "tokens per layer"
        )
    print(json.dumps(result["at"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
