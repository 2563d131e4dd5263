# SPDX-License-Identifier: Apache-2.0
"""DART: pivots and kept sets from given keys and states, in the official order and in ours, and a whole
decoder.
"""

from __future__ import annotations

import torch
from given_decoder import attach_to_decoder, given_decoder

from vlmprune.core.budget import Budget
from vlmprune.core.select import best_first, choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.dart import DART, set_order


def selection(case):
    hyper = case.hyper
    first, n = hyper["visual_start"], hyper["n_visual"]
    end = first + n
    tokens = given_tokens(case.tensor("keys").permute(1, 0, 2), case.tensor("states"), first, end)
    official, exact = methods(hyper)
    P_v, P_t = (
        best_first(official.norms(keys), hyper[f"pivot_{what}_token"])
        for keys, what in ((tokens.lm_keys, "image"), (tokens.text_keys, "text"))
    )
    case.check("image_pivots", P_v[0])
    case.check("text_pivots", P_t[0] + end)
    rows = torch.cat([P_v, P_t + n], dim=1)
    case.check("pivot_order", (rows + first).gather(1, set_order(tokens, rows, n))[0])
    asked = hyper["max_num_trunction"] or hyper["retain_token_num_for_llava_next"]
    (point,) = official.cuts(32, Budget(asked), n)
    assert point.keep == hyper["kept"]
    case.check("kept_visual", choose(official, tokens, point.keep)[0])
    case.check("kept_visual_norm_order", choose(exact, tokens, point.keep)[0])


def end_to_end(case):
    """The session's own hooks on the given decoder: prefill, cache and one decode step, in both orders."""
    hyper = case.hyper
    first = hyper["visual_start"]
    end = first + hyper["n_visual"]
    model = given_decoder(
        case.config, {name[3:]: case.tensor(name) for name in case.arrays if name.startswith("sd/")}
    )
    embeds, seen = case.tensor("inputs_embeds").float(), {}
    official, exact = methods(hyper, hyper["K"])
    with torch.no_grad():
        case.check("logits_last_full", model.read(embeds, []).logits[0, -1])
        for method, keep, name in (
            (official, hyper["max_num_trunction"], ""),
            (exact, hyper["kept"], "_norm_order"),
        ):
            watched = watching(method, seen)
            with attach_to_decoder(model, watched, keep=keep) as run:
                output = model.read(embeds, [(first, end)])
                kept = run.last.keep[0].keep_idx
                held = [output.past_key_values.get_seq_length(layer) for layer in range(run.depth)]
                decoded = model.step(case.tensor("decode_embed").float(), output.past_key_values)
            case.check(f"kept_visual{name}", kept)
            case.check(f"logits_last{name}", output.logits[0, -1])
            case.check(f"logits_decode{name}", decoded.logits[0, -1])
            case.check("kv_lengths", torch.tensor(held))
            if method is official:
                columns = torch.arange(embeds.shape[1])
                case.check("kept_indices", torch.cat([columns[:first], kept + first, columns[end:]]))
    tokens, n = seen["tokens"], end - first
    P_v = best_first(exact.norms(tokens.lm_keys), hyper["pivot_image_token"])
    P_t = best_first(exact.norms(tokens.text_keys), hyper["pivot_text_token"])
    rows = torch.cat([P_v, P_t + n], dim=1)
    case.check("image_pivots", P_v[0])
    case.check("text_pivots", P_t[0] + end)
    case.check("pivot_order", (rows + first).gather(1, set_order(tokens, rows, n))[0])


def watching(method, seen):
    """The method, which leaves what it was given in ``seen``."""

    class Watched(DART):
        def select(self, tokens, k):
            seen["tokens"] = tokens
            return super().select(tokens, k)

    return Watched(**vars(method))


def methods(hyper, layer=2):
    pivots = {
        "visual_pivots": hyper["pivot_image_token"],
        "text_pivots": hyper["pivot_text_token"],
        "layer": layer,
    }
    return DART(variant="official", **pivots), DART(**pivots)


def given_tokens(keys, states, first, end):
    """Tokens of keys (L, Hk, d) and states (L, D), the picture at columns first .. end - 1."""
    columns = torch.arange(keys.shape[0])[None]
    return VisualTokens(
        lm_keys=keys[None, first:end],
        lm_states=states[None, first:end],
        text_keys=keys[None, end:],
        text_states=states[None, end:],
        positions=columns[:, first:end],
        query_positions=columns[:, end:],
    )


RUNNERS = {"selection": selection, "end_to_end": end_to_end}
