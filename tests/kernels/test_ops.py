# SPDX-License-Identifier: Apache-2.0
"""The kernels as torch ops: schemas, fake kernels, gradients, torch.compile and torch.export."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from vlmprune.errors import UnsupportedError
from vlmprune.kernels import dispatch, ops

SCORES = torch.tensor([[3.0, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]])
UNORDERED = torch.tensor([[3, 1, 1], [0, 2, 5]], dtype=torch.int32)
ASCENDING = torch.tensor([[0, 3, 8], [1, 2, 5]], dtype=torch.int32)

CROPS = torch.tensor([[0, 1, 4, 5], [2, 3, 6, -1], [7, 8, -1, -1]])
# one row in front, three kept patches, two targets: 1 and 5 in the first row, 0 and 6 in the second
GROUPS = (
    torch.tensor([[-1, 0, 3, 8, 1, 5], [-1, 1, 2, 5, 0, 6]]),
    torch.tensor([[1, 4, 4, 2, 5, 5, 4, 4, 3], [4, 1, 2, 5, 4, 3, 5, 5, 4]]),
)


def drawn(*shape, dtype=torch.float32, grad=False, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(grad)


def cases():
    x, y, sim, w = drawn(2, 9, 4), torch.arange(18).view(2, 9), drawn(2, 9, 9), drawn(2, 9).abs()
    return {
        "topk_select": (SCORES, 4),
        "prune": (SCORES, 4, [x, y]),
        "gather_rows": ([drawn(2, 9, 4, grad=True), x], UNORDERED),
        "unprune": (drawn(2, 3, 4, grad=True), UNORDERED, 7),
        "greedy_maxmin": (sim, 4, None, "nn"),
        "greedy_maxmin_features": (x, 4, w, "argmax"),
        "greedy_cover": (drawn(2, 5, 9), 4, w, "product"),
        "greedy_dpp": (sim, w, 4),
        "greedy_dpp_features": (x, w, 4),
        "zoo_sensitivity": (drawn(2, 5, 6), drawn(6, 6)),
        "ordered_indices": (UNORDERED, 0, 7),
        "host_slots": (ASCENDING - 1, 9),
        "stretch": (SCORES, 1e-4),
        "detrend": (SCORES, torch.arange(9) > 1),
        "contextual_groups": (drawn(2, 9, 4), ASCENDING, 1, 2),
        "contextual_rows": (drawn(2, 9, 4, grad=True), *GROUPS, 4, "add"),
        "crop_variance": (x, CROPS),
        "crop_scores": (w, drawn(2, 3, 4).abs(), CROPS, 0.5),
        "share_out": (drawn(2, 3).abs(), CROPS, 5, 1.0, "paper"),
        "top_k_in_groups": (drawn(2, 3, 4), CROPS, torch.tensor([[1, 0, 2], [2, 2, 1]]), 5),
    }


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_torch_accepts_the_registration(name):
    results = opcheck(getattr(torch.ops.vlmprune, name).default, cases()[name])
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_the_op_does_what_the_door_does(name):
    args = cases()[name]
    expected, found = getattr(dispatch, name)(*args), getattr(torch.ops.vlmprune, name)(*args)
    torch.testing.assert_close(
        torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), rtol=0, atol=0
    )


def test_a_budget_above_the_number_of_tokens_takes_them_all():
    x = drawn(2, 9, 4)
    for scores, rows in ((SCORES, x), (FakeTensorMode().from_tensor(SCORES), None)):
        rows = scores.new_empty(2, 9, 4) if rows is None else rows
        with getattr(scores, "fake_mode", nullcontext()):
            idx, (y,) = torch.ops.vlmprune.prune(scores, 99, [rows])
            assert torch.ops.vlmprune.topk_select(scores, 99).shape == idx.shape == (2, 9)
            assert torch.ops.vlmprune.greedy_maxmin_features(rows, 99, None, "nn")[0].shape == (2, 9)
        assert y.shape == (2, 9, 4)
    assert torch.equal(torch.ops.vlmprune.prune(SCORES, 99, [x])[1][0], x)


def test_importing_the_package_registers_nothing():
    code = "import torch, vlmprune.kernels.dispatch; print(hasattr(torch.ops.vlmprune, 'prune'))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()
        == "False"
    )


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "f",
    [
        lambda x: dispatch.gather_rows([x, x * 2], UNORDERED),
        lambda x: dispatch.gather_rows([x], ASCENDING, ordered=True),
        lambda x: dispatch.unprune(x[:, :3], UNORDERED, 9),
        lambda x: dispatch.unprune(x[:, :3], ASCENDING, 9, ordered=True),
        lambda x: dispatch.prune(SCORES, 4, [x, x.square()])[1],
        lambda x: dispatch.prune(SCORES, 99, [x])[1],
        lambda x: dispatch.contextual_rows(x, *GROUPS, 4, "add"),
        lambda x: dispatch.contextual_rows(x, *GROUPS, 4, "mean"),
    ],
    ids=["gather", "gather ordered", "unprune", "unprune ordered", "prune", "prune all", "add", "mean"],
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rows_have_first_and_second_derivatives(f, backend):
    x = drawn(2, 9, 3, dtype=torch.float64, grad=True)
    with dispatch.use(backend):
        assert gradcheck(f, (x,))
        assert gradgradcheck(f, (x,))


def test_gradients_that_are_not_contiguous():
    x = drawn(2, 9, 4, grad=True)
    weight = drawn(4, 5, 2, seed=1).permute(2, 1, 0)  # (2, 5, 4), strides in no order
    _, (y,) = dispatch.prune(SCORES, 5, [x])
    (got,) = torch.autograd.grad(y, x, weight)
    rows = dispatch.topk_select(SCORES, 5).long()
    expected = torch.zeros(2, 9, 4)
    for b in range(2):
        expected[b, rows[b]] = weight[b]
    assert torch.equal(got, expected)


def test_scores_and_indices_have_no_gradient():
    scores, x = SCORES.clone().requires_grad_(), drawn(2, 9, 3, grad=True)
    idx, (y,) = dispatch.prune(scores, 4, [x])
    y.sum().backward()
    assert scores.grad is None and not idx.requires_grad and x.grad is not None
    assert not dispatch.topk_select(scores, 2).requires_grad
    assert not any(t.requires_grad for t in dispatch.greedy_maxmin_features(x, 3))
    assert not dispatch.zoo_sensitivity(x, drawn(3, 3)).requires_grad


# --- compiled and exported ------------------------------------------------------------------------


def pruned(scores, x, k):
    idx, (y,) = dispatch.prune(scores, k, [x])
    return idx, y * 2


def test_one_graph_serves_all_budgets_and_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pruned, fullgraph=True, backend=counter)
    for k in (2, 3, 4, 7, 9, 20):
        torch.testing.assert_close(
            compiled(SCORES, drawn(2, 9, 4), k), pruned(SCORES, drawn(2, 9, 4), k), rtol=0, atol=0
        )
    graphs = counter.frame_count
    assert graphs <= 3
    for n in (5, 17, 33):
        inputs = drawn(2, n), drawn(2, n, 4), 4
        torch.testing.assert_close(compiled(*inputs), pruned(*inputs), rtol=0, atol=0)
    assert counter.frame_count <= graphs + 2


def test_a_compiled_function_has_the_same_gradient():
    torch._dynamo.reset()
    x, weight = drawn(2, 9, 4, grad=True), drawn(2, 4, 4, seed=1)
    compiled = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(SCORES, x, 4)[1], x, weight)
    (expected,) = torch.autograd.grad(pruned(SCORES, x, 4)[1], x, weight)
    assert torch.equal(got, expected)


def test_a_compiled_function_obeys_the_block_around_its_call():
    torch._dynamo.reset()
    compiled = torch.compile(pruned, fullgraph=True, backend="eager")
    compiled(SCORES, drawn(2, 9, 4), 4)
    with dispatch.use("triton"), pytest.raises(UnsupportedError, match="triton"):
        compiled(SCORES, drawn(2, 9, 4), 4)


class Chain(torch.nn.Module):
    def forward(self, scores, x, k):
        idx, (y,) = dispatch.prune(scores, k, [x])
        order, _ = dispatch.greedy_maxmin_features(x, 3, first="argmax")
        return idx, y, order, dispatch.gather_rows([x], order)[0]


@pytest.mark.parametrize("k", [1, 4])
def test_export_with_any_batch_and_length(k):
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=4, max=4096)
    shapes = {"scores": {0: batch, 1: tokens}, "x": {0: batch, 1: tokens}, "k": None}
    program = torch.export.export(Chain(), (drawn(3, 9), drawn(3, 9, 4), k), dynamic_shapes=shapes)
    for b, n in ((1, 5), (4, 30)):
        inputs = drawn(b, n, seed=b), drawn(b, n, 4, seed=n), k
        torch.testing.assert_close(program.module()(*inputs), Chain()(*inputs), rtol=0, atol=0)


# --- forcing --------------------------------------------------------------------------------------


def test_a_block_forces_in_its_own_thread_only(monkeypatch):
    from vlmprune.kernels import backends

    used = []
    original = backends.forced
    monkeypatch.setattr(backends, "forced", lambda backend: used.append(original(backend)) or used[-1])
    with dispatch.use("reference"):
        other = threading.Thread(target=dispatch.topk_select, args=(SCORES, 2))
        other.start()
        other.join()
        dispatch.topk_select(SCORES, 2)
        dispatch.topk_select(SCORES, 2, backend="torch")
        with dispatch.use("torch"):
            dispatch.topk_select(SCORES, 2)
        dispatch.topk_select(SCORES, 2)
    dispatch.topk_select(SCORES, 2)
    assert used == ["", "reference", "torch", "torch", "reference", ""]
