# SPDX-License-Identifier: Apache-2.0
"""DyVTE: gates on given states, and a whole decoder that its tokens leave where the gate says."""

from __future__ import annotations

import tempfile

import torch
from given_decoder import attach_to_decoder, given_decoder

from vlmprune.core.weights import write_weights
from vlmprune.hooks.sequence.compaction import Compaction
from vlmprune.methods.dyvte import DyVTE, gate_features, gate_logits


def walk(outputs, end, W1, W2):
    """Features and logits of every gate up to the first that lets the tokens leave, and its layer (-1:
    none).
    """
    features, logits = [], []
    for layer, h in enumerate(outputs):
        features.append(gate_features(h[None, end:]))
        logits.append(gate_logits(features[-1], W1[layer], W2[layer]))
        if logits[-1][0, 1] > logits[-1][0, 0]:
            return torch.cat(features), torch.cat(logits), layer
    return torch.cat(features), torch.cat(logits), -1


def gate(case):
    hyper, outputs = case.hyper, case.tensor("layer_outputs").float()
    first, length = hyper["sys_len"], outputs.shape[1]
    end = first + hyper["n_visual"]
    features, logits, layer = walk(outputs, end, case.tensor("w1"), case.tensor("w2"))
    case.check("features", features, word="logits")
    case.check("gate_logits", logits, word="logits")
    case.check("exit_layer", torch.tensor(layer))
    stays = torch.ones(1, length, dtype=torch.bool)
    if layer >= 0:
        (point,) = DyVTE(exit=layer).cuts(layer + 2, None, end - first)
        assert (point.layer, point.keep) == (layer + 1, 0)
        stays[0, first:end] = False
    compaction = Compaction(stays, torch.ones_like(stays))
    case.check("kept_indices", compaction.index[0])
    columns = torch.arange(length)[None]
    # the ids that the last of the given layers used: an exit behind it comes too late for them
    used = columns if layer == len(outputs) - 1 else compaction.positions(columns, DyVTE.positions)
    case.check("position_ids", used[0])


def asking(W1, W2):
    """The method with these gates, read from files of weights."""
    tensors = {f"gate.{layer}.w1": one for layer, one in enumerate(W1)}
    tensors |= {f"gate.{layer}.w2": one for layer, one in enumerate(W2)}
    facts = {"backbone": {"hidden_size": W1[0].shape[1] // 2}, "gates": list(range(len(W1)))}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(folder, "dyvte", tensors, facts)
        return DyVTE(weights=folder)


def end_to_end(case):
    """The session's own hooks on the given decoder, asking the gates: prefill, cache and one decode step."""
    first, end = case.hyper["visual_slice"]
    state = {name[3:]: case.tensor(name) for name in case.arrays if name.startswith("sd/")}
    gates = {name: state.pop(name) for name in list(state) if "visual_gates_router" in name}
    model, embeds, outputs = given_decoder(case.config, state), case.tensor("inputs_embeds").float(), []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in model.language_model.layers
    ]
    W1, W2 = (
        [gates[f"model.visual_gates_router.{layer}.{name}.weight"] for layer in range(len(handles))]
        for name in ("w1", "w2")
    )
    with torch.no_grad():
        case.check("logits_last_full", model.read(embeds, []).logits[0, -1], word="logits")
        for handle in handles:
            handle.remove()
        outputs = [output[0] if isinstance(output, tuple) else output for output in outputs]
        _, logits, layer = walk([output[0] for output in outputs], end, W1, W2)
        case.check("gate_logits", logits, word="logits")
        case.check("exit_layer", torch.tensor(layer))
        with attach_to_decoder(model, asking(W1, W2)) as run:
            output = model.read(embeds, [(first, end)])
            assert run.last.realised_tokens == [0] and run.last.keep[0].keep_idx.shape == (0,)
            assert run.last.layer_tokens == [[end - first] * (layer + 1) + [0] * (run.depth - layer - 1)]
            held = [output.past_key_values.get_seq_length(layer) for layer in range(run.depth)]
            decoded = model.step(case.tensor("decode_embed").float(), output.past_key_values)
    case.check("logits_last", output.logits[0, -1], word="logits")
    case.check("logits_decode", decoded.logits[0, -1], word="logits")
    case.check("kv_lengths", torch.tensor(held), word="exact")


RUNNERS = {"gate": gate, "end_to_end": end_to_end}
