# SPDX-License-Identifier: Apache-2.0
"""Settings that are found out for a model: by hand where that can be done, and used in the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vlmprune
from vlmprune.cli import app
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.testing.tiny import tiny_model
from vlmprune.training import calibrate
from vlmprune.training.calibrate import (
    Loss,
    TokenCosts,
    Watched,
    adaptinfer_layers,
    beginning,
    bend_of,
    fitprune_schedule,
    peaks_of,
)
from vlmprune.training.data import read_data

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "adaptinfer" / "index.json"


@pytest.fixture(scope="module")
def asked():
    return read_data("shapes", 2, 0).train


# --- adaptinfer -----------------------------------------------------------------------------------


def test_curves_bend_where_the_recorded_ones_do() -> None:
    told = json.loads(GOLDEN.read_text())["change_point_checks"]
    assert [bend_of(curve) for curve in told["curves"]] == told["first_change_layer"]
    assert bend_of([0, 0, 0, 9, 0, 0, 0]) == 2  # its sum is 0 up to layer 2, then 9
    with pytest.raises(UnsupportedError, match="3 layers; a curve needs at least 4"):
        bend_of([1, 2, 3])


@pytest.mark.parametrize(
    ("counts", "most", "found"),
    [
        ([0, 5, 1, 1, 7, 7, 2, 3], 3, (1, 4, 7)),
        ([0, 5, 1, 1, 7, 7, 2, 3], 2, (1, 4)),
        ([4, 0, 4, 0, 4], 2, (0, 2)),
        ([0, 0, 0], 3, ()),
        ([9], 1, (0,)),
    ],
)
def test_peaks_are_higher_than_the_one_before(counts, most, found) -> None:
    assert peaks_of(counts, most) == found


def test_layers_that_are_found_can_be_used(loaded, asked) -> None:
    layers = adaptinfer_layers(*loaded, asked, 2)
    assert 1 <= len(layers) <= 2 and list(layers) == sorted(layers) and layers[-1] < 7
    picture, question, _ = vlmprune.example()
    with torch.no_grad(), vlmprune.prune(loaded[0], f"adaptinfer(layers={layers})@0.5") as done:
        loaded[0](**vlmprune.encode(*loaded, picture, question))
    assert done.last.tokens_per_layer[-1] < 144


# --- fitprune -------------------------------------------------------------------------------------


def test_a_beginning_is_the_longest_that_leaves_enough() -> None:
    values = torch.tensor([4.0, 1.0, 2.0, 0.5, 3.0])
    alive = torch.tensor([True, True, True, False, True])
    # 10 in all: without 1 there are 9 left, without 1 and 2 there are 7
    assert beginning(values, alive, 9.0).tolist() == [False, True, False, False, False]
    assert beginning(values, alive, 7.0).tolist() == [False, True, True, False, False]
    assert beginning(values, alive, 9.5).sum() == 0
    assert beginning(values, alive, 0.0).tolist() == [True, True, True, False, True]


def test_what_text_and_picture_give_is_what_eager_attention_shows(loaded, asked) -> None:
    model = loaded[0]
    (prompt,) = calibrate._prompts(*loaded, asked[:1], "fitprune")
    with torch.no_grad():
        found = prompt.run(None, None, 0.0)
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            maps = model(**prompt.inputs, output_attentions=True, use_cache=False).attentions
        finally:
            model.set_attn_implementation(before)
    for layer in (0, 5):
        M = maps[layer][0].amax(dim=0)
        cross = M[prompt.text][:, prompt.visual].mean(dim=0).sum()
        own = M[prompt.visual][:, prompt.visual].sum() / 144
        assert found.cross[layer] == pytest.approx(float(cross), rel=1e-4)
        assert found.own[layer] == pytest.approx(float(own), rel=1e-4)
        given = maps[layer][0][:, prompt.text][..., prompt.visual].sum(dim=(0, 1))
        torch.testing.assert_close(found.given[layer], given, rtol=1e-4, atol=1e-5)
    assert not any(found.deleted)


def test_nothing_that_matters_to_one_side_leaves(loaded, asked) -> None:
    (prompt,) = calibrate._prompts(*loaded, asked[:1], "fitprune")
    with torch.no_grad():
        dense = prompt.run(None, None, 0.0)
        costs = TokenCosts.of(loaded[0].config.text_config)
        none = prompt.run(Loss(0.0, dense), costs, 0.0)
        some = prompt.run(Loss(0.05, dense), costs, 0.0)
        all_ = prompt.run(Loss(1.0, dense), costs, 0.0)
    assert none.deleted == [0] * 8 and not none.fits
    assert 0 < sum(some.deleted) < 143 and all_.deleted == [143] + [0] * 7
    # a side that gives all its attention to what stays would lose everything: the other one cannot decide
    strict = Watched(cross=[1e9] * 8, own=dense.own)
    with torch.no_grad():
        assert prompt.run(Loss(0.05, strict), costs, 0.0).deleted == [0] * 8


def test_costs_are_those_of_the_matrices() -> None:
    config = tiny_model("llava").config.text_config
    wide, inner, heads, keys = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    width = wide // heads
    by_hand = 10 * wide * (wide + 2 * keys * width + wide + 3 * inner) + 2 * 100 * heads * width
    assert TokenCosts.of(config).layer(10) == by_hand and TokenCosts.of(config).whole(10, 4) == 4 * by_hand


def test_a_schedule_meets_its_budget_in_the_model(loaded, asked) -> None:
    costs, saved = TokenCosts.of(loaded[0].config.text_config), []
    inputs = vlmprune.encode(*loaded, asked[0].picture(), asked[0].question)
    for percent in (25, 60):
        schedule = fitprune_schedule(*loaded, asked, percent)
        assert len(schedule) == 8 and 0 < sum(schedule) < 576
        with torch.no_grad(), vlmprune.prune(loaded[0], f"fitprune(schedule={schedule})") as done:
            loaded[0](**inputs)
        spent = sum(costs.layer(count) for count in done.last.tokens_per_layer)
        saved.append(1 - spent / costs.whole(144, 8))
        assert saved[-1] == pytest.approx(percent / 100, abs=0.1)
    assert saved[0] < saved[1]


def test_the_command_prints_a_spec_that_runs(loaded) -> None:
    words = ["--model", "tiny", "--data", "shapes", "--samples", "1", "--json"]
    done = CliRunner().invoke(app, ["calibrate", "adaptinfer", *words])
    assert done.exit_code == 0, done.output
    spec = json.loads(done.stdout)["spec"]
    assert spec.startswith("adaptinfer(layers=(") and vlmprune.prune(loaded[0], spec).spec == spec
    done = CliRunner().invoke(app, ["calibrate", "fastv", *words])
    assert done.exit_code == 2 and "expected one of ['fitprune', 'adaptinfer']" in done.output


def test_what_cannot_be_calibrated_says_so(loaded, asked) -> None:
    with pytest.raises(SpecError, match="got none; give some"):
        fitprune_schedule(*loaded, [], 50)
    with pytest.raises(SpecError, match="percent=0"):
        fitprune_schedule(*loaded, asked, 0)
    with pytest.raises(UnsupportedError, match="plain causal mask"):
        adaptinfer_layers(tiny_model("gemma3"), None, asked)
