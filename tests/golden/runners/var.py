# SPDX-License-Identifier: Apache-2.0
"""VAR: sinks, heads and edited rows from given states and attention; a small decoder with the session's own
hooks.
"""

from __future__ import annotations

import torch
from given_decoder import attach_to_decoder, given_decoder

from vlmprune.hooks.sequence.cache import state_of
from vlmprune.hooks.sequence.placement import Columns
from vlmprune.methods.var import VAR, mass_and_portion, sink_strength

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "rms_norm_eps": 1e-6,
}


class Recorded(VAR):
    """Notes which (head, row) pairs were edited, call after call."""

    def image_centric(self, attention, sinks, visual):
        found = super().image_centric(attention, sinks, visual)
        self.__dict__.setdefault("chosen", []).append(found)
        return found


def method_of(hyper, **options):
    assert hyper["rms_eps"] == 1e-6, "written into sink_strength"
    return Recorded(
        dims=tuple(hyper["sink_dims"]),
        tau=hyper["tau"],
        sink_keep=hyper["sink_keep"],
        max_sink_portion=hyper["rho_max_sink_portion"],
        min_visual_mass=hyper["min_visual_mass"],
        **options,
    )


def columns_of(hyper):
    """(1, L) bool of the prompt: the picture, and where a prompt is edited."""
    first, last = hyper["visual_slice"]
    columns = torch.arange(last + hyper["n_text"])[None]
    visual = (columns >= first) & (columns < last)
    return visual, Columns.of([visual], None).after_pictures()


def rows(case):
    hyper, method = case.hyper, method_of(case.hyper)
    hidden = case.tensor("hidden_states").float()
    visual, text = columns_of(hyper)
    phi = sink_strength(hidden, method.dims)
    case.check("phi", phi[0], word="attention")
    sinks = method.mark(hidden, None)
    case.check("sink_indices", sinks[0].nonzero()[:, 0], word="indices")
    case.check("visual_sink_indices", (sinks & visual)[0].nonzero()[:, 0], word="indices")

    new = hyper["keys"] - visual.shape[1]  # tokens decoded since the prompt
    assert (new > 0) == (case.kind == "decode_row")
    edited = torch.tensor([hyper["keys"] - 1]) if new else text[0].nonzero()[:, 0]
    case.check("query_rows", edited, word="indices")
    sinks, visual = (torch.nn.functional.pad(mask, (0, new)) for mask in (sinks, visual))
    attention = case.tensor("attn_in")[None]
    mass, portion = mass_and_portion(attention, sinks, visual)
    case.check("selected", method.image_centric(attention, sinks, visual)[0], word="selection")
    case.check("visual_mass", mass[0], word="attention")
    case.check("sink_portion", portion[0], word="attention")
    out = method.reweight(attention, sinks, visual)
    case.check("attn_out", out[0], word="attention")
    torch.testing.assert_close(out.sum(-1), attention.sum(-1), rtol=0, atol=2e-6)
    assert case.checked == set(case.arrays) - {"hidden_states", "attn_in"}


def decoder(case):
    state = {name.removeprefix("sd/"): case.tensor(name) for name in case.arrays if name.startswith("sd/")}
    return given_decoder({**SHAPE, "attn_implementation": "sdpa"}, state)


def two_steps(model, method, prompt, token, span):
    """Last logits of the prompt, logits of one decode step, the marks of the prompt per layer, and the method
    as attached.
    """
    with torch.no_grad(), attach_to_decoder(model, method) as run:
        output = model.read(prompt, [span])
        marks = state_of(output.past_key_values).marks
        second = model.step(token, output.past_key_values)
    return output.logits[0, -1], second.logits[0, -1], marks, run.slots["attention"].method


def end_to_end(case):
    hyper, model = case.hyper, decoder(case)
    prompt, token = case.tensor("inputs_embeds").float(), case.tensor("decode_embed").float()
    with torch.no_grad():
        case.check("logits_last_full", model.read(prompt, []).logits[0, -1], word="logits")
    for variant, skip in (("skip_last_layer", True), ("all_layers", False)):
        method = method_of(hyper, first_layer=hyper["first_layer"], skip_last_layer=skip)
        first, second, marks, method = two_steps(model, method, prompt, token, tuple(hyper["visual_slice"]))
        case.check(f"logits_last_{variant}", first, word="logits")
        case.check(f"logits_decode_{variant}", second, word="logits")
    layers = list(method.acts_on(5))
    assert layers == list(marks)
    for layer, chosen in zip(layers, method.chosen[: len(layers)], strict=True):
        case.check(f"sinks_layer_{layer}", marks[layer].marked[0].nonzero()[:, 0], word="indices")
        case.check(f"selected_layer_{layer}", chosen[0], word="selection")
    inputs = {"inputs_embeds", "decode_embed"}
    assert case.checked == {name for name in case.arrays if not name.startswith("sd/")} - inputs


RUNNERS = {"prefill_text_rows": rows, "decode_row": rows, "end_to_end": end_to_end}
