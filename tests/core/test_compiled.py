# SPDX-License-Identifier: Apache-2.0
"""Parts that were compiled before attaching, and graphs that were traced without or with hooks: the answers
are those of eager.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.hooks.patches import traced_anything
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
FASTV, VAR = (
    "fastv(layer=1)@9",
    "var(dims=[7,21,30],tau=1.2,max_sink_portion=0.9,min_visual_mass=0.0,first_layer=1)",
)
compiled = partial(torch.compile, backend="eager")


def whole(model: Any) -> None:
    model.compile(backend="eager")


def forward(model: Any) -> None:
    model.forward = compiled(model.forward)


def inner(model: Any) -> None:
    model.model.compile(backend="eager")


def language_model(model: Any) -> None:
    model.model.language_model.compile(backend="eager")


def layers(model: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")


def attention(model: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.self_attn.compile(backend="eager")


def tower(model: Any) -> None:
    model.model.vision_tower.compile(backend="eager")


# these two were seen to answer as dense in silence; the slow suite has all
SILENT = [(language_model, FASTV), (layers, VAR)]
WAYS = [
    (way, spec)
    for way in (whole, forward, inner, language_model, layers, attention, tower)
    for spec in ("fastervlm@9", FASTV, VAR)
]
CASES = [pytest.param(*case, marks=[] if case in SILENT else pytest.mark.slow) for case in WAYS]


@pytest.fixture(autouse=True)
def own_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("way", "spec"), CASES)
def test_compile_run_attach(way: Callable[[Any], None], spec: str) -> None:
    """Graphs traced without hooks are forgotten at attach, those traced with them at detach."""
    inputs, eager, model = tiny_inputs(images=(1,)), tiny_model(layers=3), tiny_model(layers=3)
    way(model)
    dense = two_steps(eager, inputs)
    with vlmprune.prune(eager, spec):
        want = two_steps(eager, inputs)
    assert not torch.allclose(want, dense, atol=1e-2)
    for expected in (dense, want, dense):
        with vlmprune.prune(model, spec) if expected is want else nullcontext():
            torch.testing.assert_close(two_steps(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_it_is_known_whether_anything_was_traced() -> None:
    """Attaching looks for compiled parts only then."""
    add = compiled(lambda x: x + 1)
    assert not traced_anything()
    for _ in range(2):  # a function that was compiled before a reset is traced again
        add(torch.ones(2))
        assert traced_anything()
        torch.compiler.reset()
        assert not traced_anything()


def two_steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(2, V) logits of a prefill and a decode step; ids would hide small differences."""
    options = {
        "max_new_tokens": 2,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad():
        return torch.cat(model.generate(**inputs, **options).logits)


@pytest.mark.parametrize("spec", ["fastv(layer=2)@9", "pyramiddrop"])
def test_the_wrapper_of_torch_compile_is_taken_off(spec: str) -> None:
    """generate runs on the model inside of it: drafts and static caches are told apart there."""
    model = tiny_model()
    wrapped = torch.compile(model)
    for seed in range(3):
        inputs = tiny_inputs(images=(1,), seed=seed, text_len=9)
        inputs["input_ids"][0, -4:] = inputs["input_ids"][0, -8:-4]
        with vlmprune.prune(model, spec):
            want = generate(model, inputs)
        with vlmprune.prune(wrapped, spec):
            assert torch.equal(wrapped.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:], want)
            assert torch.equal(generate(wrapped, inputs, prompt_lookup_num_tokens=3)[:, :5], want)
            assert torch.equal(generate(wrapped, inputs, cache_implementation="static"), want)
            with pytest.raises(vlmprune.VlmPruneError, match="attached already"), vlmprune.prune(model, spec):
                pass
    assert "create_masks_for_generate" not in wrapped.__dict__
