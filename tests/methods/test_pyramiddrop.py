# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: its schedule in numbers, and its ranking against a literal transcription of its formula."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

import vlmprune
from vlmprune.core.method import CutPoint
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.hooks.attention_tap import AttentionTap, find_attention, probe
from vlmprune.methods.pyramiddrop import PyramidDrop, geometric_shares
from vlmprune.registry import method_info
from vlmprune.spec import Budget
from vlmprune.testing.tiny import tiny_inputs, tiny_model


def counts(method, keep=None, depth=32, count=576):
    return [
        (stage.layer, stage.keep)
        for stage in method.cuts(depth, None if keep is None else Budget(keep), count)
    ]


def mean_over_layers(stages, depth=32, count=576):
    here = [count] * depth
    for layer, keep in stages:
        here[layer:] = [keep] * (depth - layer)
    return sum(here) / depth


def test_without_a_budget_the_schedule_is_that_of_the_paper():
    assert counts(PyramidDrop()) == [(8, 288), (16, 144), (24, 72)]
    assert mean_over_layers(counts(PyramidDrop())) == 270
    assert counts(PyramidDrop(), depth=40) == [(10, 288), (20, 144), (30, 72)]
    assert counts(PyramidDrop(), depth=4, count=36) == [(1, 18), (2, 9), (3, 4)]


def test_shares_are_of_the_original_count_and_truncated():
    method = PyramidDrop(layers=(2, 10, 20), shares=(0.32, 0.16, 0.08))
    assert counts(method) == [(2, 184), (10, 92), (20, 46)]
    assert mean_over_layers(counts(method)) == 128
    assert counts(method, count=5) == [(2, 1), (10, 1), (20, 1)]  # never none


def test_every_cut_is_ranked_by_the_layer_that_follows_it():
    assert PyramidDrop(layers=(3,), shares=(0.5,)).cuts(8, None, 10) == (CutPoint(3, 5, source=3),)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9, 200, 400])
@pytest.mark.parametrize("layers", [None, (2, 10, 20), (1,)])
def test_a_budget_is_the_mean_over_all_layers(keep, layers):
    found = counts(PyramidDrop(layers=layers), keep)
    want = Budget(keep).count(576)
    assert want - 1 < mean_over_layers(found) <= want  # every count is rounded down
    assert all(a > b for a, b in pairwise([576, *(count for _, count in found)]))


def test_keep_all_cuts_nothing():
    assert [keep for _, keep in counts(PyramidDrop(), 1.0)] == [576] * 3
    # gaps of other lengths: the ratio is found as 1 less its last digit
    assert counts(PyramidDrop(layers=(1, 3)), 1.0, depth=4, count=36) == [(1, 36), (3, 36)]
    assert [keep for _, keep in counts(PyramidDrop(), 576)] == [576] * 3


def test_shares_fall_by_one_ratio():
    first, second, third = geometric_shares((8, 16, 24), 32, 0.4)
    assert second == pytest.approx(first**2) and third == pytest.approx(first**3)
    assert 8 * (1 + first + second + third) / 32 == pytest.approx(0.4)


@pytest.mark.parametrize(("layers", "keep"), [(None, 0.25), (None, 144), ((16,), 0.5)])
def test_budgets_below_what_the_first_layers_read_are_refused(layers, keep):
    last = (layers or (8,))[0] - 1
    with pytest.raises(
        SpecError, match=rf"layers 0\.\.{last} of 32 read all of them, which is .* cut earlier"
    ):
        counts(PyramidDrop(layers=layers), keep)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": ()}, r"layers=\(\)"),
        ({"layers": (8, 4)}, "expected ascending decoder layers"),
        ({"layers": (8, 8)}, "expected ascending decoder layers"),
        ({"layers": (0, 8)}, "from 1 on"),
        ({"shares": (0.5, 0.5, 0.1)}, "expected decreasing shares"),
        ({"shares": (0.2, 0.5, 0.8)}, "expected decreasing shares"),
        ({"shares": (0.5, 0.2, 0.0)}, "expected decreasing shares"),
        ({"shares": (1.5, 0.2, 0.1)}, r"in \(0, 1\]"),
        ({"shares": (0.5, 0.2)}, "for 3 layers; expected one share per layer"),
        ({"layers": (4,), "shares": (0.5, 0.2)}, "for 1 layers"),
    ],
)
def test_schedules_that_do_not_fall_are_refused(options, match):
    with pytest.raises(SpecError, match=match):
        PyramidDrop(**options)


def test_a_model_without_quarters_needs_layers():
    with pytest.raises(SpecError, match="3 layers has no quarters"):
        counts(PyramidDrop(), depth=3)
    assert counts(PyramidDrop(layers=(1,)), depth=3, count=10) == [(1, 5)]


def test_it_recounts_positions_as_the_official_code_does():
    assert method_info("pyramiddrop").positions == "compact"


def test_ranking_is_one_row_of_the_next_layer_on_the_uncut_sequence():
    """Norm, projections, rotation with half pairs, softmax over all keys, mean over heads, then the visual
    slice.
    """
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    layer, hidden, first, n = model.layers[0], torch.randn(1, 12, 16), 3, 6
    cos, sin = model.rotary_emb(hidden, torch.arange(12)[None])
    with torch.no_grad():
        tap = AttentionTap(find_attention(layer), lambda call, output: None)
        tap.install()
        given = probe(layer, hidden, {"position_embeddings": (cos, sin), "attention_mask": None}, None, 0)
        tap.remove()
        attention = given.attention(torch.tensor([[11]]))
        tokens = VisualTokens(text_attention=attention[..., first : first + n])
        x = hidden[0].double().numpy()
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)  # the weight of a new norm is 1
        wq, wk = (getattr(layer.self_attn, f"{name}_proj").weight.double().numpy() for name in "qk")
        scores = []
        for head in range(4):
            q, k = x @ wq[4 * head : 4 * head + 4].T, x @ wk[4 * (head // 2) : 4 * (head // 2) + 4].T
            angle = np.arange(12)[:, None] * 10000.0 ** (-np.arange(2) / 2)
            turn = np.exp(1j * angle)
            q, k = ((v[:, :2] + 1j * v[:, 2:]) * turn for v in (q, k))
            row = (q[-1].conj() * k).sum(-1).real / np.sqrt(4)
            scores.append(np.exp(row) / np.exp(row).sum())
        want = np.mean(scores, axis=0)[first : first + n]
        np.testing.assert_allclose(PyramidDrop().score(tokens)[0].numpy(), want, rtol=1e-5)
        assert choose(PyramidDrop(), tokens, 2).tolist() == [
            sorted(np.argsort(-want, kind="stable")[:2].tolist())
        ]


def test_a_method_object_needs_no_budget_either():
    run = vlmprune.prune(tiny_model("llava"), PyramidDrop(layers=(1, 2), shares=(0.5, 0.25)))
    with run, torch.no_grad():
        run.adapter.model(**tiny_inputs(images=(1,)))
    assert run.last.tokens_per_layer == [36.0, 18.0, 9.0, 9.0] and str(run.spec) == "pyramiddrop"
