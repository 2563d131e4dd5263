# SPDX-License-Identifier: Apache-2.0
"""VidCom2: channels, scores, shares, budgets and kept sets."""

from __future__ import annotations

import torch

from vlmprune.core.select import choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods import vidcom2
from vlmprune.methods.vidcom2 import VidCom2


def given(case):
    hyper, x = case.hyper, case.tensor("features")
    assert (tuple(hyper["alphas"]), hyper["temperature"]) == (vidcom2.BANDWIDTHS, vidcom2.TEMPERATURE)
    grid, frames = tuple(hyper["grid"]), hyper["frames"]
    clip = x.view(1, frames, grid[0] * grid[1], -1)
    v, f = vidcom2.likeness(clip)
    case.check("low_variance_channels", vidcom2.calm_channels(clip)[0])
    case.check("video_score", v[0])
    case.check("frame_score", f[0])
    case.check("frame_uniqueness", -v[0].mean(dim=1))
    case.check("frame_scales", vidcom2.frame_shares(v, hyper["base_scale"])[0])
    return VisualTokens(features=x[None], grids=(grid,) * frames, frames=True)


def check(case, kept):
    n = case.hyper["grid"][0] * case.hyper["grid"][1]
    case.check("kept_indices", kept)
    case.check("budgets", torch.bincount(kept // n, minlength=case.hyper["frames"]))


def official(case):
    kept = choose_own(VidCom2(variant="official", b=case.hyper["base_scale"]), given(case))[0]
    check(case, kept)
    return kept


def with_newlines(case):
    """Newlines of a frame behind its kept tokens: the authors' order, for the vectors only."""
    kept, (rows, cols) = official(case), case.hyper["grid"]
    frame, place = kept // (rows * cols), kept % (rows * cols)
    packed = frame * rows * (cols + 1) + place // cols * (cols + 1) + place % cols
    order = []
    for t in range(case.hyper["frames"]):
        newlines = (t * rows + torch.arange(rows)) * (cols + 1) + cols
        order += [packed[frame == t], newlines]
    order = torch.cat(order)
    case.check("rows_official_order", order)
    embedded = case.tensor("features_with_newlines")
    assert torch.equal(embedded[packed], case.tensor("features")[kept])


def exact(case):
    tokens, hyper = given(case), case.hyper
    k = max(hyper["frames"], int(tokens.count * (1 - hyper["pruning_rate_q"])))
    check(case, VidCom2().select_from(tokens, k, hyper["base_scale"])[0].sort().values)


RUNNERS = {"selection": official, "grid_newline": with_newlines, "exact_count": exact}
