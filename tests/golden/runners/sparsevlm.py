# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: one cut from given embeddings, attention and layer output, in both versions; clustering alone;
the rank rule.
"""

from __future__ import annotations

import torch
from official_rules import sparsevlm_rank_budget

from vlmprune.core.select import top_k
from vlmprune.core.tokens import VisualTokens
from vlmprune.hooks.sequence.compaction import Compaction
from vlmprune.methods.clustering import cluster_means, density_peaks
from vlmprune.methods.sparsevlm import SparseVLM
from vlmprune.methods.sparsevlm.plus import FLOOR, rope_weight, top_head_scores, top_heads
from vlmprune.methods.sparsevlm.raters import rated, rater_affinity
from vlmprune.methods.sparsevlm.recycling import candidate_count, cluster_count, pick, recycle


def prune_step(case):
    hyper = case.hyper
    first, n = hyper["sys_len"], hyper["n_visual"]
    text = first + n
    plus = case.kind == "prune_step_v2_plus"
    method = SparseVLM(version="plus", heads=hyper["top_heads"]) if plus else SparseVLM()
    embeds = case.tensor("inputs_embeds")[0].float()
    case.check("rater_affinity", rater_affinity(embeds[text:], embeds[first:text]), word="scores")
    raters = method.raters(embeds[text:], embeds[first:text])
    case.check("text_rater_mask", raters, word="indices")

    hidden, columns = (
        case.tensor("layer_output").float(),
        torch.arange(hyper["sys_len"] + n + hyper["n_text"]),
    )
    frequencies = hyper["rope_theta"] ** (-torch.arange(0, hyper["head_dim"], 2) / hyper["head_dim"])
    tokens = VisualTokens(
        features=hidden[:, first:text],
        text_attention=case.tensor("attn_text")[None, :, :, first:text],
        query_mask=raters[None],
        query_positions=columns[None, text:],
        positions=columns[None, first:text],
        rotary_frequencies=frequencies,
    )
    scores = method.score(tokens)
    if plus:
        case.check(
            "rope_weight", rope_weight(columns[None, :1], columns[None], frequencies)[0, 0], word="scores"
        )
        weight = rope_weight(tokens.query_positions, tokens.positions, frequencies)
        corrected = tokens.text_attention / weight[:, None]
        case.check(
            "selected_heads", top_heads(rated(corrected, tokens.query_mask), method.heads)[0], word="indices"
        )
        official = top_head_scores(corrected, tokens.query_mask, method.heads)
        if weight.min() > FLOOR * hyper["head_dim"] ** 0.5:  # the official code has no floor
            torch.testing.assert_close(scores, official)
        scores = official
    case.check("scores", scores[0])
    kept = min(hyper["budget"], n - 1)
    assert kept == hyper["kept_visual"]
    merged = (recycle if method.recycles else pick)(tokens.features, scores, kept)
    slots = merged.slots[0, :kept]
    keep = torch.zeros(n, dtype=torch.bool).index_fill(0, slots, True)
    case.check("keep_mask", keep, word="indices")
    stay = torch.cat([columns[:first], slots + first, columns[text:]])
    case.check("kept_indices", stay)

    clusters = merged.slots.shape[1] - kept
    assert clusters == hyper["clusters"]
    cut = columns[first:text][~keep]
    recycled = merged.features[0, kept:]
    if not plus:
        assert clusters == cluster_count(len(cut))
        best = scores[0, cut - first].sort(descending=True, stable=True).indices[: candidate_count(len(cut))]
        case.check("merge_candidates", cut[best])
        recycled = in_official_order(hidden[:, cut[best]], recycled[None])[0]
        case.check("merged_tokens", recycled, word="merged tokens")
    after = torch.cat([hidden[0, :first], merged.features[0, :kept], recycled, hidden[0, text:]])[None]
    case.check("hidden_after", after, word="merged tokens")
    places = torch.zeros(1, len(columns), dtype=torch.bool).index_fill(
        1, torch.cat([stay, cut[:clusters]]), True
    )
    ids = Compaction(places, torch.ones_like(places)).positions(columns[None], method.positions)
    case.check("position_ids_after", ids[0])


def in_official_order(x, merged):
    """Clusters (B, c, D) of the tokens x, where equally prominent centres stand as the official code happens
    to sort them.

    Two tokens that are each other's nearest have the same density, so two clusters always tie.
    """
    peaks = density_peaks(x, merged.shape[1])
    official = peaks.prominence.topk(merged.shape[1]).indices
    number = (official[:, :, None] == peaks.centres[:, None]).int().argmax(dim=-1)
    return merged.gather(1, number[..., None].expand_as(merged))


def cluster_and_merge(case):
    x, clusters = case.tensor("x").float(), case.hyper["clusters"]
    merged = cluster_means(x, density_peaks(x, clusters).assignment, clusters)
    case.check("merged", in_official_order(x, merged))


def rank_rule(case):
    first, n = case.hyper["sys_len"], case.hyper["n_visual"]
    raters = case.tensor("text_rater_mask")
    attention = case.tensor("attn_text")[None, :, :, first : first + n]
    rank, keep = sparsevlm_rank_budget(attention[0].mean(0)[raters], case.hyper["scale"], case.hyper["bias"])
    case.check("rank", torch.tensor(rank))
    case.check("keep", torch.tensor(keep))
    scores = SparseVLM().score(VisualTokens(text_attention=attention, query_mask=raters[None]))
    case.check(
        "keep_mask",
        torch.zeros(n, dtype=torch.bool).index_fill(0, top_k(scores, keep)[0], True),
        word="exact",
    )


RUNNERS = {
    "prune_step_v1_5": prune_step,
    "prune_step_v2_plus": prune_step,
    "cluster_and_merge": cluster_and_merge,
    "rank_budget": rank_rule,
}
