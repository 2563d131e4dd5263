# SPDX-License-Identifier: Apache-2.0
"""RCP: cuts that trained pruners decide, and repairs that follow the conversation."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from random_weights import RCP as FACTS
from random_weights import drawn

import vlmprune
from vlmprune.core.weights import backbone_of, write_weights
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.methods.rcp import shapes_of, shares_at
from vlmprune.methods.rcp.losses import mean_share
from vlmprune.methods.rcp.pruner import SHAPES, pruner_scores
from vlmprune.methods.rcp.repair import positions_for
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row
from vlmprune.training.data import NO_LOSS, batch_of, read_data
from vlmprune.training.rcp import RCPTraining


def written(folder, model, seed=0, scale=1.0, **fixed):
    """Random weights for a model; ``fixed`` gives all tensors whose names end so a value."""
    tensors = drawn(shapes_of(FACTS), model.config.get_text_config().hidden_size, seed)
    for name, value in tensors.items():
        end = name.rsplit(".", 1)[-1]
        value.copy_(torch.full_like(value, fixed[end]) if end in fixed else scale * value)
    write_weights(folder, "rcp", tensors, {"backbone": backbone_of(model.config), **FACTS})
    return f"rcp(weights={str(folder)!r})"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava")


def test_pruners_that_keep_all_and_repairs_that_do_nothing_are_the_dense_model(model, tmp_path):
    spec, inputs = written(tmp_path, model, keep_bias=1e4, alpha=0), tiny_inputs(images=(1, 2))
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, spec) as run:
            assert torch.equal(model(**inputs).logits, dense)
            assert run.last.realised_tokens == [36] * 3


def test_a_picture_keeps_its_best_token(model, tmp_path):
    spec = written(tmp_path, model, keep_bias=-1e4)
    with vlmprune.prune(model, spec) as run:
        generate(model, tiny_inputs(images=(1, 2)))
        assert run.last.realised_tokens == [1] * 3 and run.last.tokens_per_layer == [36, 1, 1, 1]


def test_the_number_kept_differs_from_picture_to_picture_and_a_row_is_as_alone(model, tmp_path):
    spec, inputs = written(tmp_path, model, seed=3), tiny_inputs(images=(1, 2))
    with vlmprune.prune(model, spec) as run:
        ids = generate(model, inputs)
        together = run.last.layer_tokens
        alone, counts = [], []
        for row, images in enumerate((1, 2)):
            alone.append(generate(model, tiny_row(inputs, "llava", row, (1, 2))))
            counts += run.last.layer_tokens
            assert all(a >= b for tokens in run.last.layer_tokens for a, b in pairwise(tokens))
            assert len(run.last.layer_tokens) == images
    assert torch.equal(ids, torch.cat(alone)) and together == counts
    assert len({tuple(tokens) for tokens in counts}) > 1


@pytest.mark.parametrize("images", [(1,), (1, 2), (1, 0)])
def test_repairs_change_the_answer_of_rows_with_pictures_alone(model, tmp_path, images):
    spec, inputs = written(tmp_path, model, seed=3), tiny_inputs(images=images)
    bare = spec.replace(")", ",mend=False)")
    with torch.no_grad():
        with vlmprune.prune(model, spec):
            mended = model(**inputs).logits
        with vlmprune.prune(model, bare):
            cut = model(**inputs).logits
    assert torch.equal(mended[:, :-1], cut[:, :-1])  # only the last token of a prompt answers
    changed = [not torch.equal(a, b) for a, b in zip(mended[:, -1], cut[:, -1], strict=True)]
    assert changed == [count > 0 for count in images]


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}]
)
def test_ways_of_generating_agree(model, tmp_path, options):
    spec, inputs = written(tmp_path, model, seed=3), tiny_inputs(images=(1, 2))
    with vlmprune.prune(model, spec):
        same = {} if "num_beams" not in options else {"num_beams": 2, "use_cache": False}
        assert torch.equal(generate(model, inputs, **options), generate(model, inputs, **same))


def test_decoding_from_a_copied_cache_repairs_too(model, tmp_path):
    spec, inputs = written(tmp_path, model, seed=3), tiny_inputs(images=(1,))
    token = torch.tensor([[7]])
    with torch.no_grad(), vlmprune.prune(model, spec):
        cache = model(**inputs).past_key_values
        kept = copy.deepcopy(cache)
        ids = torch.cat([inputs["input_ids"], token], dim=1)
        mask = torch.ones_like(ids)
        first = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits
        again = model(input_ids=token, attention_mask=mask, past_key_values=kept).logits
    with torch.no_grad(), vlmprune.prune(model, spec.replace(")", ",mend=False)")):
        cache = model(**inputs).past_key_values
        bare = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(first, again) and not torch.equal(first, bare)


def test_a_budget_is_the_mean_over_the_layers(model, tmp_path):
    spec = written(tmp_path, model)
    with vlmprune.prune(model, f"{spec}@18") as run:
        generate(model, tiny_inputs(images=(1, 2)))
        tokens = run.last.tokens_per_layer
    shares = shares_at([0.5, 0.25], [1, 2], 4, 0.5)
    assert tokens == [36, int(36 * shares[0]), int(36 * shares[1]), int(36 * shares[1])]
    assert abs(float(mean_share(torch.tensor([shares]), [1, 2], 4)) - 0.5) < 1e-6
    with vlmprune.prune(model, f"{spec}@9"), pytest.raises(SpecError, match=r"layers 0\.\.0 of 4 read all"):
        generate(model, tiny_inputs(images=(1,)))


@pytest.mark.parametrize("mean", [0.3, 0.6, 0.99, 1.0])
def test_shares_keep_their_proportion_as_long_as_none_is_whole(mean):
    shares = shares_at([0.6, 0.35, 0.14], [1, 3, 5], 8, mean)
    reached = (1 + 2 * shares[0] + 2 * shares[1] + 3 * shares[2]) / 8
    assert abs(reached - mean) < 1e-6 and shares == sorted(shares, reverse=True) and max(shares) <= 1
    if max(shares) < 1:
        assert shares[0] / shares[2] == pytest.approx(0.6 / 0.14)


def test_without_weights_it_says_how_to_train(model, tmp_path):
    with pytest.raises(UnsupportedError, match="vlmprune train rcp"):
        vlmprune.prune(model, "rcp@9")
    spec = written(tmp_path, model)
    with pytest.raises(UnsupportedError, match=r"were trained with model_type llama.*train them for it"):
        vlmprune.prune(tiny_model("llava", layers=3), spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [2, 1]}, "expected ascending layers"),
        ({"shares": [0.5]}, "one in .0, 1. for each"),
        ({"repairs": [[0, 1]]}, "pairs of a layer and the pruning layer"),
        ({"heads": 0}, "expected a number from 1 on"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(SpecError, match=message):
        shapes_of(FACTS | change)


def test_places_of_another_number_lie_between_those_of_the_table():
    E = torch.arange(4.0)[:, None].expand(4, 2)
    assert positions_for(E, 4) is E
    torch.testing.assert_close(
        positions_for(E, 8)[:, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    )


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """The bundled model with pruners away from their start, and two questions."""
    model, processor = vlmprune.load("tiny")
    training = RCPTraining(model, processor, keep=60, width=16, seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in training.module.values():
            value += 0.3 * torch.randn(value.shape, generator=draw)
        for name, value in training.module.items():
            if name.endswith("keep_bias"):
                value.fill_(1.0)
    return training, read_data("shapes", 3, 1)


def test_hard_choices_in_training_are_the_cuts_and_repairs_of_the_session(trained, tmp_path):
    training, data = trained
    model = training.model
    facts = {"backbone": backbone_of(model.config), **training.facts(None)}
    write_weights(tmp_path, "rcp", training.tensors(), facts)
    for one in data.train:
        inputs, labels = batch_of(model, training.processor, [one])
        start = int((labels[0] != NO_LOSS).nonzero()[0])
        with torch.no_grad():
            made = training._student(inputs, labels, None)
            with vlmprune.prune(model, f"rcp(weights={str(tmp_path)!r})") as run:
                ids, mask = inputs["input_ids"], inputs["attention_mask"]
                prompt = {"input_ids": ids[:, :start], "attention_mask": mask[:, :start]}
                output = model(**prompt, pixel_values=inputs["pixel_values"])
                kept, logits = run.last.layer_tokens[0], [output.logits[:, -1]]
                for column in range(start, ids.shape[1] - 1):
                    output = model(
                        input_ids=ids[:, column : column + 1],
                        attention_mask=mask[:, : column + 1],
                        past_key_values=output.past_key_values,
                    )
                    logits.append(output.logits[:, -1])
        shares = made.shares[0] * made.count
        assert [kept[layer] for layer in training.layers] == shares.round().int().tolist()
        assert 1 < kept[-1] < made.count
        want = made.logits[0, start - 1 : -1]
        torch.testing.assert_close(torch.cat(logits), want, rtol=1e-4, atol=1e-4)


def test_a_step_leaves_out_whole_queries_and_parts_of_what_scores_single_tokens():
    sizes = {"D": 6, "d": 8, "q": 5}
    draw = torch.Generator().manual_seed(0)
    w = {
        name: torch.randn([int(axis) if axis.isdigit() else sizes[axis] for axis in axes], generator=draw)
        for name, axes in SHAPES.items()
    }
    V, Q = torch.randn(2, 7, 6, generator=draw), torch.randn(2, 3, 6, generator=draw)
    a, c = torch.rand(2, 7, generator=draw), torch.ones(2, 7, dtype=torch.bool)
    whole = pruner_scores(w, 2, V, a, c, Q, None)
    torch.manual_seed(3)
    some = pruner_scores(w, 2, V, a, c, Q, None, drop=0.4)
    torch.manual_seed(3)
    left = torch.nn.functional.dropout(torch.ones(2, 5, 1), 0.4)  # 0, or 1 / (1 - 0.4)
    assert 0 < int((left == 0).sum()) < 10
    # without the queries that are left out there is nothing else in e1 but their bias
    for row in range(2):
        aggregator = w["aggregator.weight"] * left[row, :, 0]
        by_hand = pruner_scores({**w, "aggregator.weight": aggregator}, 2, V, a, c, Q, None)
        torch.testing.assert_close(some.cross[row], by_hand.cross[row])
    assert not torch.allclose(some.cross, whole.cross) and not torch.allclose(some.token, whole.token)
    assert torch.equal(some.baseline, whole.baseline)


def test_nothing_is_left_out_where_others_are_looked_at(trained):
    training, data = trained
    inputs, labels = batch_of(training.model, training.processor, data.train[:1])
    loss = {}
    for mode in (True, False):
        training.module.train(mode)
        with torch.no_grad():
            torch.manual_seed(0)
            first = training.loss(list(data.train[:1]), 1.0)
            torch.manual_seed(1)
            loss[mode] = [float(first), float(training.loss(list(data.train[:1]), 1.0))]
            hard = training._student(inputs, labels, None).logits
            assert torch.equal(hard, training._student(inputs, labels, None).logits)
    training.module.train()
    assert loss[False][0] == loss[False][1] and loss[True][0] != loss[True][1]


def test_every_weight_gets_a_gradient(trained):
    training, data = trained
    torch.manual_seed(0)
    training.module.zero_grad()
    training.loss(list(data.train[:2]), 0.3).backward()
    # a bias under a softmax, or before a mean is taken off, moves nothing
    idle = ("attention/key/bias",)
    still = [
        name
        for name, value in training.module.items()
        if (value.grad is None or not bool(value.grad.abs().max() > 0)) and not name.endswith(idle)
    ]
    assert still == []
    training.module.zero_grad()


def test_training_refuses_what_it_cannot_train(trained):
    training = trained[0]
    with pytest.raises(UnsupportedError, match="at least 8 are needed"):
        RCPTraining(tiny_model("llava"), training.processor, 9, None, 0)
    with pytest.raises(SpecError, match="multiple of 4"):
        RCPTraining(training.model, training.processor, 9, 10, 0)
