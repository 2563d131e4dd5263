# SPDX-License-Identifier: Apache-2.0
"""PruneVid: clusters of frames, scenes, and rows before the language model; what is kept inside it.

The package ranks a whole clip inside the language model. The authors rank scene by scene, which is written
out here, so that the vectors hold the scores.
"""

from __future__ import annotations

import torch

from vlmprune.core.select import choose_own, top_k
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.prunevid import PruneVid, PruneVidInside, groups_of


def merged(case):
    hyper, x = case.hyper, case.tensor("features")
    method = PruneVid(
        variant="official",
        tau=hyper["tau"],
        scenes=hyper["temporal_segment_ratio"],
        clusters=hyper["cluster_ratio"],
        above=hyper["cluster_above"],
        neighbours=hyper["neighbours_k"],
    )
    tokens = VisualTokens(
        features=x.flatten(0, 1)[None], grids=(tuple(hyper["grid"]),) * hyper["frames"], frames=True
    )
    case.check("frame_clusters", torch.tensor(method.frame_clusters(x)))
    scenes = method.scenes_of(x)
    case.check("window_sizes", torch.tensor([scene.length for scene in scenes]))
    sizes = {True: [], False: []}
    for scene in scenes:
        counts = {True: 0, False: 0}
        for group in groups_of(x, scene):
            counts[group.still] += method.official_count(len(group.slots))
        for still, count in counts.items():
            sizes[still].append(count)
    case.check("static_sizes", torch.tensor(sizes[True]))
    case.check("dynamic_sizes", torch.tensor(sizes[False]))
    case.check("rows", choose_own(method, tokens)[0].features)


def inside(case):
    scores = PruneVidInside().score(VisualTokens(text_attention=case.tensor("attention")[None]))
    kept, start, alpha = [], 0, case.hyper["alpha"]
    for still, changing, frames in case.arrays["sizes"].tolist():
        blocks = [still] + [changing // frames] * frames
        counts = [int(alpha * still)] + [int(alpha * changing / frames)] * frames
        for size, count in zip(blocks, counts, strict=True):
            if count:
                kept.append(start + top_k(scores[:, start : start + size], count)[0])
            start += size
    case.check("kept_indices", torch.cat(kept))


RUNNERS = {"merge": merged, "inside": inside}
