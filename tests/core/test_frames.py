# SPDX-License-Identifier: Apache-2.0
"""How a group of layers sees the sequence: written out by hand, and compared with the masks that the model makes itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel, MistralConfig, StaticCache

from vlmprune.core.compaction import Compaction
from vlmprune.core.frames import Frame, LayerView, layer_kind

SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def bits(*rows):
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def frame(past="", fed="11111", **options):
    batch = 1 if isinstance(fed, str) else len(fed)
    past, fed = (bits(*([row] if isinstance(row, str) else row)) for row in (past, fed))
    fields = {"position_ids": torch.arange(past.shape[1], past.shape[1] + fed.shape[1])[None], "lost": torch.zeros(batch).long()}
    return Frame(**{"start": 0, "past": past, "fed": fed, **fields, **options})


def test_a_cut_keeps_or_recounts_positions_and_remembers_what_was_lost():
    whole = frame(past="11", lost=torch.tensor([4]))
    cut = Compaction(bits("10101"), whole.fed)
    original, compact = whole.cut(cut, "original", start=2), whole.cut(cut, "compact", start=2)
    assert (original.start, original.position_ids.tolist(), original.lost.tolist()) == (2, [[2, 4, 6]], [4])
    assert (compact.start, compact.position_ids.tolist(), compact.lost.tolist()) == (2, [[2, 3, 4]], [6])
    assert compact.valid.tolist() == [[True] * 5] and compact.past.tolist() == whole.past.tolist()
    assert whole.cut(cut, "compact").start == 0


def test_ragged_rows_get_dead_slots_that_are_not_valid():
    whole = frame(past=["1", "0"], fed=["1111", "0111"])
    cut = whole.cut(Compaction(bits("1111", "0101"), whole.fed), "compact")
    assert cut.valid.int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert cut.position_ids[1, -2:].tolist() == [2, 3]


def test_fed_tokens_take_the_slots_after_those_held():
    assert frame(past="111", fed="11").cache_position().tolist() == [3, 4]


def test_angles_are_made_once_and_anew_after_a_cut():
    model = LlamaModel(LlamaConfig(**SIZES))
    hidden, whole = torch.zeros(1, 5, 8), frame()
    cos, sin = whole.angles(model, 0, hidden)
    assert whole.angles(model, 0, hidden)[0] is cos
    cut = whole.cut(Compaction(bits("10011"), whole.fed), "original").angles(model, 0, hidden)
    torch.testing.assert_close(cut, (cos[:, [0, 3, 4]], sin[:, [0, 3, 4]]))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [0, 2])
def test_masks_are_those_that_the_model_makes_for_the_same_slots(implementation, padding):
    config = MistralConfig(**SIZES, sliding_window=3, attn_implementation=implementation)
    whole = frame(fed="0" * padding + "1" * 5)
    hidden = torch.zeros(1, 5 + padding, 8)
    made = whole.mask(config, 1, hidden, None)
    assert whole.mask(config, 2, hidden, None) is made
    allowed = made if made.dtype == torch.bool else made == 0
    at = torch.arange(5 + padding)
    want = (at <= at[:, None]) & (at > at[:, None] - 3) & (at >= padding)
    assert torch.equal(allowed[0, 0, padding:], want[padding:])


def test_one_token_on_a_full_cache_needs_no_mask_unless_slots_are_still_empty():
    config = LlamaConfig(**SIZES, attn_implementation="sdpa")
    one = torch.zeros(1, 1, 8)
    held = torch.zeros(1, 2, 3, 4)
    growing = DynamicCache()
    static = StaticCache(config=config, max_cache_len=6)
    for cache in (growing, static):
        for layer in range(3):
            cache.update(held, held, layer, {"cache_position": torch.arange(3)})
    assert frame(past="111", fed="1", maskless=True).mask(config, 1, one, growing) is None
    made = frame(past="111", fed="1", maskless=True).mask(config, 1, one, static)
    assert made.flatten().tolist() == [True] * 4 + [False] * 2


def test_a_view_answers_for_its_own_layer():
    asked = []
    cache = SimpleNamespace(
        get_seq_length=lambda layer: asked.append(layer) or 7,
        get_mask_sizes=lambda query, layer: asked.append(layer) or (9, 0),
        get_query_offset=lambda layer: asked.append(layer) or 7,
        is_compileable=True,
    )
    view = LayerView(cache, 2)
    assert (view.get_seq_length(0), view.get_mask_sizes(torch.arange(2), 0), view.get_query_offset()) == (7, (9, 0), 7)
    assert asked == [2, 2, 2] and view.is_compileable


def test_the_kind_of_a_layer_is_read_off_its_config():
    assert layer_kind(LlamaConfig(**SIZES), 0) == "full_attention"
    assert layer_kind(MistralConfig(**SIZES, sliding_window=3), 0) == "sliding_attention"
    mixed = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=3)
    assert [layer_kind(mixed, layer) for layer in (0, 1)] == ["sliding_attention", "full_attention"]
