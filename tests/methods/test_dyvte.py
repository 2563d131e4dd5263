# SPDX-License-Identifier: Apache-2.0
"""DyVTE with a fixed exit: no visual token behind it, in whatever mode the model runs."""

from __future__ import annotations

import pytest
import random_weights
import torch

import vlmprune
from vlmprune.core.method import CutPoint
from vlmprune.core.weights import backbone_of, write_weights
from vlmprune.errors import InvariantError, SpecError, UnsupportedError
from vlmprune.methods.dyvte import DyVTE, gate_features, gate_logits
from vlmprune.testing.checks_inside import cut_equals_twin, every_mode_equals_twin
from vlmprune.testing.conformance import Subject, generate
from vlmprune.testing.processors import PAD_ID
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row


def test_all_tokens_leave_behind_one_layer():
    assert DyVTE(exit=15).cuts(32, None, 576) == (CutPoint(16, 0, source=None),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dyvte", "no weights of one are available; give a fixed layer"),
        ("dyvte(exit=1)@9", "drop '@9'"),
        ("dyvte(exit=3)", "choose at most 2"),
        ("dyvte(exit=-1)", "expected a decoder layer from 0 on"),
    ],
)
def test_what_cannot_run_says_so_before_it_is_attached(spec, message):
    with pytest.raises(SpecError, match=message):
        vlmprune.prune(tiny_model("llava"), spec)


def test_the_report_counts_no_token_behind_the_exit():
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1, 2))
    with vlmprune.prune(model, "dyvte(exit=1)") as run:
        generate(model, inputs)
        report = run.last
    assert report.realised_tokens == [0, 0, 0] and report.dense_tokens == [36] * 3
    assert report.tokens_per_layer == [36, 36, 0, 0]
    assert [kept.keep_idx.tolist() for kept in report.keep] == [[], [], []]
    assert run.spec == "dyvte(exit=1)" and report.pruned and "0 of 108 visual tokens" in str(report)


@pytest.mark.parametrize("exit", [0, 2])
def test_a_ragged_batch_equals_the_slow_twin(exit):
    cut_equals_twin(Subject(f"dyvte(exit={exit})", "llava"))


def test_modes_of_generate_equal_a_model_that_masks():
    modes = {
        "greedy": {},
        "no cache": {"use_cache": False},
        "static cache": {"cache_implementation": "static"},
    }
    every_mode_equals_twin(Subject("dyvte(exit=1)", "llava"), modes)


@pytest.mark.parametrize("batched", [False, True])
def test_a_prompt_of_a_picture_alone_is_refused(batched):
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    whole, pixels = inputs["input_ids"], inputs["pixel_values"]
    ids = whole[whole == model.config.image_token_id][None]
    mask = torch.ones_like(ids)
    if batched:  # beside a row with text
        padding = (whole.shape[1] - ids.shape[1], 0)
        ids = torch.cat([whole, torch.nn.functional.pad(ids, padding, value=PAD_ID)])
        mask = torch.cat([torch.ones_like(whole), torch.nn.functional.pad(mask, padding)])
        pixels = pixels.repeat(2, 1, 1, 1)
    with vlmprune.prune(model, "dyvte(exit=1)"), pytest.raises(InvariantError, match="holds nothing else"):
        model(input_ids=ids, attention_mask=mask, pixel_values=pixels)


def test_a_gate_reads_the_mean_of_the_text_and_its_last_token():
    torch.manual_seed(0)
    h, W1, W2 = torch.randn(1, 5, 4), torch.randn(6, 8), torch.randn(2, 6)
    f = torch.cat([h[0, :4].sum(dim=0) / 4, h[0, 4]])
    torch.testing.assert_close(gate_features(h)[0], f)
    hidden = W1 @ f
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(gate_logits(f[None], W1, W2)[0], W2 @ gelu)
    with pytest.raises(SpecError, match="1 tokens of text"):
        gate_features(h[:, :1])


# --- gates ----------------------------------------------------------------------------------------


def with_gates(folder, model, seed=0, gates=(0, 1, 2), bias=0.0):
    """A spec with random gates; ``bias`` moves all of them towards an exit."""
    backbone = backbone_of(model.config)
    tensors = random_weights.gates(backbone["hidden_size"], gates, seed)
    write_weights(folder, "dyvte", tensors, {"backbone": backbone, "gates": list(gates)})
    return f"dyvte(weights={str(folder)!r},margin={-bias})", tensors


