# SPDX-License-Identifier: Apache-2.0
"""AdaptInfer: stages from given attention, alone and in a batch, and from queries and keys; the averages of
its published schedules.
"""

from __future__ import annotations

import torch

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.hooks.attention_call import AttentionCall
from vlmprune.hooks.sequence.compaction import Compaction
from vlmprune.methods.adaptinfer import AdaptInfer, text_weights


def method_of(hyper):
    budgets = hyper.get("keep_ratios", hyper["budgets"])
    return AdaptInfer(tuple(range(len(budgets))), tuple(budgets), hyper["text_weight_mix"])


def given_tokens(attention, first, n):
    """Tokens of attention (B, H, L, L), the picture at columns first .. first + n - 1."""
    rows = attention[:, :, first + n :]
    return VisualTokens(text_attention=rows[..., first : first + n], text_to_text=rows[..., first + n :])


def stages(case):
    hyper = case.hyper
    method, first, count = method_of(hyper), hyper["visual_start"], hyper["visual_tokens"]
    alive, columns = torch.arange(count), torch.arange(first + count + hyper["text_tokens"])
    for stage, point in enumerate(method.cuts(len(hyper["budgets"]) + 1, None, count)):
        if "keep_ratios" in hyper:
            assert point.keep == hyper["budgets"][stage]
        tokens = given_tokens(case.tensor(f"attention_{stage}")[None], first, len(alive))
        case.check(f"scores_{stage}", method.score(tokens)[0])
        if point.keep == 0:
            kept = alive[:0]
        else:
            kept = choose(method, tokens, point.keep)[0]
        case.check(f"keep_local_{stage}", kept)
        alive = alive[kept]
        case.check(f"keep_original_{stage}", alive)
    stays = torch.ones(1, len(columns), dtype=torch.bool)
    stays[0, first : first + count] = False
    stays[0, first + alive] = True
    compaction = Compaction(stays, torch.ones_like(stays))
    case.check("position_ids_kept", compaction.positions(columns[None], "original")[0])
    case.check("position_ids_compact", compaction.positions(columns[None], "compact")[0])


def from_queries_and_keys(case):
    hyper = case.hyper
    method, first, count = method_of(hyper), hyper["visual_start"], hyper["visual_tokens"]
    queries, keys = case.tensor("queries")[None], case.tensor("keys")[None]
    call = AttentionCall(None, queries, keys, keys, None, {})
    tokens = given_tokens(call.attention(torch.arange(queries.shape[2])[None]), first, count)
    case.check("text_weights", text_weights(tokens.text_to_text, mix=method.mix)[0])
    case.check("scores_0", method.score(tokens)[0])
    (point,) = method.cuts(2, None, count)
    case.check("keep_local_0", choose(method, tokens, point.keep)[0])


def batch(case):
    hyper = case.hyper
    method, first, count = method_of(hyper), hyper["visual_start"], hyper["visual_tokens"]
    tokens = given_tokens(case.tensor("attention_0"), first, count)
    case.check("scores_0", method.score(tokens))
    (point,) = method.cuts(2, None, count)
    case.check("keep_local_0", choose(method, tokens, point.keep))


RUNNERS = {"stages": stages, "qk": from_queries_and_keys, "batch": batch}
