# SPDX-License-Identifier: Apache-2.0
"""RCP: pruners on given states, alone and one behind the other, context and adapter, and the losses."""

from __future__ import annotations

import torch

from vlmprune.methods.rcp import part_of
from vlmprune.methods.rcp.losses import mean_share, repair_loss, sparsity_loss
from vlmprune.methods.rcp.pruner import pruner_scores
from vlmprune.methods.rcp.repair import dropped_embedding, mask_embedding, repaired


def given(case, prefix):
    names = [name for name in case.arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): case.tensor(name) for name in names}


def real_rows(case, question):
    return torch.arange(question.shape[1])[None] < case.tensor("question_lengths")[:, None]


def pruner(case):
    question, alive = case.tensor("question"), case.tensor("alive").bool()
    made = pruner_scores(
        given(case, "param/"),
        case.hyper["heads"],
        case.tensor("visual"),
        case.tensor("attention"),
        alive,
        question,
        real_rows(case, question),
    )
    case.check("baseline", made.baseline)
    case.check("cross_score", made.cross)
    case.check("token_score", made.token)
    case.check("logits", made.logits)
    case.check("mask", (alive & (made.logits > 0)).long())


def cumulative(case):
    alive = torch.ones(case.arrays["attention/0"].shape, dtype=torch.bool)
    for number in range(case.hyper["pruners"]):
        question = case.tensor(f"question/{number}")
        logits = pruner_scores(
            given(case, f"param/{number}/"),
            case.hyper["heads"],
            case.tensor(f"visual/{number}"),
            case.tensor(f"attention/{number}"),
            alive,
            question,
            real_rows(case, question),
        ).logits
        case.check(f"logits/{number}", logits)
        alive = alive & (logits > 0)
        case.check(f"mask/{number}", alive.long())


def repair(case):
    weights, alive = given(case, "param/"), case.tensor("alive")
    context = part_of(weights, "context.")
    places = mask_embedding(context, alive)
    dropped = dropped_embedding(context, case.tensor("visual"), alive == 0)
    case.check("mask_embedding", places)
    case.check("dropped_embedding", dropped)
    rows = repaired(part_of(weights, "repair."), case.tensor("rows"), places + dropped)
    case.check("repaired", rows)


def losses(case):
    hyper, shares = case.hyper, case.tensor("kept_share")
    layers, depth = hyper["pruning_layers"], hyper["depth"]
    repair_term = repair_loss(case.tensor("student"), case.tensor("teacher"), hyper["variance_weight"])
    case.check("repair_loss", repair_term[None])
    case.check("mean_share", mean_share(shares, layers, depth).mean()[None])
    target = hyper["target"] / hyper["n_visual"]
    case.check("sparsity_loss", sparsity_loss(shares, layers, depth, target)[None])


RUNNERS = {"pruner": pruner, "cumulative": cumulative, "repair": repair, "losses": losses}
