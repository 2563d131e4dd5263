# SPDX-License-Identifier: Apache-2.0
"""Decode steps on a static cache: one graph without a break, and nothing that the host has to wait for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, StaticCache

import vlmprune
from vlmprune.errors import UnsupportedError
from vlmprune.testing.device import count
from vlmprune.testing.tiny import tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4
SPECS = (
    "fastervlm@9",
    "fastervlm(cls=mean)@9",
    "divprune@9",
    "visionzip@9",
    "fastv(layer=1)@9",
    "pyramiddrop@0.5",
)
FAMILIES = ("llava", "llava_next", "llava_onevision", "vipllava", "mistral3", "qwen2_5_vl", "gemma3")


@pytest.fixture(autouse=True)
def own_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def logits_of_steps(family: str, spec: str | None, compiled: bool) -> tuple[Tensor, int]:
    """(STEPS, V) logits of decode steps that a user runs himself, and how many graphs they took."""
    model, inputs, counter = tiny_model(family), tiny_inputs(family, images=(1,)), CompileCounter()

    def step(token: Tensor, place: Tensor, cache: Any) -> Tensor:
        return model(input_ids=token, position_ids=place, past_key_values=cache, use_cache=True).logits[:, -1]

    run = torch.compile(step, backend=counter, fullgraph=True) if compiled else step
    length, found = inputs["input_ids"].shape[1], []
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + STEPS)
    with torch.no_grad(), nullcontext() if spec is None else vlmprune.prune(model, spec):
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
        for number in range(STEPS):
            logits = run(logits.argmax(dim=-1, keepdim=True), torch.tensor([[length + number]]), cache)
            found.append(logits)
    return torch.cat(found), counter.frame_count


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_are_one_graph_where_dense_ones_are(family: str, spec: str) -> None:
    try:
        want, _ = logits_of_steps(family, spec, compiled=False)
    except UnsupportedError as error:
        pytest.skip(str(error))
    try:
        dense, graphs = logits_of_steps(family, None, compiled=True)
    except torch._dynamo.exc.Unsupported:
        pytest.skip(f"{family} does not decode in one graph without pruning")
    got, pruned_graphs = logits_of_steps(family, spec, compiled=True)
    assert not torch.allclose(want, dense, atol=1e-2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert pruned_graphs <= graphs  # a dense Gemma 3 makes a second one for its windows


@pytest.mark.parametrize("spec", ["fastv(layer=1)@9", pytest.param("fastervlm@9", marks=pytest.mark.slow)])
def test_generate_compiles_decode_steps_and_counts_them(spec: str) -> None:
    model, inputs, graphs = tiny_model(layers=2), tiny_inputs(images=(1,)), []

    def noted(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:  # transformers copies an object
        graphs.append(graph)
        return graph.forward

    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    config = CompileConfig(fullgraph=True, backend=noted, mode=None)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    with vlmprune.prune(model, spec) as run:
        want = model.generate(**inputs, **options)
        eager = run.last.decode_steps
        ids = model.generate(**inputs, **options, cache_implementation="static", compile_config=config)
        assert len(graphs) == 1
        assert torch.equal(ids, want)
        assert run.last.decode_steps == eager == STEPS - 1


@pytest.mark.parametrize(("spec", "launches"), [("fastervlm@9", 3), ("fastv(layer=1)@9", 20)])
def test_a_static_cache_on_a_device_is_never_waited_for(spec: str, launches: int) -> None:
    """What is left is taking off the tokens that were cut, and the mask of the layers behind a cut."""
    options = {"cache_implementation": "static", "disable_compile": True}
    inputs = tiny_inputs(images=(1,))
    dense = count(tiny_model, inputs, None, options=options)
    found = count(tiny_model, inputs, spec, options=options)
    more = {phase: found[phase].minus(dense[phase]) for phase in ("prefill", "decode")}
    assert [one.waits for one in more.values()] == [0, 0], [one.sites for one in more.values()]
    assert more["decode"].launches <= launches and more["decode"].uploads == 0