def exit_of(model, inputs, tensors, gates, margin):
    """The layer behind which the tokens of one prompt leave in a dense run, None where they stay."""
    outputs = []
    layers = model.model.language_model.layers
    handles = [layer.register_forward_hook(lambda m, a, out: outputs.append(out)) for layer in layers]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    after = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1]) + 1
    for gate in gates:
        h = (outputs[gate][0] if isinstance(outputs[gate], tuple) else outputs[gate])[:, after:]
        z = gate_logits(gate_features(h), tensors[f"gate.{gate}.w1"], tensors[f"gate.{gate}.w2"])[0]
        if float(z[1] - z[0]) > margin:
            return gate
    return None


def test_every_row_of_a_ragged_batch_leaves_where_its_own_gate_says(tmp_path):
    model, images = tiny_model("llava"), (1, 2, 0, 1)
    inputs, exits = tiny_inputs(images=images), set()
    spec, tensors = with_gates(tmp_path, model, seed=6)
    with vlmprune.prune(model, spec) as run:
        together = generate(model, inputs)
        without = generate(model, inputs, use_cache=False)
        tokens = run.last.layer_tokens
    assert torch.equal(together, without)
    picture = 0
    for row, count in enumerate(images):
        alone = tiny_row(inputs, "llava", row, images)
        layer = None if count == 0 else exit_of(model, alone, tensors, (0, 1, 2), 0.0)
        with vlmprune.prune(model, "dense" if layer is None else f"dyvte(exit={layer})"):
            assert torch.equal(generate(model, alone)[0], together[row]), f"row {row}"
        left = [36] * 4 if layer is None else [36] * (layer + 1) + [0] * (3 - layer)
        assert tokens[picture : picture + count] == [left] * count
        picture, exits = picture + count, exits | {layer}
    assert exits == {None, 0, 1}, "the rows shall leave at different layers"


def test_gates_that_never_say_so_leave_the_model_dense_and_decoding_runs(tmp_path):
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1, 1))
    spec, _ = with_gates(tmp_path, model, bias=-1e5)
    dense = generate(model, inputs)
    with vlmprune.prune(model, spec) as run:
        assert torch.equal(generate(model, inputs), dense)
        assert run.last.realised_tokens == [36, 36]
    spec, _ = with_gates(tmp_path, model, bias=1e5)
    with vlmprune.prune(model, spec) as run:
        generate(model, inputs)
        assert run.last.layer_tokens == [[36, 0, 0, 0]] * 2


def test_less_than_two_tokens_of_text_say_nothing(tmp_path):
    model, inputs = tiny_model("llava"), tiny_inputs()
    after = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1]) + 1
    spec, _ = with_gates(tmp_path, model, bias=1e5)
    with vlmprune.prune(model, spec) as run, torch.no_grad():
        for text, left in ((1, 36), (2, 0)):
            cut = {name: inputs[name][:, : after + text] for name in ("input_ids", "attention_mask")}
            model(**{**inputs, **cut})
            assert run.last.realised_tokens == [left]


def test_gates_of_another_model_and_bad_files_are_refused(tmp_path):
    model = tiny_model("llava")
    spec, tensors = with_gates(tmp_path, model)
    with pytest.raises(UnsupportedError, match="this model is"):
        vlmprune.prune(tiny_model("llava", layers=5), spec)
    with pytest.raises(SpecError, match="give one of them"):
        DyVTE(exit=1, weights=str(tmp_path))
    backbone = backbone_of(model.config)
    for facts, message in (
        ({"gates": []}, "expected ascending layers"),
        ({"gates": [1, 0]}, "expected ascending layers"),
        ({"gates": [0, "1", None]}, "expected ascending layers"),
        ({"gates": [0, 1]}, r"have \['gate.2.w1', 'gate.2.w2'\]"),
        ({"gates": [0, 1, 2], "backbone": {**backbone, "hidden_size": 65}}, "expected 130"),
    ):
        write_weights(tmp_path, "dyvte", tensors, {"backbone": backbone, **facts})
        with pytest.raises(SpecError, match=message):
            DyVTE(weights=str(tmp_path))
