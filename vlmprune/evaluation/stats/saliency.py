# SPDX-License-Identifier: Apache-2.0
"""Saliency: do the scores of a method rank the patches of objects above the others?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...api import score
from ...core.method import Method
from ...errors import EvaluationError
from ..answer.batch import model_inputs
from ..tasks.sample import Sample
from . import estimates
from .objects import Asked


def saliency(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    objects: Any,
    method: str | Method = "fastervlm",
    batch_size: int = 32,
) -> dict[str, Any]:
    """Area under the ROC curve of scores against objects: 1 where every object patch outranks all others.

    Args:
        objects: gives the (H, W) masks of a sample, one per image; images without objects, or full of them,
            are left out.
    """
    found: dict[str, list[float]] = {}  # picture -> areas, one for each question about it
    for start in range(0, len(samples), batch_size):
        rows = [sample for sample in samples[start : start + batch_size] if sample.images]
        if not rows:
            continue
        texts = [
            processor.apply_chat_template(sample.messages(), add_generation_prompt=True) for sample in rows
        ]
        # one map for each image, in the order of the samples
        maps = iter(
            score(
                model,
                model_inputs(processor, model, texts, [sample.load_images() for sample in rows]),
                method,
            )
        )
        for sample in rows:
            asked = Asked(sample.id, objects(sample), len(sample.images))
            for image in range(len(sample.images)):
                one = next(maps)
                on = asked.patches(image, one)
                # without both kinds of patches there is nothing to rank
                if on.any() and not on.all():
                    found.setdefault(sample.images[image], []).append(auc(one.scores.numpy(), on))
    if not found:
        raise EvaluationError(f"none of {len(samples)} samples shows an object; saliency needs masks")
    # several questions about one picture are not several pictures
    values = np.array([np.mean(some) for some in found.values()])  # one per image
    # a bootstrap over pictures
    drawn = values[
        np.random.default_rng(0).integers(len(values), size=(estimates.RESAMPLES // 10, len(values)))
    ].mean(axis=1)
    # of one picture all draws are the same, which says nothing of others
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(values) > 1 else (0.0, 1.0)
    return {"auc": float(values.mean()), "ci": [float(low), float(high)], "images": len(values)}


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive outranks a negative, ties counted half."""
    _, code, count = np.unique(scores, return_inverse=True, return_counts=True)
    # equal scores share the mean of their ranks
    ranks = (count.cumsum() - (count - 1) / 2)[code]
    ones = int(positive.sum())
    # Mann and Whitney's U as a share of all pairs
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * (len(scores) - ones)))
