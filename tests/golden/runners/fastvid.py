# SPDX-License-Identifier: Apache-2.0
"""FastVID: transitions, segments, and the rows of the authors' three files."""

from __future__ import annotations

import torch

from vlmprune.core.select import choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods import fastvid
from vlmprune.methods.fastvid import FastVID


def given(case, rule):
    hyper, x = case.hyper, case.tensor("features")
    vectors = case.arrays.get("frame_features")
    tokens = VisualTokens(
        features=x.flatten(0, 1)[None],
        received_attention=case.tensor("pool_attention").flatten()[None],
        grids=(tuple(hyper["grid"]),) * hyper["frames"],
        frames=True,
        frame_vectors=None if vectors is None else torch.from_numpy(vectors)[None],
    )
    method = FastVID(
        variant="official",
        rule=rule,
        r=hyper["retention_ratio"],
        segments=hyper["segments_c"],
        tau=hyper["similarity_tau"],
        d=hyper["context_share_d"],
        p=hyper["anchor_step_p"],
        beta=hyper["beta"],
        neighbours=hyper["neighbours_k"],
        iota=hyper.get("similarity_ignore", 0.95),
    )
    s = fastvid.transitions(x.mean(dim=1) if vectors is None else tokens.frame_vectors[0])
    case.check("transition_similarity", s)
    ends = fastvid.cuts(s, method.segments, method.tau)
    case.check("cuts", torch.tensor(ends, dtype=torch.int64))
    parts = fastvid.segments_of(ends, hyper["frames"])
    case.check("segment_sizes", torch.tensor([len(part) for part in parts]))
    return method, tokens, method.counts_of(parts, s, x.shape[1], None)


def kept(case, rule):
    method, tokens, counts = given(case, rule)
    merged = choose_own(method, tokens)[0]
    case.check("kept_indices", merged.slots)
    return merged, counts


def onevision(case):
    merged, counts = kept(case, "onevision")
    case.check("rows", merged.features)
    case.check("context_budgets", torch.tensor(counts.context))
    best = torch.sort(case.tensor("pool_attention"), dim=1, descending=True, stable=True).indices
    case.check("salient_indices", best[:, : counts.salient[0]].sort(dim=1).values)


def with_newlines(case):
    """A newline behind every row of a frame that still holds a token: the authors' layout."""
    merged, _ = kept(case, "video")
    _, cols = case.hyper["grid"]
    line, column = merged.slots // cols, merged.slots % cols
    lines = line.unique()
    slots = torch.cat([line * (cols + 1) + column, lines * (cols + 1) + cols])
    newlines = case.tensor("newline").expand(len(lines), -1)
    order = slots.argsort()
    case.check("kept_slots", slots[order])
    case.check("rows", torch.cat([merged.features, newlines])[order])


def qwen(case):
    merged, _ = kept(case, "qwen")
    case.check("rows", merged.features)


RUNNERS = {"merge": onevision, "merge_newline": with_newlines, "merge_qwen": qwen}
