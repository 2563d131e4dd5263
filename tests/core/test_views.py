# SPDX-License-Identifier: Apache-2.0
"""How a group of layers sees the sequence: written out by hand, and compared with the masks that the model
makes itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel, MistralConfig, StaticCache

from vlmprune.hooks.sequence.compaction import Compaction
from vlmprune.hooks.sequence.masks import LayerView, layer_kind
from vlmprune.hooks.sequence.views import Ahead, SequenceView, Views

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


def sequence_view(held="", new="11111", **options):
    batch = 1 if isinstance(new, str) else len(new)
    held, new = (bits(*([row] if isinstance(row, str) else row)) for row in (held, new))
    columns = torch.arange(held.shape[1], held.shape[1] + new.shape[1])[None]
    fields = {"position_ids": columns, "lost": torch.zeros(batch).long()}
    return SequenceView(**{"start": 0, "held": held, "new": new, **fields, **options})


def test_a_cut_keeps_or_recounts_positions_and_remembers_what_was_lost():
    whole = sequence_view(held="11", lost=torch.tensor([4]))
    cut = Compaction(bits("10101"), whole.new)
    original, compact = whole.opened_at(2).cut(cut, "original"), whole.cut(cut, "compact")
    assert (original.start, original.position_ids.tolist(), original.lost.tolist()) == (2, [[2, 4, 6]], [4])
    assert (compact.start, compact.position_ids.tolist(), compact.lost.tolist()) == (0, [[2, 3, 4]], [6])
    assert compact.valid.tolist() == [[True] * 5] and compact.held.tolist() == whole.held.tolist()


def test_a_cut_opens_a_view_and_shortens_all_later_ones():
    views = Views([sequence_view()])
    views.cut(0, Compaction(bits("11101"), views.at(0).new), "original")
    views.cut(3, Compaction(bits("1101"), views.at(3).new), "original")
    assert [(view.start, view.new.shape[1]) for view in views.all] == [(0, 4), (3, 3)]
    assert [views.at(layer).start for layer in (0, 2, 3, 9)] == [0, 0, 3, 3]


def test_marks_follow_the_cuts_of_their_layer_and_rows_are_expanded_back():
    views = Views([sequence_view()])
    views.cut(0, Compaction(bits("11011"), views.at(0).new), "original")
    views.cut(2, Compaction(bits("1001"), views.at(2).new), "original")
    marks = bits("01101")
    assert views.follow(marks, 0).int().tolist() == [[0, 1, 0, 1]]
    assert views.follow(marks, 2).int().tolist() == [[0, 1]]
    rows = torch.tensor([[[0.0], [4.0]]])
    assert views.expand(rows).flatten().tolist() == [0, 0, 0, 0, 4]
    assert views.expand(torch.tensor([[[0.0], [1.0], [3.0], [4.0]]]), 1).flatten().tolist() == [0, 1, 1, 3, 4]
    assert views.tail == 1


def test_a_view_outlives_its_forward_without_its_tail():
    view = sequence_view(held="10", new="0111", lost=torch.tensor([7]))
    frozen = view.frozen(2)
    assert frozen.held.int().tolist() == [[1, 0, 0, 1]] and frozen.new.shape == (1, 0)
    mask = bits(
        "111111" + "11" + "1"
    )  # six tokens stand behind the frozen slots, two came after them, one is new
    again = frozen.resumed(mask, 6, 8, torch.tensor([[8]]), None)
    assert again.valid.int().tolist() == [[1, 0, 0, 1, 1, 1, 1]] and again.position_ids.tolist() == [[1]]
    assert view.hiding(bits("10")).held.int().tolist() == [[0, 0]]


def test_positions_of_later_steps_are_counted_ahead():
    frozen, mask = sequence_view(held="101", new="1", lost=2).frozen(0), torch.ones(1, 900).bool()

    def step(seen, new=1):
        columns = torch.arange(seen, seen + new)[None]
        if new == 1:
            return frozen.stepped(6, seen, columns, True).position_ids
        return frozen.resumed(mask[:, : seen + new], 6, seen, columns, None, True).position_ids

    one, other = step(10), step(11, 3)
    assert (one.tolist(), other.tolist()) == ([[8]], [[9, 10, 11]])
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()  # nothing was computed
    # beyond what was counted, after a crop, more than are counted at once
    for seen, new in ((265, 2), (266, 1), (8, 1), (400, 300), (9, 1)):
        assert step(seen, new).tolist() == [list(range(seen - 2, seen - 2 + new))]
    given = frozen.stepped(6, 10, torch.tensor([[77]]), False)
    assert given.position_ids.tolist() == [[75]]  # of the user's own counting


def test_ragged_rows_get_dead_slots_that_are_not_valid():
    whole = sequence_view(held=["1", "0"], new=["1111", "0111"])
    cut = whole.cut(Compaction(bits("1111", "0101"), whole.new), "compact")
    assert cut.valid.int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert cut.position_ids[1, -2:].tolist() == [2, 3]


def test_angles_are_made_once_and_anew_after_a_cut():
    model = LlamaModel(LlamaConfig(**SIZES))
    hidden, whole = torch.zeros(1, 5, 8), sequence_view()
    cos, sin = whole.angles(model, 0, hidden)
    assert whole.angles(model, 0, hidden)[0] is cos
    cut = whole.cut(Compaction(bits("10011"), whole.new), "original").angles(model, 0, hidden)
    torch.testing.assert_close(cut, (cos[:, [0, 3, 4]], sin[:, [0, 3, 4]]))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [0, 2])
def test_masks_are_those_that_the_model_makes_for_the_same_slots(implementation, padding):
    config = MistralConfig(**SIZES, sliding_window=3, attn_implementation=implementation)
    whole = sequence_view(new="0" * padding + "1" * 5)
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
    assert sequence_view(held="111", new="1", maskless=True).mask(config, 1, one, growing) is None
    made = sequence_view(held="111", new="1", maskless=True).mask(config, 1, one, static)
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
    assert (view.get_seq_length(0), view.get_mask_sizes(torch.arange(2), 0), view.get_query_offset()) == (
        7,
        (9, 0),
        7,
    )
    assert asked == [2, 2, 2] and view.is_compileable


def test_the_kind_of_a_layer_is_read_off_its_config():
    assert layer_kind(LlamaConfig(**SIZES), 0) == "full_attention"
    assert layer_kind(MistralConfig(**SIZES, sliding_window=3), 0) == "sliding_attention"
    mixed = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=3)
    assert [layer_kind(mixed, layer) for layer in (0, 1)] == ["sliding_attention", "full_attention"]


def test_positions_counted_ahead_are_one_value_that_threads_can_share() -> None:
    """Copies of a cache share them: who has looked up where they begin must read the numbers of that time."""
    ahead, lost = Ahead(), 27
    assert ahead.take(100, torch.tensor([[100]]), lost).tolist() == [[73]]
    made = ahead._made
    assert ahead.take(340, torch.tensor([[340]]), lost).tolist() == [[313]]

    # another thread begins anew between the look at where they begin and the look at the numbers
    class Late(Ahead):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if name == "_made" and found is made:
                object.__setattr__(self, "_made", (356, torch.arange(256)[None]))
            return found

    late = Late()
    late._made = made
    assert late.take(340, torch.tensor([[340]]), lost).tolist() == [[313]]
