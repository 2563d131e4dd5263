# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: one ranking and cut from given projections, alone and in a padded batch, and all stages of a
whole decoder.
"""

from __future__ import annotations

import torch
from given_decoder import attach_to_decoder, given_decoder
from transformers import LlamaConfig, LlamaForCausalLM

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.hooks.attention_tap import AttentionTap, find_attention, probe
from vlmprune.hooks.sequence.compaction import Compaction
from vlmprune.methods.pyramiddrop import PyramidDrop


def rank_and_drop(case):
    hyper = case.hyper
    first, n, stage = hyper["sys_len"], hyper["n_visual_now"], hyper["stage"]
    method, given, valid = ranking_layer(case)
    length = valid.shape[1]
    attention = given.attention(torch.tensor([[length - 1]]))  # (1, H, 1, L)
    case.check("attn_rows", attention[0, :, 0])
    tokens = VisualTokens(text_attention=attention[..., first : first + n], cut=stage)
    case.check("scores", method.score(tokens)[0])
    keep = keep_of(method, hyper["n_visual_original"], stage)
    assert keep == hyper["keep"]
    stays = torch.ones(1, length, dtype=torch.bool)
    stays[0, first : first + n] = False
    stays[0, first + choose(method, tokens, keep)[0]] = True
    compaction = Compaction(stays, valid)
    case.check("kept_indices", compaction.index[0], word="indices")
    case.check(
        "position_ids", compaction.positions(torch.arange(length)[None], method.positions)[0], word="indices"
    )


def rank_and_drop_batch(case):
    """Ragged samples, one of them without a picture; the vectors pad on the right, a compaction on the
    left."""
    samples, stage = case.hyper["samples"], case.hyper["stage"]
    method, given, valid = ranking_layer(case)
    counts = valid.sum(dim=1)
    attention = given.attention((counts - 1)[:, None])
    stays = valid.clone()
    for row, sample in enumerate(samples):
        first, n = sample["sys_len"], sample["n_visual_original"]
        if n:
            tokens = VisualTokens(text_attention=attention[row : row + 1, ..., first : first + n], cut=stage)
            stays[row, first : first + n] = False
            stays[row, first + choose(method, tokens, keep_of(method, n, stage))[0]] = True
    compaction = Compaction(stays, valid)
    numbers = compaction.positions((valid.cumsum(dim=1) - 1).clamp_min(0), method.positions)
    case.check("new_length", compaction.count)
    order = compaction.valid.to(torch.int8).argsort(
        dim=1, descending=True, stable=True
    )  # tokens first, dead slots last
    valid = compaction.valid.gather(1, order)
    case.check("new_mask", valid)
    case.check("kept_indices", compaction.index.gather(1, order).masked_fill(~valid, -1))
    case.check("position_ids", numbers.gather(1, order).masked_fill(~valid, 0))


def end_to_end(case):
    """The session's own hooks on the given decoder: every stage, the cache, and one decode step with
    positions per layer.
    """
    model, hyper, scores, left = decoder(case), case.hyper, {}, {}
    layers = tuple(hyper["layer_list"])

    class Watched(PyramidDrop):
        def score(self, tokens):
            scores[layers[tokens.cut]] = super().score(tokens)
            return scores[layers[tokens.cut]]

    first, end = hyper["visual_slice"]
    embeds = case.tensor("inputs_embeds").float()
    method = Watched(layers=layers, shares=tuple(hyper["ratio_list"]))
    with torch.no_grad():
        case.check("logits_last_full", model.read(embeds, []).logits[0, -1], word="logits")
        with attach_to_decoder(model, method) as run:
            for layer in layers:  # hooks that come after the session's own see what it did

                def watch(module, args, layer=layer):
                    if run.state.inside is not None:
                        left[layer] = run.state.inside.spans[0].ids

                run._installed.append(model.language_model.layers[layer].register_forward_pre_hook(watch))
            output = model.read(embeds, [(first, end)])
            held = [output.past_key_values.get_seq_length(layer) for layer in range(run.depth)]
            decoded = model.step(case.tensor("decode_embed").float(), output.past_key_values)
    columns = torch.arange(embeds.shape[1])
    for layer, keep in zip(layers, hyper["keep_counts"], strict=True):
        assert len(left[layer]) == keep
        kept = torch.cat([columns[:first], left[layer] + first, columns[end:]])
        case.check(f"kept_before_layer_{layer}", kept, word="kept")
        torch.testing.assert_close(
            scores[layer][0], case.tensor(f"scores_layer_{layer}"), rtol=1e-4, atol=1e-6
        )
    case.check("logits_last", output.logits[0, -1], word="logits")
    case.check("logits_decode", decoded.logits[0, -1], word="logits")
    case.check("kv_lengths", torch.tensor(held), word="kept")


def keep_of(method, original, stage):
    return method.cuts(32, None, original)[stage].keep


def ranking_layer(case):
    """The method, what the attention that ranks is given at positions 0, 1, ... per sample, and (B, L) which
    columns are tokens.
    """
    hyper, hidden = case.hyper, case.tensor("features").float()
    valid = (
        case.tensor("attention_mask")
        if "attention_mask" in case.arrays
        else torch.ones(hidden.shape[:2], dtype=torch.bool)
    )
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=hidden.shape[-1],
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=hyper["heads"],
        num_key_value_heads=hyper["kv_heads"],
        head_dim=hyper["head_dim"],
        rms_norm_eps=1e-6,
    )
    model = LlamaForCausalLM(config).model.eval()
    layer = model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight.copy_(case.tensor("input_layernorm"))
        layer.self_attn.q_proj.weight.copy_(case.tensor("q_proj"))
        layer.self_attn.k_proj.weight.copy_(case.tensor("k_proj"))
    length = hidden.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    given = {
        "position_embeddings": model.rotary_emb(hidden, (valid.cumsum(dim=1) - 1).clamp_min(0)),
        "attention_mask": (causal & valid[:, None])[:, None],
    }
    tap = AttentionTap(find_attention(layer), lambda call, output: None)
    tap.install()
    attended = probe(layer, hidden, given, None, 0)
    tap.remove()
    shares = tuple(hyper["ratio_list"])
    method = PyramidDrop(
        layers=tuple(range(1, len(shares) + 1)), shares=shares
    )  # which layers is not in these vectors
    return method, attended, valid.bool()


def decoder(case):
    """The decoder of an end-to-end case, weights included."""
    return given_decoder(
        case.config, {name[3:]: case.tensor(name) for name in case.arrays if name.startswith("sd/")}
    )


RUNNERS = {
    "rank_and_drop": rank_and_drop,
    "rank_and_drop_batch": rank_and_drop_batch,
    "end_to_end": end_to_end,
}
