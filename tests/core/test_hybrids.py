# SPDX-License-Identifier: Apache-2.0
"""Language models with layers that keep a running state instead of keys: cuts are right there, or refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import vlmprune
from vlmprune.errors import UnsupportedError
from vlmprune.testing.backbones import BACKBONES, RECURRENT
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row

NAMES = [name for name in RECURRENT if hasattr(transformers, BACKBONES[name][0] + "Config")]
IMAGES = (1, 0, 2)


def conversation(
    model: nn.Module, first: dict[str, Tensor], second: Tensor
) -> tuple[dict[str, Tensor], DynamicCache]:
    """Inputs of a second turn of text on the kept cache of a first one."""
    cache = DynamicCache(config=model.config.text_config)
    answer = generate(model, first, cache)
    ids = torch.cat([first["input_ids"], answer, second], dim=1)
    mask = torch.cat(
        [first["attention_mask"], torch.ones(len(ids), answer.shape[1] + second.shape[1]).long()], dim=1
    )
    return {"input_ids": ids, "attention_mask": mask}, cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_cut_before_is_right_in_a_ragged_first_turn_and_in_the_next_one(name: str, positions: str) -> None:
    model, inputs = tiny_model("llava", text=name), tiny_inputs("llava", images=IMAGES)
    second = torch.tensor([[5, 6, 7]])
    with vlmprune.prune(model, "fastervlm@9", positions=positions):
        together = generate(model, inputs)
        turn, cache = conversation(model, inputs, second.expand(3, -1))
        later = generate(model, turn, cache)
        for i in range(3):
            row = tiny_row(inputs, "llava", i, IMAGES)
            assert torch.equal(generate(model, row)[0], together[i])
            turn, cache = conversation(model, row, second)
            assert torch.equal(generate(model, turn, cache)[0], later[i])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "falcon_h1"])
@pytest.mark.parametrize("layer", [1, 2])  # the first attention layer is 1: at 1 it lies in the cut group
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_cut_inside_decodes_with_a_cache_as_without(name: str, layer: int, positions: str) -> None:
    model, inputs = tiny_model("llava", text=name), tiny_inputs("llava", images=IMAGES)
    with vlmprune.prune(model, f"pyramiddrop(layers=[{layer}],shares=[0.25])", positions=positions) as run:
        cached = generate(model, inputs)
        assert run.last.tokens_per_layer == [36.0] * layer + [9.0] * (4 - layer)
        assert torch.equal(generate(model, inputs, use_cache=False), cached)
        for i in range(3):
            assert torch.equal(generate(model, tiny_row(inputs, "llava", i, IMAGES))[0], cached[i])


@pytest.mark.parametrize("name", NAMES)
def test_filling_of_shorter_rows_in_a_later_turn_is_refused(name: str) -> None:
    """Row 0 brings an image and row 1 as much text: after the cut row 0 is shorter, and its filling would be
    stepped over.
    """
    model = tiny_model("llava", text=name)
    text = tiny_inputs("llava", images=(0, 0))
    image = tiny_inputs("llava", images=(1,))
    length = image["input_ids"].shape[1]
    words = torch.randint(20, 200, (1, length), generator=torch.Generator().manual_seed(0))
    with vlmprune.prune(model, "random@9"):
        turn, cache = conversation(model, text, torch.cat([image["input_ids"], words]))
        with pytest.raises(UnsupportedError, match="running state"):
            generate(model, {**turn, "pixel_values": image["pixel_values"]}, cache)
        row = tiny_row(text, "llava", 0, (0, 0))
        turn, cache = conversation(model, row, image["input_ids"])
        assert generate(model, {**turn, "pixel_values": image["pixel_values"]}, cache).shape == (1, 5)
