# SPDX-License-Identifier: Apache-2.0
"""Write the model of a run as the files of the package: ``python benchmarks/tiny/ship.py RUN_FOLDER OUT
[--stage polish]``.

Weights are stored in half precision and load in float32, as config.json says; what is measured is what comes
back from disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from card import card, provenance
from evaluate import report
from joint import Joint
from safetensors.torch import save_file

from vlmprune.evaluation.tasks.shapes.model import ROPE_THETA, build_processor
from vlmprune.models.tiny import SUMS

HERE = Path(__file__).parent


def export(net: Joint, out: Path) -> Any:
    """Model and processor files that transformers 4.57 and 5 read alike."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*"):
        old.unlink()
    model, processor = net.export(), build_processor()
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    # the names of the released LLaVA checkpoints: every version of transformers maps them to its own
    tensors = {released(name): weight.half().contiguous() for name, weight in model.model.named_parameters()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    processor.save_pretrained(out)
    # before version 5 the image processor has a file of its own
    processor.image_processor.save_pretrained(out)
    edit(out / "config.json", architectures=[type(model).__name__])
    for part in ((), ("text_config",), ("vision_config",)):
        edit(out / "config.json", *part, dtype="float32", torch_dtype="float32")
    edit(out / "config.json", "text_config", rope_theta=ROPE_THETA)
    edit(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return model


def released(name: str) -> str:
    part, rest = name.split(".", 1)
    if part == "vision_tower" and not rest.startswith("vision_model."):
        return f"{part}.vision_model.{rest}"
    return f"{part}.model.{rest}" if part == "language_model" else name


def edit(path: Path, *keys: str, **fields: Any) -> None:
    """Set fields of a JSON file, below ``keys``."""
    whole = json.loads(path.read_text())
    part = whole
    for key in keys:
        part = part[key]
    part.update(fields)
    path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def seal(out: Path) -> None:
    """Record the SHA-256 of every file."""
    files = sorted(path for path in out.iterdir() if path.name != SUMS)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]
    (out / SUMS).write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", default="polish")
    parser.add_argument("--limit", type=int, help="Test questions to score; default all.")
    options = parser.parse_args()
    net = Joint(yaml.safe_load((HERE / "recipe.yaml").read_text())["seed"])
    net.load_state_dict(torch.load(options.folder / f"{options.stage}.pt", weights_only=True)["net"])
    export(net, options.out)
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
