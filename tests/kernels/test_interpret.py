# SPDX-License-Identifier: Apache-2.0
"""Triton kernels in the interpreter, on the CPU, against what they mean."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import CASES
from kernel_check import KernelCase, check, compare, tensors

from vlmprune.kernels import reference

pytestmark = [
    pytest.mark.interpret,
    # the interpreter computes lanes that are masked off as well
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning"
    ),
]


@pytest.fixture(scope="module")
def ops():
    from vlmprune.kernels import triton

    return triton


def cases(*names):
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] * case.slow)
        for case in CASES
        if not names or case.op in names
    ]


@pytest.mark.parametrize("case", cases())
def test_a_kernel_means_what_the_reference_says(case, ops, guarded):
    check(case, ops)


@pytest.mark.parametrize("case", cases("greedy_maxmin", "greedy_dpp"))
def test_a_launch_per_pick_makes_the_same_picks(case, ops, monkeypatch, guarded):
    from vlmprune.kernels.triton import dpp, maxmin

    monkeypatch.setattr(maxmin, "MAX_BLOCK", 0)
    monkeypatch.setattr(dpp, "_BLOCK", 0)
    check(case, ops)


MANY_COLUMNS = [
    param
    for param in cases("prune", "gather_rows", "unprune")
    if "many columns" in param.id or "700" in param.id
]


@pytest.mark.parametrize("case", MANY_COLUMNS)
def test_a_program_may_take_several_tiles_of_columns(case, ops, monkeypatch, guarded):
    from vlmprune.kernels.triton import gather

    monkeypatch.setattr(gather, "_BUSY", 1)
    check(case, ops)


DOORS = {
    "topk_select": "ties-33-16",
    "prune": "odd width",
    "gather_rows": "2-33-9-16",
    "unprune": "2-33-9-16",
    "greedy_maxmin": "21-7-nn",
    "greedy_maxmin_features": "21-7-nn",
    "greedy_dpp": "21-7",
    "greedy_dpp_features": "21-7",
    "zoo_sensitivity": "13-40",
    "ordered_indices": "40-5-wrong",
    "host_slots": "40-5-int32",
    "stretch": "special-13",
    "detrend": "33-torch.bfloat16",
    "contextual_groups": "few-ties",
    "contextual_rows": "few-mean-5",
    "crop_variance": "ragged-40",
    "crop_scores": "ragged-0.3",
    "share_out": "ragged-paper-1.0-0.3",
    "top_k_in_groups": "ragged-ties-7",
}


@pytest.mark.parametrize(("op", "name"), DOORS.items())
def test_the_door_leads_to_triton(op, name, ops, monkeypatch):
    from vlmprune.kernels import dispatch

    called, launcher = [], getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **kwargs: called.append(op) or launcher(*args, **kwargs))
    (case,) = [case for case in CASES if (case.op, case.name) == (op, name)]
    with dispatch.use("triton"):
        check(replace(case, options={"ordered": True} if op == "unprune" else {}), dispatch)
    assert called == [op] and set(DOORS) == {case.op for case in CASES}


def test_gradients_of_pruned_rows_go_back_through_triton(ops):
    from vlmprune.kernels import dispatch

    x = torch.randn(2, 9, 5, requires_grad=True)
    with dispatch.use("triton"):
        idx, (y,) = dispatch.prune(torch.randn(2, 9), 4, [x])
        y.square().sum().backward()
    kept = idx.long()[..., None].expand(-1, -1, 5)
    assert torch.equal(x.grad, torch.zeros_like(x).scatter(1, kept, 2 * y.detach()))


VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, math.inf, -math.inf, math.nan, 3e38, -3e38]
) | st.floats(width=32)
few = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@few
@given(values=st.lists(VALUES, min_size=1, max_size=40), k=st.integers(0, 45))
def test_any_scores_are_ranked_as_by_the_reference(values, k, ops):
    scores = torch.tensor([values])
    assert torch.equal(ops.topk_select(scores, k), reference.topk_select(scores, k))


@few
@given(data=st.data(), n=st.integers(0, 50), k=st.integers(0, 55))
def test_any_rows_are_pruned(data, n, k, ops):
    width = data.draw(st.integers(1, 40))
    scores = torch.randint(0, 4, (1, n)).float()
    xs = [torch.randn(1, n, width), torch.arange(n)[None]]
    form = data.draw(st.sampled_from(["fused", "two"]))
    expected = tensors(reference.prune(scores, k, xs))
    compare(KernelCase("prune", "drawn", tuple), expected, tensors(ops.prune(scores, k, xs, form)))


@few
@given(data=st.data(), n=st.integers(1, 40))
def test_unprune_undoes_gather(data, n, ops):
    idx = torch.tensor([sorted(data.draw(st.sets(st.integers(0, n - 1))))]).view(1, -1).int()
    x = torch.randn(1, n, data.draw(st.integers(1, 20)))
    kept = torch.zeros(1, n, 1).index_fill_(1, idx[0].long(), 1)
    assert torch.equal(ops.unprune(ops.gather_rows([x], idx)[0], idx, n), x * kept)


def test_rows_may_lie_more_than_two_gigabytes_apart(ops):
    # memory that is never written costs nothing: four rows, 2**31 bytes apart
    store = torch.empty(3 * 2**31 + 64, dtype=torch.int8)
    x = store.as_strided((1, 4, 16), (4 * 2**31, 2**31, 1))
    x.copy_(torch.arange(64).view(1, 4, 16))
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    for form in ("fused", "two"):
        idx, (y,) = ops.prune(scores, 2, [x], form=form)
        assert idx.tolist() == [[1, 3]] and torch.equal(y, x[:, [1, 3]])
    assert torch.equal(ops.gather_rows([x], torch.tensor([[3, 0]]).int())[0], x[:, [3, 0]])
    assert torch.equal(ops.unprune(x, torch.tensor([[0, 2, 3, 5]]).int(), 6)[:, [0, 2, 3, 5]], x)


def test_many_samples_run_fused_or_apart(ops):
    from vlmprune.kernels.triton.prune import fused_rows

    assert fused_rows(1, 576) == 16
    assert fused_rows(16, 2880) == 32
    assert fused_rows(64, 2880) is None


def test_no_tensor_is_left_out(ops):
    # a row of each dtype that torch can hold and a kernel cannot load by name
    x = torch.arange(24, dtype=torch.float64).view(1, 6, 4)
    xs = [
        x,
        x.to(torch.complex64),
        x.to(torch.float8_e4m3fn),
        x.to(torch.uint8),
        x > 3,
        x.to(torch.int16),
        x.half(),
    ]
    idx = torch.tensor([[4, 1]]).int()
    for got, want in zip(ops.gather_rows(xs, idx), xs, strict=True):
        rows = torch.stack([want[:, 4], want[:, 1]], dim=1)
        assert got.dtype == want.dtype and torch.equal(got.view(torch.uint8), rows.view(torch.uint8))


def test_a_type_that_is_too_wide_is_refused(ops):
    from vlmprune.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="view_as_real"):
        ops.gather_rows([torch.zeros(1, 4, 2, dtype=torch.complex128)], torch.zeros(1, 1).int())
