# SPDX-License-Identifier: Apache-2.0
"""The adopted cache by itself: lengths, rows, cropping, copies."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vlmprune
from vlmprune.errors import InvariantError
from vlmprune.hooks.sequence.cache import (
    CacheState,
    CutCacheMixin,
    Marks,
    adopt,
    cache_in,
    release,
    slots_held,
    state_of,
)
from vlmprune.hooks.sequence.views import SequenceView
from vlmprune.testing.tiny import tiny_inputs, tiny_model

HELD = torch.tensor([[False, True, True], [True, True, True]])
LOST = torch.tensor([5, 4])


class Owner:
    """Stands in for a session."""

    attached = True


@pytest.fixture
def owner() -> Iterator[Owner]:
    """The cache holds its owner weakly, so the test has to keep it."""
    yield Owner()


def filled(columns: int) -> DynamicCache:
    """Two layers whose keys (2, 1, columns, 4) say which row and column they are."""
    cache = DynamicCache()
    keys = (torch.arange(2.0)[:, None, None, None] * 100 + torch.arange(float(columns))[:, None]).expand(
        2, 1, columns, 4
    )
    for layer in range(2):
        cache.update(keys.clone(), keys.clone(), layer)
    return cache


def cut_cache(owner: Owner, after: int = 4) -> DynamicCache:
    """Eight tokens seen of which three slots are held, then ``after`` tokens more."""
    cache = filled(3 + after)
    adopt(cache, CacheState(8, [frozen(0, HELD, LOST)], weakref.ref(owner), False))
    return cache


def frozen(start: int, held: Tensor, lost: Tensor) -> SequenceView:
    return SequenceView(start, held.clone(), held[:, :0], held[:, :0].long(), lost.clone())


def keys(cache: DynamicCache, layer: int = 0) -> Tensor:
    return cache.layers[layer].keys[:, 0, :, 0]


def test_seen_without_a_layer_and_held_with_one(owner: Owner) -> None:
    cache = cut_cache(owner)
    assert cache.get_seq_length() == 12
    assert (
        [cache.get_seq_length(layer) for layer in (0, 1)]
        == [7, 7]
        == [slots_held(cache, layer) for layer in (0, 1)]
    )
    assert isinstance(cache, DynamicCache) and isinstance(cache, CutCacheMixin)
    assert slots_held(None) == 0


def test_lengths_are_physical_while_the_language_model_runs(owner: Owner) -> None:
    cache = cut_cache(owner)
    state_of(cache).inside = True
    assert cache.get_seq_length() == 7


def test_a_cache_whose_session_is_detached_or_gone_is_refused() -> None:
    owner = Owner()
    cache = cut_cache(owner)
    owner.attached = False
    with pytest.raises(InvariantError, match="keep the session attached for all turns"):
        cache.get_seq_length()
    owner.attached = True
    assert cache.get_seq_length() == 12
    del owner
    with pytest.raises(InvariantError, match="detached"):
        cache.get_seq_length()
    assert cache.get_seq_length(0) == 7


@pytest.mark.parametrize("order", [[1, 0], [1, 1], [0, 0]])
def test_reordered_beams_take_their_bookkeeping_along(owner: Owner, order: list[int]) -> None:
    cache = cut_cache(owner)
    cache.reorder_cache(torch.tensor(order))
    view = state_of(cache).views[0]
    assert torch.equal(keys(cache)[:, 0] // 100, torch.tensor(order, dtype=torch.float))
    assert torch.equal(view.held, HELD[order]) and torch.equal(view.lost, LOST[order])


def test_repeated_and_selected_rows_take_their_bookkeeping_along(owner: Owner) -> None:
    cache = cut_cache(owner)
    cache.batch_repeat_interleave(2)
    view = state_of(cache).views[0]
    assert (keys(cache)[:, 0] // 100).tolist() == [0, 0, 1, 1] and view.lost.tolist() == [5, 5, 4, 4]
    assert torch.equal(view.held, HELD[[0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([3, 0]))
    view = state_of(cache).views[0]
    assert (keys(cache)[:, 0] // 100).tolist() == [1, 0] and view.lost.tolist() == [4, 5]
    assert torch.equal(view.held, HELD[[1, 0]])


@pytest.mark.parametrize(("size", "seen"), [(-1, 11), (-4, 8), (0, 12), (11, 11), (8, 8), (12, 12), (50, 12)])
def test_crop_by_columns_removed_or_by_tokens_seen(owner: Owner, size: int, seen: int) -> None:
    cache = cut_cache(owner)
    cache.crop(size)
    assert cache.get_seq_length() == seen and [slots_held(cache, i) for i in (0, 1)] == [seen - 5] * 2
    assert torch.equal(keys(cache), keys(filled(7))[:, : seen - 5])


@pytest.mark.parametrize("size", [-5, -12, 7, 1])
def test_crop_into_the_cut_part_is_refused_and_removes_nothing(owner: Owner, size: int) -> None:
    cache = cut_cache(owner)
    with pytest.raises(InvariantError, match="its first 8 tokens were cut together"):
        cache.crop(size)
    assert cache.get_seq_length() == 12


def test_a_deep_copy_is_independent(owner: Owner) -> None:
    cache = cut_cache(owner)
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-2)
    state = state_of(twin)
    assert twin.get_seq_length() == 12 and torch.equal(keys(twin), keys(filled(7)))
    assert torch.equal(state.views[0].held, HELD) and state.owner() is owner and state.seen == 8


def test_a_deep_copy_shares_no_memory(owner: Owner) -> None:
    cache = cut_cache(owner)
    state = state_of(cache)
    state.marks[1] = Marks(HELD.clone(), HELD.clone())
    twin = state_of(copy.deepcopy(cache))
    for tensor in (state.views[0].held, state.views[0].lost, state.marks[1].marked, state.marks[1].visual):
        tensor.zero_()
    assert torch.equal(twin.views[0].held, HELD) and torch.equal(twin.views[0].lost, LOST)
    assert torch.equal(twin.marks[1].marked, HELD) and torch.equal(twin.marks[1].visual, HELD)


def test_marks_of_a_layer_follow_rows_and_end_where_the_cache_ends(owner: Owner) -> None:
    """What a re-weighting method marked: (B, slots held) per layer."""
    cache = cut_cache(owner)
    marked = torch.eye(2, 7, dtype=torch.bool)
    state_of(cache).marks[1] = Marks(marked, ~marked)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(state_of(cache).marks[1].marked, marked[[1, 0]])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    assert torch.equal(state_of(cache).marks[1].marked, marked[[0, 1, 1]])
    cache.crop(-2)
    assert torch.equal(state_of(cache).marks[1].visual, ~marked[[0, 1, 1], :5])


def test_release_gives_the_class_back(owner: Owner) -> None:
    cache = cut_cache(owner)
    release(cache)
    assert (
        type(cache) is DynamicCache and "_vlmprune_state" not in vars(cache) and cache.get_seq_length() == 7
    )
    release(cache)
    assert state_of(cache) is None and state_of(None) is None


def test_adopting_again_replaces_the_bookkeeping_only(owner: Owner) -> None:
    cache = cut_cache(owner)
    cls = type(cache)
    adopt(
        cache, CacheState(20, [frozen(0, torch.ones(2, 7, dtype=torch.bool), LOST)], weakref.ref(owner), True)
    )
    assert type(cache) is cls and cls.__mro__.count(CutCacheMixin) == 1 and cache.get_seq_length() == 20


def test_reset_forgets_the_cut(owner: Owner) -> None:
    cache = cut_cache(owner)
    cache.reset()
    if slots_held(cache):
        pytest.skip("reset of this transformers leaves a dynamic cache its length")
    assert cache.get_seq_length() == 0 and state_of(cache) is None


def test_a_cache_that_holds_nothing_any_more_is_released(owner: Owner) -> None:
    """Layers can be emptied one by one, without the cache being told."""
    cache = DynamicCache()
    adopt(cache, CacheState(8, [frozen(0, HELD, LOST)], weakref.ref(owner), False))
    assert state_of(cache) is None and type(cache) is DynamicCache


def test_views_answer_for_their_layers() -> None:
    first, second = frozen(0, HELD, LOST), frozen(3, HELD[:, 1:], LOST + 1)
    state = CacheState(8, [first, second], weakref.ref(Owner()), False)
    assert [state.view(layer) is second for layer in (0, 2, 3, 9)] == [False, False, True, True]


class Output(dict):
    """Of transformers 5.24: it has the attribute ``cache``, and warns of any older name."""

    cache = None

    def get(self, name, default=None):
        assert name == "cache", "a warning in the log of the user"
        return super().get(name, default)


def test_an_output_without_a_cache_is_not_asked_for_the_older_name():
    assert cache_in(Output()) is None and cache_in(Output(cache=1)) == 1
    assert cache_in({"past_key_values": 1}) == 1 and cache_in({}) is None


@pytest.mark.parametrize("spec", ["divprune@9", "pyramiddrop", "visionzip@9"])
@torch.no_grad()
def test_positions_do_not_let_a_cut_cache_go_on_without_its_session(spec: str) -> None:
    """A call that is given positions, as generate gives them, does not ask for the length of the cache."""
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    length = inputs["input_ids"].shape[1]
    step = {"input_ids": torch.tensor([[7]]), "position_ids": torch.tensor([[length]])}
    with vlmprune.prune(model, spec):
        cache = model(**inputs, use_cache=True).past_key_values
        model(**step, past_key_values=cache)
    with pytest.raises(InvariantError, match="cut by a pruning session that is detached"):
        model(**step, past_key_values=cache)
