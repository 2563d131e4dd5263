# SPDX-License-Identifier: Apache-2.0
"""Write the second architecture of a run as a folder that ``vlmprune.load`` reads, with what was logged and
where its decoder looks: ``python benchmarks/natural/ship_qwen.py RUN_FOLDER OUT``. Needs torchvision.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tiny"))  # its shipping.py: what a card says

from properties import properties  # noqa: E402
from qwen import NaturalQwen, save  # noqa: E402
from shipping import by_stage, making  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--inside", type=int, default=120, help="Test questions whose attention is measured.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = making(options.folder)
    net = NaturalQwen(made["recipe"]["seed"])
    net.load_state_dict(torch.load(options.folder / "joint.pt", weights_only=True)["net"])
    save(net.qwen.eval(), options.out)
    found = {**made, "log": by_stage(made["log"]), "properties": properties(options.out, options.inside)}
    (options.out / "provenance.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
