# SPDX-License-Identifier: Apache-2.0
"""PAINT: the two sets from given [CLS] rows, and edited logits of given rows."""

from __future__ import annotations

import torch
from given_maps import call_with_logits

from vlmprune.core.method import Need
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.paint import FIRST, LATE, LOCAL, PAINT, SUMMARY


def token_sets(case):
    hyper = case.hyper
    assert hyper["spatial_ratio"] == 0.0, "that set is noise and not offered"
    first, last = case.tensor("first_cls_attention")[None], case.tensor("last_cls_attention")[None]
    tokens = VisualTokens(
        cls_attention=first,
        grids=(tuple(hyper["grid"]),),
        of_layers={Need("cls_attention", FIRST): first, Need("cls_attention", LATE): last},
    )
    (marks,) = PAINT(local_ratio=hyper["local_ratio"]).mark_tokens(tokens)
    case.check("summary_indices", (marks == SUMMARY).nonzero()[:, 0])
    case.check("local_indices", (marks == LOCAL).nonzero()[:, 0])


def edited(case, marked, visible):
    """Edit the last row of the given logits as the slot does, with marks (S,)."""
    hyper, logits, values = case.hyper, case.tensor("logits"), case.tensor("values")
    method, call = PAINT(alpha=hyper["alpha"], beta=hyper["beta"]), call_with_logits(logits, visible, values)
    rows = torch.tensor([[logits.shape[1] - 1]])
    before, hidden = call.logits(rows), ~visible[-1]
    after = method.relogit(before.masked_fill(hidden, 0.0), marked[None], marked[None] > 0)
    case.check("edited_logits", torch.cat([logits[:, :-1], after[0]], dim=1))
    every = torch.arange(logits.shape[1])[None]
    attention = call.attention(every)  # (1, H, R, S)
    edited = torch.cat([attention[:, :, :-1], call.weights(after.masked_fill(hidden, -torch.inf))], dim=2)
    case.check("edited_attention", edited[0])
    case.check("output_change", call.weigh(edited - attention)[0].flatten(1))


def logits_of_rows(case):
    visible = case.tensor("visible")
    marked = torch.zeros(visible.shape[1], dtype=torch.int8)
    marked[case.tensor("local_columns")] = LOCAL
    marked[case.tensor("summary_columns")] = SUMMARY
    edited(case, marked, visible)


def logits_pruned(case):
    """The sets of the whole picture, through the map of tokens that are left."""
    hyper, slots = case.hyper, case.tensor("logits").shape[-1]
    sets = torch.zeros(hyper["n_visual"], dtype=torch.int8)
    sets[case.tensor("local_indices")], sets[case.tensor("summary_indices")] = LOCAL, SUMMARY
    first, marked = hyper["image_start"], torch.zeros(slots, dtype=torch.int8)
    marked[first : first + hyper["n_kept"]] = sets[case.tensor("kept_indices")]
    case.check("local_columns", (marked == LOCAL).nonzero()[:, 0])
    case.check("summary_columns", (marked == SUMMARY).nonzero()[:, 0])
    edited(case, marked, torch.ones(1, slots, dtype=torch.bool))


RUNNERS = {
    "token_sets": token_sets,
    "logits_prefill": logits_of_rows,
    "logits_decode": logits_of_rows,
    "logits_pruned": logits_pruned,
}
