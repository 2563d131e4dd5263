# SPDX-License-Identifier: Apache-2.0
"""Attention rows are compared with what a module itself computed, once in its life and never on trust."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlmprune
from vlmprune.core.deferred import NOW, DeferredChecks
from vlmprune.errors import UnsupportedError
from vlmprune.hooks.attention_call import AttentionCall, compared_forms
from vlmprune.testing.tiny import tiny_inputs, tiny_model

SPECS = ("fastervlm@9", "fastv(layer=1)@9")


def run(model: Any, spec: str) -> None:
    with vlmprune.prune(model, spec), torch.no_grad():
        model(**tiny_inputs("llava"))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules whose rows were compared."""
    seen: list[nn.Module] = []
    weigh = AttentionCall.weigh

    def watched(self: AttentionCall, weights: Tensor) -> Tensor:
        seen.append(self.module)
        return weigh(self, weights)

    monkeypatch.setattr(AttentionCall, "weigh", watched)
    return seen


@pytest.mark.parametrize("spec", SPECS)
def test_a_module_is_compared_in_its_first_session(spec: str, compared: list[nn.Module]) -> None:
    model = tiny_model("llava")
    run(model, spec)
    first = len(compared)
    assert first == len(set(compared)) > 0
    run(model, spec)
    assert len(compared) == first
    run(tiny_model("llava"), spec)  # another model with the same weights
    assert len(compared) == 2 * first


@pytest.mark.parametrize("spec", SPECS)
def test_another_forward_of_a_module_is_compared_anew(spec: str, compared: list[nn.Module]) -> None:
    model = tiny_model("llava")
    run(model, spec)
    module, first = compared[0], len(compared)
    module.forward = module.forward
    run(model, spec)
    assert compared[first:] == [module]


@pytest.mark.parametrize("spec", SPECS)
def test_a_wrong_rule_is_refused_in_every_session(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, logits = tiny_model("llava"), AttentionCall.logits
    with monkeypatch.context() as patch:
        patch.setattr(AttentionCall, "logits", lambda self, rows: logits(self, rows) * 3)
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="by a rule that is not known"):
                run(model, spec)
    run(model, spec)


def test_what_is_remembered_dies_with_the_model(compared: list[nn.Module]) -> None:
    model = tiny_model("llava")
    run(model, "fastervlm@9")
    module = weakref.ref(compared.pop())
    del model
    gc.collect()
    assert module() is None


def test_on_a_device_forms_live_with_the_checks_whose_answers_are_not_known_yet() -> None:
    on_cpu, away = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4, device="meta")
    calls = [AttentionCall(nn.Linear(1, 1), x, x, x, None, {}) for x in (on_cpu, away)]
    one, other = DeferredChecks(), DeferredChecks()
    for call in calls:
        compared_forms(call, one).add(call.form)
    assert [bool(compared_forms(call, other)) for call in calls] == [True, False]
    assert all(call.form in compared_forms(call, one) for call in calls)


def test_where_checks_say_so_forms_live_with_them_on_the_cpu_too() -> None:
    """In a server that runs for weeks."""

    class Brief(DeferredChecks):
        lasting = False

    x = torch.zeros(1, 2, 3, 4)
    call, one = AttentionCall(nn.Linear(1, 1), x, x, x, None, {}), Brief()
    compared_forms(call, one).add(call.form)
    assert call.form in compared_forms(call, one)
    assert not compared_forms(call, Brief()) and not compared_forms(call, DeferredChecks())


def test_every_segment_of_a_packed_call_is_compared() -> None:
    module, x = SimpleNamespace(), torch.randn(1, 1, 5, 4)
    call = AttentionCall(
        module, x, x, x, None, {"is_causal": False, "cu_seq_lens_q": torch.tensor([0, 2, 5])}
    )
    first, known = torch.zeros(1, 1, dtype=torch.int64), set()
    right, wrong = call.segments()
    right.check(first, None, right.attention(first), right_output(right), NOW, known, call.form)
    assert known == {call.form}
    with pytest.raises(UnsupportedError):
        wrong.check(first, None, wrong.attention(first), 1 + right_output(wrong), NOW, known, call.form)
    assert not known


def right_output(call: AttentionCall) -> Tensor:
    """(1, n, 1, d) what plain attention gives."""
    q, k, v = call.queries[0, 0], call.keys[0, 0], call.values[0, 0]
    return ((q @ k.T * call.scaling).softmax(-1) @ v)[None, :, None]
