# SPDX-License-Identifier: Apache-2.0
"""Train a natural model: ``python benchmarks/natural/train.py RUN_FOLDER``; run it again to resume."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # PYTHONSAFEPATH leaves the folder of a script out
sys.path.append(str(HERE.parent / "tiny"))  # its runs.py: optimisers, schedules, checkpoints

import data  # noqa: E402
import qwen  # noqa: E402
import stages  # noqa: E402
import vision  # noqa: E402
from data import Pool  # noqa: E402
from model import Natural  # noqa: E402
from runs import Run  # noqa: E402

from vlmprune.evaluation.tasks.scenes.dataset import SIZES  # noqa: E402


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
    ARCHITECTURES[recipe.get("architecture", "llava")](recipe, run)


def llava(recipe: Mapping[str, Any], run: Run) -> None:
    pools = recipe["data"]
    pool = data.make(pools["seed"], pools["pictures"], run.folder / "train.npz")
    dev = data.make(pools["dev_seed"], pools["dev_pictures"], run.folder / "dev.npz")
    net = Natural(recipe["seed"])
    for train in (vision.train, stages.text, stages.align, stages.joint):
        train(recipe, run, net, [pool], [dev])


def qwen2_vl(recipe: Mapping[str, Any], run: Run) -> None:
    """Its decoder learns text as that of the other architecture does: a ``text.pt`` of such a run may be put
    into the folder.
    """
    pools = of_sizes(run.folder, recipe["data"], "")
    dev = of_sizes(run.folder, recipe["data"], "dev_")
    reader = Natural(recipe["seed"])
    stages.text(recipe, run, reader, pools, dev)
    net = qwen.NaturalQwen(recipe["seed"])
    net.read_text_as(reader.decoder.state_dict())
    for train in (vision.train, stages.align, stages.joint):
        train(recipe, run, net, pools, dev)


def of_sizes(folder: Path, options: Mapping[str, int], kind: str) -> list[Pool]:
    """Pools of each size, each of other scenes."""
    seed, count = options[f"{kind}seed"], options[f"{kind}pictures"] // len(SIZES)
    return [
        data.make(seed + 10 * i, count, folder / f"{kind}{size[0]}x{size[1]}.npz", size, qwen.TOKEN)
        for i, size in enumerate(SIZES)
    ]


ARCHITECTURES = {"llava": llava, "qwen2_vl": qwen2_vl}


if __name__ == "__main__":
    main()
