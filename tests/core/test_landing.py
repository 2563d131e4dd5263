# SPDX-License-Identifier: Apache-2.0
"""Default schedules land on layers that attend; schedules that a user wrote stay where they are."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

import pytest
from torch import nn

import vlmprune
from vlmprune.core.budget import Budget
from vlmprune.errors import UnsupportedError
from vlmprune.hooks.slots.landing import is_written, landed, nearest
from vlmprune.registry import attachable_methods, get
from vlmprune.testing.checks_inside import cut_equals_twin
from vlmprune.testing.conformance import Subject, generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model


@cache
def hybrid() -> Any:
    """Eight layers, of which 1, 2, 5 and 6 attend."""
    model = tiny_model("qwen3_5", layers=8)
    layers = model.model.language_model.layers
    assert [index for index, layer in enumerate(layers) if hasattr(layer, "self_attn")] == [1, 2, 5, 6]
    return model


def test_the_nearest_are_found_in_order() -> None:
    assert nearest([1], [3, 7, 11]) == [3] and nearest([5], [3, 7]) == [7]  # of two as near the larger
    assert nearest([2, 4, 6], [1, 2, 5, 6]) == [2, 5, 6]
    assert nearest([0, 1, 2], [1, 2, 5]) == [1, 2, 5]
    # a later one needs the last
    assert nearest([6, 6], [2, 6]) == [2, 6] and nearest([1, 2], [5]) is None


@pytest.mark.parametrize(
    ("spec", "option", "where"),
    [
        ("pyramiddrop@0.5", "layers", (2, 5, 6)),
        ("sparsevlm@0.5", "layers", (1, 2, 5)),
        ("adaptinfer@0.25", "layers", (1, 2, 5)),
        ("holitom_inner@0.25", "layer", 6),
    ],
)
def test_a_default_schedule_lands_on_layers_that_attend(spec: str, option: str, where: Any) -> None:
    model, inputs = hybrid(), tiny_inputs("qwen3_5")
    with vlmprune.prune(model, spec) as run:
        generate(model, inputs)
    name = spec.partition("@")[0]
    assert run.last is not None and getattr(run.method, option) == where
    assert run.last.note == f"{option}={where} of {name}: the nearest layers that attend"
    assert run.last.method == spec and run.last.pruned
    # as if these layers had been given
    written = f"{name}({option}={str(where).replace(' ', '')})@{spec.partition('@')[2]}"
    with vlmprune.prune(model, written) as other:
        generate(model, inputs)
    assert other.last is not None and other.last.note == ""
    assert other.last.layer_tokens == run.last.layer_tokens
    assert [one.keep_idx.tolist() for one in other.last.keep] == [
        one.keep_idx.tolist() for one in run.last.keep
    ]


def test_layers_that_a_user_wrote_are_refused_by_name() -> None:
    for spec in ("fastv(layer=4)@9", "pyramiddrop(layers=(2,4))@0.5"):
        with pytest.raises(UnsupportedError, match=r"decoder layer [34], a Qwen3_5DecoderLayer without"):
            vlmprune.attach(hybrid(), spec)
    # one that attends nowhere near: the default would move
    shifted = tiny_model("llava", text="qwen3_5_text", layers=8, layer_types=_only(5, 6))
    with pytest.raises(UnsupportedError, match="fastv reads the attention of decoder layer 1"):
        vlmprune.attach(shifted, "fastv(layer=2)@9")
    with vlmprune.prune(shifted, "fastv@9") as run:
        generate(shifted, tiny_inputs("llava"))
    assert run.last is not None and run.last.layer_tokens == [[36] * 6 + [9] * 2]
    # three cuts, and two layers that attend
    with pytest.raises(UnsupportedError, match="pyramiddrop reads the attention of decoder layer 2"):
        vlmprune.attach(shifted, "pyramiddrop@0.5")


def _only(*attending: int) -> list[str]:
    return ["full_attention" if index in attending else "linear_attention" for index in range(8)]


def test_what_is_written_is_seen_where_it_repeats_the_default() -> None:
    fastv = get("fastv")()
    for spec in ("fastv(layer=2)@9", "divprune@20+fastv(layer = 2)@9"):
        assert is_written(fastv, spec)
    for spec in ("fastv@9", "visionzip(layer=-2)@20+fastv@9", "FastV()"):
        assert not is_written(fastv, spec)


def test_a_method_stays_where_all_layers_attend() -> None:
    layers = tiny_model("llava").model.language_model.layers
    method = get("fastv")()
    assert landed(method, layers, Budget(0.5), 36) is method
    assert landed(method, nn.ModuleList(nn.Identity() for _ in range(4)), Budget(0.5), 36) is method


def test_the_option_that_moves_is_one_of_the_method() -> None:
    named = {name: get(name) for name in attachable_methods() if get(name).landing is not None}
    assert {"fastv", "pyramiddrop", "sparsevlm"} <= set(named)
    for name, method in named.items():
        assert method.landing[0] in {one.name for one in fields(method)}, name


def test_a_moved_cut_equals_the_eager_twin() -> None:
    cut_equals_twin(Subject("prunevid_inside@0.25", "lfm2_vl"))


@pytest.mark.parametrize("depth", [8, 32, 40])
def test_where_a_method_cuts_depends_on_no_number_of_tokens(depth: int) -> None:
    inside = [name for name in attachable_methods() if get(name).slot == "inside_lm"]
    budgets: dict[str, Budget | None] = {name: Budget(0.5) for name in inside}
    options: dict[str, dict[str, Any]] = {"dyvte": {"exit": 4}}
    budgets["dyvte"] = None  # all of its tokens leave at once
    del budgets["rcp"]  # its layers are those of its weights
    for name, budget in budgets.items():
        method = get(name)(**options.get(name, {}))
        places = {
            tuple((point.layer, point.source) for point in method.cuts(depth, budget, count))
            for count in (36, 100, 576, 2880)
        }
        assert len(places) == 1, name
