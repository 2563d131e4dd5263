# SPDX-License-Identifier: Apache-2.0
"""FastV: kept sets from given attention, what the masked variant may see, the official roundings, and a whole
decoder.
"""

from __future__ import annotations

import torch
from given_decoder import attach_to_decoder, given_decoder
from official_rules import fastv_keep
from transformers import LlamaConfig

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.hooks.attention_call import AttentionCall
from vlmprune.hooks.sequence.compaction import Compaction
from vlmprune.hooks.sequence.views import SequenceView
from vlmprune.methods.fastv import FastV


def chosen(case):
    """The method, its tokens, and (1, L) which columns stay."""
    first, n = case.hyper["sys_len"], case.hyper["n_visual"]
    rows = (
        case.tensor("attn_last") if "attn_last" in case.arrays else case.tensor("attn_full")[:, -1]
    )  # (H, L)
    method = FastV(layer=case.hyper["K"])
    tokens = VisualTokens(text_attention=rows[None, :, None, first : first + n])
    kept = choose(method, tokens, case.hyper["keep"])[0] + first
    case.check("kept_visual", kept, word="indices")
    stays = torch.ones(1, rows.shape[1], dtype=torch.bool)
    stays[0, first : first + n] = False
    stays[0, kept] = True
    return method, tokens, stays


def selection(case):
    method, tokens, stays = chosen(case)
    compaction = Compaction(stays, torch.ones_like(stays))
    case.check("scores", method.score(tokens)[0])
    case.check("kept_indices", compaction.index[0], word="indices")
    case.check(
        "position_ids",
        compaction.positions(torch.arange(stays.shape[1])[None], method.positions)[0],
        word="indices",
    )


def token_mask_mode(case):
    """Dropped keys are hidden from every query, dropped ones included: what a cut leaves visible, to queries
    that it cut too.
    """
    _, _, stays = chosen(case)
    length = stays.shape[1]
    columns = torch.arange(length)[None]
    view = SequenceView(0, stays[:, :0], stays, columns, torch.zeros(1, dtype=torch.long))
    config = LlamaConfig(**TINY, attn_implementation="sdpa")
    mask = view.mask(config, 0, torch.zeros(1, length, 8), None)
    states = torch.zeros(1, 1, length, 8)
    case.check("allowed", AttentionCall(None, states, states, states, mask, {}).visible(columns)[0, 0])


def budget(case):
    numbers = list(zip(case.tensor("n_visual").tolist(), case.tensor("drop_ratio").tolist(), strict=True))
    case.check("keep_round", torch.tensor([fastv_keep(n, drop, "round") for n, drop in numbers]))
    case.check("keep_trunc", torch.tensor([fastv_keep(n, drop, "truncate") for n, drop in numbers]))


def end_to_end(case):
    """The session's own hooks on the given decoder: prefill, cache and one decode step."""
    model, hyper, scores = decoder(case), case.hyper, []

    class Watched(FastV):
        def score(self, tokens):
            scores.append(super().score(tokens))
            return scores[-1]

    first, end = hyper["visual_slice"]
    embeds = case.tensor("inputs_embeds").float()
    with torch.no_grad():
        case.check("logits_last_full", model.read(embeds, []).logits[0, -1], word="logits")
        with attach_to_decoder(model, Watched(layer=hyper["K"]), keep=hyper["keep"]) as run:
            output = model.read(embeds, [(first, end)])
            kept = run.last.keep[0].keep_idx + first
            held = [output.past_key_values.get_seq_length(layer) for layer in range(run.depth)]
            decoded = model.step(case.tensor("decode_embed").float(), output.past_key_values)
    columns = torch.arange(embeds.shape[1])
    case.check("kept_indices", torch.cat([columns[:first], kept, columns[end:]]))
    torch.testing.assert_close(scores[0][0], case.tensor("scores"), rtol=1e-4, atol=1e-6)
    case.check("logits_last", output.logits[0, -1], word="logits")
    case.check("logits_decode", decoded.logits[0, -1], word="logits")
    case.check("kv_lengths", torch.tensor(held))


TINY = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}


def decoder(case):
    """The decoder of an end-to-end case, weights included."""
    return given_decoder(
        case.config, {name[3:]: case.tensor(name) for name in case.arrays if name.startswith("sd/")}
    )


RUNNERS = {
    "selection": selection,
    "token_mask_mode": token_mask_mode,
    "budget": budget,
    "end_to_end": end_to_end,
}
