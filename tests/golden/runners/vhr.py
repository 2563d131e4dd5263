# SPDX-License-Identifier: Apache-2.0
"""VHR: heads from given outputs, and a small decoder with the session's own hooks and its text pass."""

from __future__ import annotations

import torch
from given_decoder import attach_to_decoder, given_decoder

from vlmprune.methods.vhr import VHR, activation


def heads(case):
    hyper = case.hyper
    method = VHR(alpha=hyper["alpha"], variant=hyper["variant"])
    with_image, without = case.tensor("with_image")[None], case.tensor("without_image")[None]
    divergence = method.divergence(with_image, without)
    case.check("divergence", divergence[0])
    case.check("text_activation", activation(without)[0])
    outliers = method.outliers(divergence, without)
    case.check("outliers", outliers[0])
    case.check("chosen", method.chosen(divergence, outliers)[0])
    factors = method.head_scales(with_image, without, 0)[0]  # (H,)
    rows = case.tensor("input_of_projection").unflatten(-1, (factors.shape[0], -1))
    case.check("scaled", (rows * factors[:, None]).flatten(1))


class Recorded(VHR):
    """Notes what was found in every layer."""

    def head_scales(self, with_image, without, layer):
        found = super().head_scales(with_image, without, layer)
        self.__dict__.setdefault("seen", {})[layer] = (self.divergence(with_image, without)[0], found[0] != 1)
        return found


def end_to_end(case):
    hyper = case.hyper
    state = {
        name.removeprefix("param/"): case.tensor(name) for name in case.arrays if name.startswith("param/")
    }
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model = given_decoder({**case.config, "attn_implementation": "sdpa"}, state)
    method = Recorded(alpha=hyper["alpha"], variant=hyper["variant"], layers=tuple(hyper["layers"]))
    prompt, steps = case.tensor("inputs_embeds").float(), case.tensor("step_embeds").float()
    with torch.no_grad(), attach_to_decoder(model, method):
        output = model.read(prompt, [tuple(hyper["visual_slice"])])
        logits, cache = [output.logits[0, -1]], output.past_key_values
        logits += [model.step(step[None, None], cache).logits[0, -1] for step in steps]
    found = [method.seen[layer] for layer in hyper["layers"]]
    case.check("divergence", torch.stack([divergence for divergence, _ in found]))
    case.check("chosen", torch.stack([chosen for _, chosen in found]))
    case.check("logits", torch.stack(logits))


RUNNERS = {"heads": heads, "end_to_end": end_to_end}
