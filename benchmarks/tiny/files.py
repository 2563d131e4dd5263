# SPDX-License-Identifier: Apache-2.0
"""The files of a shipped model: what transformers 4.57 and 5 read alike, and their hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vlmprune.models.tiny import SUMS


def write(model: Any, processor: Any, out: Path, rope_theta: float) -> None:
    """Model and processor files in an emptied folder; weights in half precision, loaded as float32."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*"):
        old.unlink()
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
    edit(out / "config.json", "text_config", rope_theta=rope_theta)
    edit(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


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
