# SPDX-License-Identifier: Apache-2.0
"""Train the weights that the package ships for its model "tiny", one method after the other.

    python benchmarks/trained/train.py RUN [METHOD ...]
    python benchmarks/trained/train.py RUN [METHOD ...] --ship

Each method has a folder in RUN; the same call goes on where an earlier one stopped. With ``--ship`` the two
files of each method go to vlmprune/assets/weights/tiny.
"""

from __future__ import annotations

import argparse
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

import vlmprune
from vlmprune.training.loop import Pace
from vlmprune.training.run import run

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "vlmprune" / "assets" / "weights" / "tiny"


def main() -> None:
    recipe: dict[str, Any] = yaml.safe_load((HERE / "recipe.yaml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(recipe)}; all by default")
    parser.add_argument("--ship", action="store_true", help="copy the files into the package")
    given = parser.parse_args()
    if unknown := sorted({*given.methods} - {*recipe}):
        parser.error(f"{', '.join(unknown)} in no recipe; expected some of {', '.join(recipe)}")
    torch.set_num_threads(1)
    model, processor = vlmprune.load("tiny")
    for method in given.methods or recipe:
        options = {**recipe[method]}
        pace = Pace(**options.pop("pace"))
        folder = given.folder / method
        facts = run(method, model, processor, "shapes", folder, settings=pace, note=tell, **options)
        print(f"{method}: {facts['dev']}; {seconds():.0f} CPU seconds so far", flush=True)
        if given.ship:
            OUT.mkdir(parents=True, exist_ok=True)
            for ending in ("safetensors", "json"):
                shutil.copy(folder / f"{method}.{ending}", OUT)


def tell(step: int, loss: float) -> None:
    """Every tenth step."""
    if step % 10 == 0:
        print(f"step {step}: loss {loss:.4f}, {seconds():.0f} CPU seconds", flush=True)


def seconds() -> float:
    """User and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
