# SPDX-License-Identifier: Apache-2.0
"""Write the model of a run as the files of the package: ``python benchmarks/tiny/ship.py RUN_FOLDER OUT
[--stage polish]``.

Weights are stored in half precision and load in float32, as config.json says; what is measured is what comes
back from disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # PYTHONSAFEPATH leaves the folder of a script out

from card import card, provenance  # noqa: E402
from evaluate import report  # noqa: E402
from files import seal, write  # noqa: E402
from joint import Joint  # noqa: E402

from vlmprune.evaluation.tasks.shapes.model import ROPE_THETA, build_processor  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", default="polish")
    parser.add_argument("--limit", type=int, help="Test questions to score; default all.")
    options = parser.parse_args()
    net = Joint(yaml.safe_load((HERE / "recipe.yaml").read_text())["seed"])
    net.load_state_dict(torch.load(options.folder / f"{options.stage}.pt", weights_only=True)["net"])
    write(net.export(), build_processor(), options.out, ROPE_THETA)
    measured = {
        split: report(options.out, split, options.limit if split == "test" else None)
        for split in ("dev", "test")
    }
    notes = (
        (options.folder / "notes.txt").read_text().splitlines()
        if (options.folder / "notes.txt").exists()
        else []
    )
    found = provenance(options.folder, HERE / "recipe.yaml", measured, notes)
    (options.out / "provenance.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "card.md").write_text(card(found, (HERE / "card_template.md").read_text()))
    seal(options.out)


if __name__ == "__main__":
    main()
