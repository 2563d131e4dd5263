# SPDX-License-Identifier: Apache-2.0
"""Train the small model of the package: ``python benchmarks/tiny/train.py RUN_FOLDER [stage ...]``; run it again to resume."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml
from packs import Store
from runs import Run

STAGES = ("language", "vision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="Checkpoints, data and the log; kept between calls.")
    parser.add_argument("stages", nargs="*", default=list(STAGES), help=f"Any of {', '.join(STAGES)}; default all, in this order.")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe, run = yaml.safe_load(arguments.recipe.read_text()), Run(arguments.folder)
    store, dev = (Store(arguments.folder / name) for name in ("data", "dev"))
    for stage in arguments.stages:
        if stage == "language":
            import language

            language.train(recipe, run, store, dev)
        if stage == "vision":
            import vision

            vision.train(recipe, run, store, dev)


if __name__ == "__main__":
    main()
