# SPDX-License-Identifier: Apache-2.0
"""Train the natural model: ``python benchmarks/natural/train.py RUN_FOLDER``; run it again to resume."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import yaml

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tiny"))  # its runs.py: optimisers, schedules, checkpoints

import data  # noqa: E402
import stages  # noqa: E402
import vision  # noqa: E402
from model import Natural  # noqa: E402
from runs import Run  # noqa: E402

STAGES = (vision.train, stages.text, stages.align, stages.joint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="Checkpoints, pictures and the log; kept between calls.")
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.yaml")
    parser.add_argument("--seed", type=int, help="Instead of the recipe's: other first weights and batches.")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe, run = yaml.safe_load(options.recipe.read_text()), Run(options.folder)
    if options.seed is not None:
        recipe["seed"] = options.seed
    # what is written about the model later must be of the recipe that it was trained with
    (options.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    pools = recipe["data"]
    pool = data.make(pools["seed"], pools["pictures"], options.folder / "train.npz")
    dev = data.make(pools["dev_seed"], pools["dev_pictures"], options.folder / "dev.npz")
    net = Natural(recipe["seed"])
    for train in STAGES:
        train(recipe, run, net, pool, dev)


if __name__ == "__main__":
    main()
