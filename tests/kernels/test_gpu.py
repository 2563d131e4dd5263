# SPDX-License-Identifier: Apache-2.0
"""Triton kernels on a GPU: the cases of the interpreter, and what only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES
from kernel_check import check, compare, tensors, to

from vlmprune.kernels import reference

pytestmark = pytest.mark.gpu
REPEATS = 100


@pytest.fixture(scope="module")
def ops():
    from vlmprune.kernels import triton

    return triton


def cases(*names):
    return [pytest.param(case, id=str(case)) for case in CASES if not names or case.op in names]


@pytest.mark.parametrize("case", cases())
def test_a_kernel_means_what_the_reference_says(case, ops, guarded):
    check(case, ops, "cuda")


@pytest.mark.parametrize("case", cases("greedy_maxmin", "greedy_dpp"))
def test_a_launch_per_pick_makes_the_same_picks(case, ops, monkeypatch):
    from vlmprune.kernels.triton import dpp, maxmin

    monkeypatch.setattr(maxmin, "MAX_BLOCK", 0)
    monkeypatch.setattr(dpp, "_BLOCK", 0)
    check(case, ops, "cuda")


@pytest.mark.parametrize("case", [param for param in cases() if not param.values[0].slow])
def test_every_run_gives_the_same_bits(case, ops):
    args = to(list(case.arguments()), "cuda")
    call = getattr(ops, case.op)
    first = tensors(call(*args, **case.options))
    for _ in range(REPEATS):
        for want, got in zip(first, tensors(call(*args, **case.options)), strict=True):
            assert torch.equal(want.view(torch.uint8), got.view(torch.uint8))


def float_tensors(args):
    return [
        t
        for t in tensors([a for a in args if isinstance(a, (list, torch.Tensor))])
        if t.dtype == torch.float32
    ]


GRAPHED = [op for op in dict.fromkeys(case.op for case in CASES) if not op.startswith("greedy")]
QUICK = {op: [param for param in cases(op) if not param.values[0].slow] for op in GRAPHED}


@pytest.mark.parametrize(
    "case", [*(QUICK[op][0] for op in GRAPHED), *[p for p in QUICK["topk_select"] if "long" in p.id]]
)
def test_a_captured_graph_reads_its_inputs_anew(case, ops):
    args = to(list(case.arguments()), "cuda")
    call = getattr(ops, case.op)
    call(*args, **case.options)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = tensors(call(*args, **case.options))
    for _ in range(3):
        for tensor in float_tensors(args):
            tensor.copy_(torch.rand_like(tensor))
        graph.replay()
        compare(case, tensors(getattr(reference, case.op)(*to(list(args), "cpu"))), found)


@pytest.mark.parametrize(
    "op", ["greedy_maxmin", "greedy_maxmin_features", "greedy_dpp", "greedy_dpp_features"]
)
def test_greedy_choice_can_be_captured(op, ops):
    (case, *_) = [param.values[0] for param in cases(op) if "21-7" in param.id]
    args = to(list(case.arguments()), "cuda")
    want = tensors(getattr(ops, op)(*args))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = tensors(getattr(ops, op)(*args))
    for tensor in found:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


def test_two_streams_do_not_disturb_each_other(ops):
    inputs = [torch.randn(8, 2880, device="cuda").round(decimals=1) for _ in range(2)]
    xs = [torch.randn(8, 2880, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    want = [ops.prune(scores, 320, [x]) for scores, x in zip(inputs, xs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(50):
        found = []
        for stream, scores, x in zip(streams, inputs, xs, strict=True):
            with torch.cuda.stream(stream):
                found.append(ops.prune(scores, 320, [x]))
        torch.cuda.synchronize()
        for (idx, (y,)), (idx_wanted, (y_wanted,)) in zip(found, want, strict=True):
            assert torch.equal(idx, idx_wanted) and torch.equal(y, y_wanted)


def test_more_than_two_to_the_31_elements(ops):
    batch, n, width, k = 2, 2**17 + 3, 2**14, 70_000
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GB of free memory")
    x = torch.empty(batch, n, width, dtype=torch.int8, device="cuda")
    x[:, :, 0] = (torch.arange(n, device="cuda") % 127).to(torch.int8)
    x[:, :, -1] = (torch.arange(n, device="cuda") % 113).to(torch.int8)
    scores = torch.randn(batch, n, device="cuda")
    idx, (y,) = ops.prune(scores, k, [x])
    assert x.numel() > 2**31 and y.numel() > 2**31
    assert torch.equal(idx.cpu(), reference.topk_select(scores.cpu(), k))
    for column in (0, -1):
        assert torch.equal(y[:, :, column], x[:, :, column].gather(1, idx.long()))


def test_a_device_that_is_not_the_current_one(ops):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    scores = torch.randn(2, 576, device="cuda:1")
    assert torch.equal(ops.topk_select(scores, 64).cpu(), reference.topk_select(scores.cpu(), 64))


def test_a_hundred_thousand_tokens_need_no_matrix(ops):
    features = torch.nn.functional.normalize(torch.randn(1, 100_000, 256, device="cuda"), dim=-1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    order, _ = ops.greedy_maxmin_features(features, 1000)
    assert len(set(order[0].tolist())) == 1000
    assert torch.cuda.max_memory_allocated() - before < 2**30
