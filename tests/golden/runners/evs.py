# SPDX-License-Identifier: Apache-2.0
"""EVS: differences, counts and kept sets; places in time and picture of what is kept."""

from __future__ import annotations

import torch

from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.evs import EVS, official_keep


def selection(case):
    q, (frames, rows, cols) = case.hyper["pruning_rate_q"], case.hyper["frames_grid_thw"]
    merge = case.hyper["spatial_merge_size"]
    grid = (rows // merge, cols // merge)
    tokens = VisualTokens(features=case.tensor("features")[None], grids=(grid,) * frames, frames=True)
    method = EVS(variant="official", q=q)
    case.check("dissimilarity", EVS().score(tokens)[0].view(frames, *grid))
    kept = choose_own(method, tokens)[0]
    case.check("kept_indices", kept)
    case.check("kept_indices", choose(EVS(), tokens, len(kept))[0])  # at that budget both agree
    case.check("retained_count", torch.tensor([len(kept)]))
    case.check("tokens_per_frame", torch.bincount(kept // (grid[0] * grid[1]), minlength=frames))
    return kept, grid


def with_places(case):
    kept, (rows, cols) = selection(case)
    step = int(case.hyper["tokens_per_second"] * case.hyper["second_per_grid"])
    frame, place = kept // (rows * cols), kept % (rows * cols)
    case.check("mrope_positions", torch.stack([frame * step, place // cols, place % cols], dim=1))


def counts(case):
    found = [
        official_keep(n, frames, q)
        for (n, frames), q in zip(case.arrays["cases"].tolist(), case.arrays["rates"].tolist(), strict=True)
    ]
    case.check("retained", torch.tensor(found))


RUNNERS = {"selection": selection, "selection_mrope": with_places, "count": counts}
