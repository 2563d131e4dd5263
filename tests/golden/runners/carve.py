# SPDX-License-Identifier: Apache-2.0
"""CARVE: from two stacks of attention to the map, the mask, the box and the size of the second picture."""

from __future__ import annotations

import torch

from vlmprune.methods.carve.region import box_of, contrast, enlarged, kept_mask, refined_size


def region(case):
    hyper = case.hyper
    layers, grid, size = hyper["layers"], tuple(hyper["grid"]), tuple(hyper["image_size"])
    question, general = (case.tensor(f"{name}_attention")[:, layers] for name in ("question", "general"))
    pixels = enlarged(contrast(question, general, hyper["lam"], hyper["steps"]), grid, size)
    case.check("contrast_map", pixels.float())
    mask = kept_mask(pixels, hyper["top_share"], hyper["min_regions"], hyper["strategy"])
    case.check("mask", torch.from_numpy(mask).to(torch.uint8))
    box = box_of(mask)
    case.check("box", torch.tensor(box))
    case.check("refined_size", torch.tensor(refined_size(box, size, official=True)))
    assert hyper["score_eps"] == "1/N"
    score = contrast(question, general, 1 / question.shape[2], hyper["steps"])
    case.check("token_score", score.float())


RUNNERS = {"region": region}
