# SPDX-License-Identifier: Apache-2.0
"""DyCoke: kept tokens of thinned frames; what decode steps see."""

from __future__ import annotations

import torch

from vlmprune.core.method import Look
from vlmprune.core.select import choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.clips import same_place_cosine
from vlmprune.methods.dycoke import DyCoke, DyCokeDecode, likeness, official_thinned


def temporal(case):
    hyper = case.hyper
    frames, (rows, cols) = hyper["frames"], hyper["grid"]
    n = rows * cols
    tokens = VisualTokens(features=case.tensor("features")[None], grids=((rows, cols),) * frames, frames=True)
    kept = choose_own(DyCoke(variant="official", drop=hyper["merge_ratio_k"]), tokens)[0]
    case.check("kept_indices", kept)
    case.check("tokens_per_frame", torch.bincount(kept // n, minlength=frames))
    # inside a thinned frame the authors order by rising cosine
    x, order = case.tensor("features").view(1, frames, n, -1), []
    like = {one.frame: one.like for one in official_thinned(frames)}
    for t in range(frames):
        mine = kept[kept // n == t]
        if t in like:
            mine = mine[same_place_cosine(x, [t], [like[t]])[0, 0, mine - t * n].argsort(stable=True)]
        order.append(mine)
    case.check("kept_official_order", torch.cat(order))


def decode(case):
    hyper, attention = case.hyper, case.tensor("attention")
    start, count = hyper["visual_start"], hyper["visual_tokens"]
    method = DyCokeDecode(
        layer=hyper["layer"],
        drop=hyper["prune_share_p"],
        threshold=hyper["similarity_threshold"],
        reuse=False,
    )
    visual = torch.zeros(1, attention.shape[2], dtype=torch.bool)
    visual[:, start : start + count] = True
    before, cosines, pruned, kept = None, [], [], []
    for row in attention:
        a = row.mean(dim=0)[None].masked_fill(~visual, 0.0)
        seen = method.look(a, visual, before)
        cosines.append(torch.zeros(1) if before is None else likeness(a, before.attention))
        before = Look(a, seen)
        pruned.append(not torch.equal(seen, visual))
        places = seen[0, start : start + count].nonzero()[:, 0]
        kept.append(places if pruned[-1] else torch.full((case.arrays["kept_visual"].shape[1],), -1))
    case.check("similarity", torch.cat(cosines))
    case.check("pruned", torch.tensor(pruned))
    case.check("kept_visual", torch.stack(kept))


RUNNERS = {"temporal": temporal, "decode": decode}
