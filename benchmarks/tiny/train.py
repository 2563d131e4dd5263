# SPDX-License-Identifier: Apache-2.0
"""Train the small model of the package: ``python benchmarks/tiny/train.py RUN_FOLDER [stage ...]``; run it
again to resume.

Several processes share a stage under ``torchrun --nproc-per-node 2 benchmarks/tiny/train.py ...``: gradients
are averaged.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import yaml
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves the folder of a script out

from packs import Store
from runs import Run

STAGES = ("language", "vision", "align", "joint", "polish")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Checkpoints, data and the log; kept between calls.")
    parser.add_argument(
        "stages", nargs="*", default=list(STAGES), help=f"Any of {', '.join(STAGES)}; default all."
    )
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    recipe, run = yaml.safe_load(arguments.recipe.read_text()), Run(arguments.folder)
    store, dev = (Store(arguments.folder / name) for name in ("data", "dev"))
    for stage in arguments.stages:
        if stage == "language":
            import language

            language.train(recipe, run, store, dev)
        if stage == "vision":
            import vision

            vision.train(recipe, run, store, dev)
        if stage in ("joint", "polish"):
            import joint

            joint.train(recipe, run, store, dev, stage)
        if stage == "align":
            import joint

            joint.align(recipe, run, store, dev)


if __name__ == "__main__":
    main()
