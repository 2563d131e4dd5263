# SPDX-License-Identifier: Apache-2.0
"""VAR: sinks, heads and edited rows from given states and attention; a small decoder through the re-weighting host."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from vlmprune.core.call import Call, Placed
from vlmprune.core.frames import Frame
from vlmprune.core.report import Report
from vlmprune.core.reweight import ReweightHost
from vlmprune.methods.var import VAR, sink_strength

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
        self.__dict__.setdefault("chosen", []).append(found[0])
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
    return visual, Call(None, None, Report("var"), placed=[Placed(visual, [[0]], [], [])]).text_of(0)


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
    chosen, mass, portion = method.image_centric(attention, sinks, visual)
    case.check("selected", chosen[0], word="selection")
    case.check("visual_mass", mass[0], word="attention")
    case.check("sink_portion", portion[0], word="attention")
    out = method.reweight(attention, sinks, visual)
    case.check("attn_out", out[0], word="attention")
    torch.testing.assert_close(out.sum(-1), attention.sum(-1), rtol=0, atol=2e-6)
    assert case.checked == set(case.arrays) - {"hidden_states", "attn_in"}


def decoder(case):
    state = {name.removeprefix("sd/"): case.tensor(name).float() for name in case.arrays if name.startswith("sd/")}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa"))
    model.load_state_dict(state)
    return model.eval()


@contextmanager
def hosted(model, method):
    """A re-weighting host on the model; the caller puts each call into the session."""
    session = SimpleNamespace(call=None, enabled=True, depth=5, adapter=SimpleNamespace(language_model=model.model))
    hooks = ReweightHost(session, method).hooks()
    try:
        yield session
    finally:
        for hook in hooks:
            hook.remove()


def call_of(past, fed, **known):
    valid = torch.ones(1, past + fed, dtype=torch.bool)
    frame = Frame(0, valid[:, :past], valid[:, past:], torch.arange(past, past + fed)[None], torch.zeros(1, dtype=torch.long))
    return Call(None, None, Report("var"), frames=[frame], **known)


def two_steps(model, method, prompt, token, visual):
    """Last logits of the prompt and logits of one decode step, with the marks of the prompt per layer."""
    cache = DynamicCache()
    with hosted(model, method) as session, torch.no_grad():
        call = session.call = call_of(0, prompt.shape[1], placed=[Placed(visual, [[0]], [], [])])
        first = model(inputs_embeds=prompt, past_key_values=cache).logits[0, -1]
        session.call = call_of(prompt.shape[1], 1, marks_before=call.marks)
        second = model(inputs_embeds=token, past_key_values=cache).logits[0, -1]
    return first, second, call.marks


def end_to_end(case):
    hyper, model = case.hyper, decoder(case)
    prompt, token = case.tensor("inputs_embeds").float(), case.tensor("decode_embed").float()
    visual, _ = columns_of(hyper)
    with torch.no_grad():
        case.check("logits_last_full", model(inputs_embeds=prompt).logits[0, -1], word="logits")
    for variant, skip in (("skip_last_layer", True), ("all_layers", False)):
        method = method_of(hyper, first_layer=hyper["first_layer"], skip_last_layer=skip).prepare(model.model)
        first, second, marks = two_steps(model, method, prompt, token, visual)
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
