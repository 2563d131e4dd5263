# SPDX-License-Identifier: Apache-2.0
"""Write the model of a run as the files of the package, with what was measured on them:
``python benchmarks/video/ship.py RUN_FOLDER OUT``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # PYTHONSAFEPATH leaves the folder of a script out
sys.path.append(str(HERE.parent / "tiny"))  # files.py: what transformers reads; shipping.py: what a card says

from files import write  # noqa: E402
from pool import WORD  # noqa: E402
from shipping import finish, making, table, told  # noqa: E402
from train import start  # noqa: E402

import vlmprune  # noqa: E402
from vlmprune.evaluation.answer.evaluate import evaluate  # noqa: E402
from vlmprune.evaluation.stats.estimates import Table, accuracy, by  # noqa: E402
from vlmprune.evaluation.tasks.clips import clips  # noqa: E402
from vlmprune.evaluation.tasks.shapes.model import ROPE_THETA, build_processor  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=140, help="Test questions.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = making(options.folder)
    model = start(made["recipe"]["seed"])
    model.load_state_dict(torch.load(options.folder / "decoder.pt", weights_only=True)["net"])
    write(model, build_processor(tuple(WORD)), options.out, ROPE_THETA)
    found = {
        **made,
        "fingerprint": clips().fingerprint,
        "questions": options.limit,
        "blind": dict(clips().blind),
        "measured": {
            "image model": measured("tiny", options.limit),
            "video model": measured(str(options.out), options.limit),
        },
    }
    finish(options.out, found, card(found))


def measured(name: str, limit: int) -> dict[str, Any]:
    """Right answers to the first test questions with all tokens of all frames."""
    model, processor = vlmprune.load(name)
    task = clips()
    samples = task.samples("test", limit)
    table = Table.of(evaluate(model, processor, samples, ["dense"], task, batch_size=8, max_new_tokens=4))
    value = accuracy(table)["dense"]
    families = by(table, "families", "dense")
    return {"accuracy": value.value, "ci": [value.low, value.high], "families": families}


def card(found: dict[str, Any]) -> str:
    """Fill the template: every figure comes from the provenance."""
    image, video = (found["measured"][f"{kind} model"] for kind in ("image", "video"))
    rows = [
        (family, f"{blind:.3f}", f"{image['families'][family]:.3f}", f"{video['families'][family]:.3f}")
        for family, blind in found["blind"].items()
    ]
    mean = sum(found["blind"].values()) / len(rows)
    rows.append(("mean", f"{mean:.3f}", f"{image['accuracy']:.3f}", f"{video['accuracy']:.3f}"))
    names = list(found["log"][0]["dev"])
    curve = [
        (str(row["step"]), str(row["cpu_seconds"]), *(f"{row['dev'][name]:.3f}" for name in names))
        for row in found["log"]
    ]
    return (
        (HERE / "card_template.md")
        .read_text()
        .format(
            families=table(("family", "blind", "image model", "this model"), rows),
            curve=table(("step", "CPU s", *names), curve),
            questions=found["questions"],
            low=f"{video['ci'][0]:.3f}",
            high=f"{video['ci'][1]:.3f}",
            fingerprint=found["fingerprint"],
            clips=found["recipe"]["data"]["clips"],
            steps=found["recipe"]["decoder"]["steps"],
            few=found["recipe"]["decoder"]["fewest"],
            most=found["recipe"]["decoder"]["most"],
            every=found["recipe"]["decoder"]["dense_every"],
            cpu=found["log"][-1]["cpu_seconds"],
            **told(found),
        )
    )


if __name__ == "__main__":
    main()
