# SPDX-License-Identifier: Apache-2.0
"""FitPrune: one step from a given attention map, and the published schedules."""

from __future__ import annotations

import torch

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.hooks.slots.ranking import received_by_pictures
from vlmprune.hooks.slots.spans import Span
from vlmprune.methods.fitprune import TABLES, FitPrune, cross_attention, self_attention


def layer_step(case):
    first, n = case.hyper["visual_start"], case.hyper["n_visual"]
    end, attention = first + n, case.tensor("attention")[None]  # (1, H, L, L)
    length = attention.shape[-1]
    span = Span(0, torch.arange(first, end), torch.arange(n), 0, True, 0, None)
    tokens = VisualTokens(
        text_attention=attention[:, :, end:, first:end],
        lm_received=received_by_pictures(GivenCall(attention), [span], length)[:, first:end],
    )
    case.check("cross", cross_attention(tokens.text_attention, None)[0])
    case.check("self", self_attention(tokens.lm_received)[0])
    kept = choose(FitPrune(), tokens, n - case.hyper["delete"])[0]
    case.check("kept_visual", kept)
    columns = torch.arange(length)
    case.check("kept_indices", torch.cat([columns[:first], kept + first, columns[end:]]))


def schedule(case):
    depth, count = case.hyper["depth"], case.hyper["count"]
    ratios = case.tensor("ratios")
    deleted = torch.zeros(len(ratios), depth, dtype=torch.long)
    for number, ratio in enumerate(ratios.tolist()):
        if ratio:
            deleted[number, : len(TABLES[ratio])] = torch.tensor(TABLES[ratio])
    case.check("ratios", torch.tensor([0, *TABLES]))
    case.check("delete", deleted)
    left = torch.full((len(ratios), depth), count)
    for number, ratio in enumerate(ratios.tolist()):
        for point in FitPrune(percent=ratio).cuts(depth, None, count) if ratio else ():
            left[number, point.layer - 1 :] = point.keep
    case.check("left_after", left)


class GivenCall:
    """Where an attention map (1, H, L, L) was given, in place of the call that it is of."""

    def __init__(self, attention):
        self.map = attention
        self.queries = self.keys = torch.zeros(1, 1, attention.shape[-1], 1)

    def attention(self, rows):
        return self.map[:, :, rows[0]]


RUNNERS = {"layer_step": layer_step, "schedule": schedule}
