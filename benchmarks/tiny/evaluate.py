# SPDX-License-Identifier: Apache-2.0
"""Score a saved model on the benchmark with generate(), per family; and how well [CLS] attention finds
things.

python benchmarks/tiny/evaluate.py FOLDER --split dev
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmprune.evaluation.tasks.shapes import ShapesTask, shapes
from vlmprune.evaluation.tasks.shapes.model import GRID, PATCH
from vlmprune.evaluation.tasks.shapes.render import coverage


@torch.no_grad()
def accuracy(
    model: Any, processor: Any, task: ShapesTask, split: str, limit: int | None, batch: int = 32
) -> dict[str, float]:
    """Exact match of greedy answers, per family."""
    groups = defaultdict(list)  # rows of one length need no padding
    for sample in task.samples(split, limit):
        text = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
        groups[len(sample.images), len(processor.tokenizer(text).input_ids)].append((sample, text))
    scores: dict[str, list[float]] = {family: [] for family in task.families}
    for rows in groups.values():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            images = [image for sample, _ in part for image in sample.load_images()]
            inputs = processor(images=images, text=[text for _, text in part], return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[
                :, inputs["input_ids"].shape[1] :
            ]
            for (sample, _), answer in zip(
                part, processor.batch_decode(ids, skip_special_tokens=True), strict=True
            ):
                scores[sample.family].append(task.score(sample, answer))
    return {family: float(np.mean(values)) for family, values in scores.items() if values}


@torch.no_grad()
def cls_auc(model: Any, processor: Any, task: ShapesTask, split: str, images: int) -> dict[str, float]:
    """Mean AUC over pictures of the attention of [CLS] (mean over heads) against patches that show a thing,
    by layer.
    """
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    found = defaultdict(list)
    for sample in task.samples(split, images):
        pixels = processor.image_processor(sample.load_images()[:1], return_tensors="pt")["pixel_values"]
        maps = tower(pixels, output_attentions=True).attentions
        shown = (
            coverage(sample.scenes[0].things).reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).ravel() >= 0.22
        )
        for layer, attention in enumerate(maps):
            found[layer].append(auc(attention[0, :, 0, 1:].mean(0).numpy(), shown))
    tower.set_attn_implementation("sdpa")
    return {f"layer {layer + 1} of {len(found)}": float(np.mean(values)) for layer, values in found.items()}


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative."""
    ranks = scores.argsort().argsort() + 1
    n = positive.sum()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def report(folder: Path, split: str, limit: int | None) -> dict[str, Any]:
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    task, begin = shapes(), time.process_time()
    families = accuracy(model, processor, task, split, limit)
    count = (limit or len(task.samples(split))) / len(families)
    return {
        "split": split,
        "fingerprint": task.fingerprint,
        "questions_per_family": count,
        "mean": float(np.mean(list(families.values()))),
        "families": families,
        "blind": dict(task.blind),
        "half_width_95": 1.96 * math.sqrt(0.25 / count),
        "cls_attention_auc": cls_auc(model, processor, task, split, 200),
        "cpu_seconds": round(time.process_time() - begin),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    print(json.dumps(report(**vars(options)), indent=1))
