# SPDX-License-Identifier: Apache-2.0
"""Compaction against plain Python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.hooks.sequence.compaction import Compaction, EvenCompaction


def random_cut(seed: int, rows: int = 4, columns: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch of which random columns are kept; the last column of every row is a kept token."""
    random = torch.Generator().manual_seed(seed)
    padding = torch.randint(0, columns - 1, (rows, 1), generator=random)
    valid = torch.arange(columns) >= padding
    keep = torch.rand(rows, columns, generator=random) < 0.5
    keep[:, -1] = True
    return keep, valid


def kept_columns(keep: torch.Tensor, valid: torch.Tensor) -> list[list[int]]:
    return [[c for c in range(keep.shape[1]) if keep[r, c] and valid[r, c]] for r in range(keep.shape[0])]


@pytest.mark.parametrize("seed", range(5))
def test_kept_columns_stand_on_the_right_in_order_and_the_rest_is_masked(seed: int) -> None:
    keep, valid = random_cut(seed)
    cut, wanted = Compaction(keep, valid), kept_columns(keep, valid)
    rows = torch.randn(*keep.shape, 3)
    child = cut.sequence(rows)
    assert cut.count.tolist() == [len(w) for w in wanted] and cut.width == max(map(len, wanted))
    assert child.shape == (4, cut.width, 3) and cut.valid.dtype == torch.bool
    for r, columns in enumerate(wanted):
        assert cut.valid[r].tolist() == [False] * (cut.width - len(columns)) + [True] * len(columns)
        assert torch.equal(child[r, cut.width - len(columns) :], rows[r, columns])


def test_dead_slots_repeat_real_rows() -> None:
    """Whatever a dead slot holds must be a row of the parent, never uninitialised memory."""
    keep, valid = random_cut(0)
    rows = torch.randn(*keep.shape, 3)
    child = Compaction(keep, valid).sequence(rows)
    for r in range(len(rows)):
        assert all(any(torch.equal(slot, row) for row in rows[r]) for slot in child[r])


@pytest.mark.parametrize("seed", range(5))
def test_positions_are_original_or_counted_again(seed: int) -> None:
    keep, valid = random_cut(seed)
    cut, wanted = Compaction(keep, valid), kept_columns(keep, valid)
    numbers = (valid.long().cumsum(1) - 1).clamp_min(0)  # as generate makes them
    original, compact = cut.positions(numbers, "original"), cut.positions(numbers, "compact")
    for r, columns in enumerate(wanted):
        assert original[r, cut.valid[r]].tolist() == [int(numbers[r, c]) for c in columns]
        assert compact[r, cut.valid[r]].tolist() == list(range(len(columns)))
    assert int(compact.min()) >= 0 and cut.lost.tolist() == [
        int(valid[r].sum()) - len(wanted[r]) for r in range(4)
    ]


def test_positions_of_a_batch_of_one_and_of_several_axes_are_broadcast() -> None:
    keep, valid = random_cut(1)
    cut = Compaction(keep, valid)
    one = torch.arange(keep.shape[1])[None]
    assert torch.equal(cut.positions(one, "original"), cut.positions(one.expand(4, -1), "original"))
    axes = torch.stack([one, one + 100, one + 200])  # (3, 1, L)
    moved = cut.positions(axes, "original")
    assert moved.shape == (3, 4, cut.width) and torch.equal(moved[2], moved[0] + 200)


@pytest.mark.parametrize("seed", range(5))
def test_expand_takes_the_last_kept_row_at_or_before_every_column(seed: int) -> None:
    keep, valid = random_cut(seed)
    cut = Compaction(keep, valid)
    rows = torch.randn(*keep.shape, 3)
    full = cut.expand(cut.sequence(rows))
    assert full.shape == rows.shape
    for r, columns in enumerate(kept_columns(keep, valid)):
        for c in range(columns[0], keep.shape[1]):
            assert torch.equal(full[r, c], rows[r, max(k for k in columns if k <= c)])


def test_keeping_every_column_changes_nothing() -> None:
    everything = torch.ones(2, 5, dtype=torch.bool)
    cut, rows = Compaction(everything, everything), torch.randn(2, 5, 3)
    assert torch.equal(cut.sequence(rows), rows) and torch.equal(cut.expand(rows), rows)
    assert cut.lost.tolist() == [0, 0] and bool(cut.valid.all())


