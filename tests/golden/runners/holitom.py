# SPDX-License-Identifier: Apache-2.0
"""HoliTom: windows, shares, places and rows before the language model; what is folded inside it."""

from __future__ import annotations

import torch

from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.clips import neighbour_cosine
from vlmprune.methods.holitom import HoliTom, effective_share
from vlmprune.methods.holitom.inner import HoliTomInner
from vlmprune.methods.holitom.windows import best_windows


def official(case):
    hyper, x = case.hyper, case.tensor("features")
    assert hyper["merge_share_D"] == 0, "the official code crashes there"
    method = HoliTom(
        variant="official",
        r=hyper["retain_ratio"],
        tau=hyper["tau"],
        beta=hyper["beta"] if hyper["use_beta"] else None,
        neighbours=hyper["neighbours_K"],
        longest=hyper["max_window"],
    )
    tokens = VisualTokens(
        features=x.flatten(0, 1)[None],
        received_attention=case.tensor("received_attention").flatten()[None],
        grids=(tuple(hyper["grid"]),) * hyper["frames"],
        frames=True,
    )
    s = neighbour_cosine(x[None])[0]
    case.check("neighbour_similarity", s)
    windows = best_windows(s > method.tau, x.shape[1], method.longest)
    case.check("window_starts", torch.tensor([w.start for w in windows]))
    case.check("window_ends", torch.tensor([w.stop - 1 for w in windows]))
    case.check("static_places", torch.tensor([w.still for w in windows]))
    saved = sum(w.saved for w in windows)
    case.check("tokens_saved", torch.tensor([saved]))
    case.check("effective_ratio", torch.tensor([effective_share(saved, tokens.count, method.r)]))
    return choose_own(method, tokens)[0]


def outer(case):
    merged = official(case)
    case.check("slots", merged.slots)
    case.check("rows", merged.features)


def with_newlines(case):
    """Rows by place, a newline behind every row of the grid that still holds one: the authors' layout."""
    merged = official(case)
    slots, order = merged.slots.sort()
    case.check("slots", slots)
    cols = case.hyper["grid"][1]
    lines = (slots // cols).unique()
    packed = torch.cat([slots + slots // cols, lines * (cols + 1) + cols])
    rows = torch.cat([merged.features[order], case.tensor("newline").expand(len(lines), -1)])
    by_place = packed.argsort()
    case.check("packed_slots", packed[by_place])
    case.check("rows", rows[by_place])


def inner(case):
    hyper, hidden, attention = case.hyper, case.tensor("hidden"), case.tensor("attention")
    start, count = hyper["visual_start"], hyper["visual_tokens"]
    visual = slice(start, start + count)
    tokens = VisualTokens(
        features=hidden[None, visual], text_attention=attention[None, :, None, visual].contiguous()
    )
    keep = round(count * (1 - hyper["drop_share_r"]))
    method = HoliTomInner(hyper["layer_k"], combine="sequential")
    merged = choose(method, tokens, keep)
    order = method.score(tokens)[0].sort(descending=True, stable=True).indices
    case.check("kept_visual_by_rank", order[:keep])
    places = [torch.arange(start), merged.slots[0] + start, torch.arange(start + count, len(hidden))]
    case.check("kept_positions", torch.cat(places))
    case.check("merged_hidden", torch.cat([hidden[places[0]], merged.features[0], hidden[places[2]]]))


RUNNERS = {"outer": outer, "outer_newline": with_newlines, "inner": inner}
