# SPDX-License-Identifier: Apache-2.0
"""ACT: column means, sinks and edited maps from given attention, through the rows of an attention call."""

from __future__ import annotations

import torch
from given_maps import call_with_maps

from vlmprune.methods.act import ACT


def sinks_of(case, method):
    """Means (1, h, L), sinks (1, h, L) and the call of the heads that are listed, over the prompt."""
    maps = case.tensor("attention")  # (H, L, L)
    values = case.tensor("values") if "values" in case.arrays else None
    call = call_with_maps(maps, values).of_heads(torch.tensor(case.hyper["heads"]))
    total, seen = call.given(torch.ones(1, maps.shape[1], dtype=torch.bool))
    mean = (total / seen[:, None]).float()
    return mean, method.mark_columns(mean, seen, torch.zeros_like(seen, dtype=torch.bool), 0), call


def method_of(hyper):
    rule, threshold = hyper["threshold_rule"], hyper["threshold"]
    if rule.endswith("/L"):
        threshold = rule
    elif rule != "fixed" and not isinstance(threshold, str) and threshold > 1:  # over the length
        threshold = f"{threshold:g}/L"
    return ACT(threshold=threshold, beta=hyper["beta"], spare="first" if hyper["spare_first"] else "column0")


def among(heads, part, count):
    """(count, ...) with the listed heads filled in, nothing elsewhere."""
    full = torch.zeros(count, *part.shape[1:], dtype=part.dtype)
    full[heads] = part
    return full


def calibrate(case):
    hyper, maps, method = case.hyper, case.tensor("attention"), method_of(case.hyper)
    heads, count = hyper["heads"], maps.shape[0]
    every, seen = call_with_maps(maps).given(torch.ones(1, maps.shape[1], dtype=torch.bool))
    case.check("column_mean", (every / seen[:, None])[0].float())
    _, sinks, call = sinks_of(case, method)
    case.check("sinks", among(heads, sinks[0], count))
    visual = torch.zeros_like(seen, dtype=torch.bool)
    edited = maps.clone()
    edited[heads] = method.reweight(maps[None, heads], sinks, visual)[0]
    case.check("edited", edited)
    rows = case.tensor("query_rows")
    attention = call.attention(rows[None])  # (1, h, R, L)
    change = call.weigh(method.reweight(attention, sinks, visual) - attention)[0]  # (R, h, d)
    full = torch.zeros(len(rows), count, change.shape[-1])
    full[:, heads] = change.float()
    case.check("output_change", full.flatten(1))


def decode(case):
    method, heads = method_of(case.hyper), case.hyper["heads"]
    _, sinks, _ = sinks_of(case, method)
    count, rows = case.tensor("attention").shape[0], case.tensor("decode_rows").clone()
    case.check("sinks", among(heads, sinks[0], count))
    new = rows.shape[-1] - sinks.shape[-1]
    longer = torch.nn.functional.pad(sinks, (0, new))  # what came after the prompt is no sink
    rows[heads] = method.reweight(
        rows[None, heads], longer, torch.zeros(1, rows.shape[-1], dtype=torch.bool)
    )[0]
    case.check("edited_rows", rows)


RUNNERS = {"calibrate": calibrate, "decode": decode}
