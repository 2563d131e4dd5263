# SPDX-License-Identifier: Apache-2.0
"""Train the video model: ``python benchmarks/video/train.py RUN_FOLDER``; run it again to resume."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # PYTHONSAFEPATH leaves the folder of a script out
sys.path.append(str(HERE.parent / "tiny"))  # its runs.py and decoder.py: optimisers, checkpoints, rotation

import pool as clips  # noqa: E402
import stage  # noqa: E402
from runs import Run  # noqa: E402

import vlmprune  # noqa: E402
from vlmprune.evaluation.tasks.shapes.model import ROPE_THETA, TEXT, VISION, build_llava  # noqa: E402
from vlmprune.evaluation.tasks.shapes.scene import CANVAS  # noqa: E402


def start(seed: int) -> Any:
    """The image model of the package, with four more words."""
    tiny, _ = vlmprune.load("tiny")
    made = build_llava(VISION, TEXT, tuple(clips.WORD), CANVAS, CANVAS // clips.GRID, ROPE_THETA, seed)
    state, own = tiny.state_dict(), made.state_dict()
    for name, value in state.items():
        own[name][: len(value)] = value  # words are rows of the table; the new ones come last
    made.load_state_dict(own)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="Checkpoints, clips and the log; kept between calls.")
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.yaml")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe, run = yaml.safe_load(options.recipe.read_text()), Run(options.folder)
    # what is written about the model later must be of the recipe that it was trained with
    (options.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    tiny, data = vlmprune.load("tiny"), recipe["data"]
    pool = clips.make(data["seed"], data["clips"], data["shares"], options.folder / "train", *tiny)
    dev = clips.make(data["dev_seed"], data["dev_clips"], data["dev_shares"], options.folder / "dev", *tiny)
    stage.train(recipe, run, start(recipe["seed"]), pool, dev)


if __name__ == "__main__":
    main()
