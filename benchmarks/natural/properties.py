# SPDX-License-Identifier: Apache-2.0
"""What a saved model is like inside: where [CLS] and the text look, sinks, drift, and massive activations.

python benchmarks/natural/properties.py FOLDER --limit 300
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves the folder of a script out

from model import auc

from vlmprune.evaluation.tasks.scenes import ScenesSample, scenes
from vlmprune.evaluation.tasks.scenes.paint import coverage
from vlmprune.evaluation.tasks.shapes.model import IMAGE

Means = dict[str, float]


@torch.no_grad()
def properties(folder: Path, limit: int, split: str = "test") -> dict[str, Any]:
    """Means over questions of the split; layers and blocks are counted from 0."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(folder)
    vision = model.config.vision_config
    grid = vision.image_size // vision.patch_size
    found: dict[str, list[float]] = defaultdict(list)
    sums = torch.zeros(model.config.text_config.num_hidden_layers, grid * grid)
    for sample in scenes().samples(split, limit):
        text = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
        inputs = processor(images=sample.load_images(), text=text, return_tensors="pt")
        asked, things = masks(sample, grid)
        seen = model.model.vision_tower(
            inputs["pixel_values"], output_attentions=True, output_hidden_states=True
        )
        rows = [a[0, :, 0, 1:].mean(0).numpy() for a in seen.attentions]
        add(found, tower(rows[:-1], seen.hidden_states[-2][0, 1:].norm(dim=-1).numpy(), asked, things))
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
        columns = inputs["input_ids"][0] == IMAGE
        for layer, attention in enumerate(out.attentions):
            row = attention[0, :, -1].mean(0)  # (L,) of the last prompt token
            patches = row[columns]
            sums[layer] += patches / patches.sum()
            add(found, decoder(layer, row, patches.numpy(), asked, out.hidden_states[layer + 1][0]))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {
        "questions": limit,
        "tower": {name: value for name, value in means.items() if "@" not in name},
        "decoder": [drift(sums[layer].numpy() / limit, means, layer) for layer in range(len(sums))],
    }


def masks(sample: ScenesSample, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """(grid * grid,) bool: patches of the things asked about, and of all things."""
    if sample.scene is None or sample.ask is None:
        raise ValueError(f"{sample.id} shows no scene")
    things = sample.scene.things
    shares = np.array([to_patches(coverage(thing), grid) for thing in things])
    shown = shares >= 0.5 * shares.max(1, keepdims=True)
    return shown[list(sample.ask.asked)].any(0), shown.any(0)


def to_patches(pixels: np.ndarray, grid: int) -> np.ndarray:
    side = pixels.shape[0] // grid
    return pixels.reshape(grid, side, grid, side).mean((1, 3)).ravel()


def tower(rows: Sequence[np.ndarray], norms: np.ndarray, asked: np.ndarray, things: np.ndarray) -> Means:
    """Of the [CLS] rows of the blocks before the last, whose output is the last of them, and of its norms."""
    found = {f"cls auc things {block}": auc(row, things) for block, row in enumerate(rows)}
    last = rows[-1]
    top = last.argsort()[::-1]
    if asked.any():
        found["cls auc asked"] = auc(last, asked)
    found["cls share of 5 patches"] = float(last[top[:5]].sum() / last.sum())
    found["cls share of background"] = float(last[~things].sum() / last.sum())
    found["cls background in top ninth"] = float((~things)[top[: len(last) // 9]].mean())
    found["norm max by median"] = float(norms.max() / np.median(norms))
    found["norm of things by background"] = float(norms[things].mean() / norms[~things].mean())
    found["norm highest on background"] = float(~things[norms.argmax()])
    return found


def decoder(
    layer: int, row: torch.Tensor, patches: np.ndarray, asked: np.ndarray, states: torch.Tensor
) -> Means:
    norms, largest = states.norm(dim=-1), states.abs()
    found = {
        "mass on image": float(patches.sum()),
        "mass on first token": float(row[0]),
        "norm max by median": float(norms.max() / norms.median()),
        "value max by median": float(largest.max() / largest.median()),
    }
    if asked.any():
        found["auc asked"] = auc(patches, asked)
    return {f"{name} @{layer}": value for name, value in found.items()}


def drift(mean: np.ndarray, means: Means, layer: int) -> Means:
    """Positional trend of the mean row (patches,), beside the means of a layer."""
    rank = np.corrcoef(mean.argsort().argsort(), np.arange(len(mean)))[0, 1]
    own = {name.split(" @")[0]: value for name, value in means.items() if name.endswith(f"@{layer}")}
    quarter = len(mean) // 4
    return {
        "rank correlation with place": float(rank),
        "share of last quarter": float(mean[-quarter:].sum()),
        **own,
    }


def add(found: dict[str, list[float]], values: Means) -> None:
    for name, value in values.items():
        found[name].append(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    torch.set_num_threads(1)  # several wait for each other where the machine is busy
    print(json.dumps(properties(**vars(options)), indent=1))