def test_a_row_of_padding_alone_shrinks_with_the_others() -> None:
    keep = torch.ones(2, 6, dtype=torch.bool)
    valid = torch.tensor([[False] * 6, [False, True, True, True, True, True]])
    keep[1, 2:4] = False
    cut = Compaction(keep, valid)
    assert cut.width == 3 and cut.valid.tolist() == [[False] * 3, [True] * 3]
    assert bool(cut.expand(cut.sequence(torch.randn(2, 6, 3))).isfinite().all())


def test_gradients_reach_kept_rows_only() -> None:
    keep, valid = random_cut(2, rows=1)
    rows = torch.randn(*keep.shape, 3, requires_grad=True)
    cut = Compaction(keep, valid)
    cut.sequence(rows)[cut.valid].sum().backward()
    assert torch.equal(rows.grad[..., 0] != 0, keep & valid)


@st.composite
def even_cuts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """(keep, valid) of a left-padded batch whose rows all lose the same number of tokens."""
    rows, columns, seed = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(0, 999))
    random = torch.Generator().manual_seed(seed)
    padding = torch.randint(0, columns - 1, (rows, 1), generator=random)
    padding[0] = 0  # the longest row has none
    valid = torch.arange(columns) >= padding
    lost = draw(st.integers(0, int(valid.sum(dim=1).min()) - 1))
    order = torch.rand(rows, columns, generator=random).masked_fill(~valid, 2.0).argsort(dim=1)
    return torch.ones(rows, columns, dtype=torch.bool).scatter(1, order[:, :lost], False), valid


@settings(max_examples=60, deadline=None)
@given(even_cuts(), st.booleans())
def test_an_even_cut_is_the_same_in_one_launch(cut: tuple[torch.Tensor, torch.Tensor], shared: bool) -> None:
    keep, valid = cut
    width, rows = int(keep[0].sum()), torch.randn(*keep.shape, 3)
    numbers = (valid.long().cumsum(1) - 1).clamp_min(0)
    if shared and bool(valid.all()):
        numbers = numbers[:1]  # one row of positions for all
    slow, whole = Compaction(keep, valid, width), bool(valid.all())
    fast = EvenCompaction(keep.float(), width, valid, numbers, [rows], whole=whole)
    assert torch.equal(fast.sequence(rows), slow.sequence(rows))
    assert torch.equal(fast.sequence(rows + 1), slow.sequence(rows + 1))  # not among those cut along
    assert torch.equal(fast.valid, slow.valid) and torch.equal(fast.kept, slow.kept)
    assert torch.equal(fast.index.long(), slow.index) and fast.tail == slow.tail and fast.is_even
    assert slow.lost.tolist() == [fast.lost] * len(keep)
    marks = torch.rand(keep.shape) < 0.5
    assert torch.equal(fast.follow(marks), slow.follow(marks))
    moved = torch.where(keep, fast.new_columns, -1)
    assert torch.equal(moved, torch.where(keep, slow.new_columns, -1))
    for row, columns in enumerate(keep):
        columns = columns.nonzero()[:, 0]
        assert torch.equal(fast.moved(row, columns), slow.moved(row, columns))
    short = fast.sequence(rows)
    assert torch.equal(fast.expand(short), slow.expand(short))
    for policy in ("original", "compact"):
        found, want = fast.positions(numbers, policy), slow.positions(numbers, policy)
        assert torch.equal(found[fast.valid], want[slow.valid]) and int(found.min()) >= 0


def test_axes_of_positions_are_cut_along() -> None:
    numbers = torch.randint(9, (3, 2, 5))  # M-RoPE
    keep = torch.tensor([[True, False, True, True, False], [True, True, False, False, True]])
    everything = torch.ones_like(keep)
    fast = EvenCompaction(keep.float(), 3, everything, numbers, [], whole=True)
    want = Compaction(keep, everything, 3).positions(numbers, "original")
    assert torch.equal(fast.positions(numbers, "original"), want)
    assert torch.equal(fast.positions(numbers, "original"), want)  # asked again, when it is not held any more


@settings(max_examples=20, deadline=None)
@given(even_cuts(), st.integers(0, 7))
def test_positions_that_follow_each_other_are_the_first_ones(
    cut: tuple[torch.Tensor, torch.Tensor], first: int
) -> None:
    keep, everything = cut[0], torch.ones_like(cut[0])
    width, numbers = int(keep[0].sum()), torch.arange(first, first + keep.shape[1])[None]
    fast = EvenCompaction(keep.float(), width, everything, None, [], whole=True)
    slow = Compaction(keep, everything, width)
    for policy in ("compact", "original"):
        found = fast.positions(numbers, policy).expand(len(keep), -1)
        assert torch.equal(found, slow.positions(numbers, policy))
    assert fast.slides and not slow.slides
