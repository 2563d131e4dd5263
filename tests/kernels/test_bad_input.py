# SPDX-License-Identifier: Apache-2.0
"""Input that cannot be right is refused, and the message names the argument."""

from __future__ import annotations

import pytest
import torch

from vlmprune import kernels
from vlmprune.errors import InvariantError, SpecError, UnsupportedError
from vlmprune.kernels import backends, dispatch

S, X, IDX = torch.zeros(2, 5), torch.zeros(2, 5, 3), torch.zeros(2, 3, dtype=torch.int64)
SIM = torch.zeros(2, 5, 5)
META = torch.zeros(2, 5, 3, device="meta")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dispatch.topk_select([1.0], 1), "scores is a list"),
        (lambda: dispatch.topk_select(S[0], 1), r"scores is torch.float32 of shape \(5,\).*\(B, N\)"),
        (lambda: dispatch.topk_select(S.to(torch.complex64), 1), "scores is torch.complex64"),
        (lambda: dispatch.topk_select(S[None], 1), r"scores is torch.float32 of shape \(1, 2, 5\).*\(B, N\)"),
        (lambda: dispatch.topk_select(S, -1), "k=-1; expected an integer from 0"),
        (lambda: dispatch.topk_select(S, 1.5), "k=1.5"),
        (lambda: dispatch.topk_select(S, True), "k=True"),
        (lambda: dispatch.topk_select(S, torch.tensor(2)), "k=tensor"),
        (lambda: dispatch.prune(S, 2, X), r"xs is torch.float32 of shape \(2, 5, 3\).*\[x\]"),
        (lambda: dispatch.prune(S, 2, [X, None]), r"xs\[1\] is a NoneType"),
        (lambda: dispatch.prune(S[:, :4], 2, [X]), r"xs\[0\].*\(2, 4, \*\)"),
        (lambda: dispatch.prune(S, 2, [X[:1]]), r"xs\[0\].*\(2, 5, \*\)"),
        (lambda: dispatch.prune(S, -1, [X]), "k=-1"),
        (lambda: dispatch.prune(S, 2, [META]), r"xs\[0\] is on meta.*cpu"),
        (lambda: dispatch.gather_rows(X, IDX), "xs is .*expected a list"),
        (lambda: dispatch.gather_rows([X], IDX.float()), "idx is torch.float32.*int32 or int64"),
        (lambda: dispatch.gather_rows([X], IDX[0]), "idx is .*B, K"),
        (lambda: dispatch.gather_rows([X, X[:, :4]], IDX), r"xs\[1\].*\(2, 5, \*\)"),
        (lambda: dispatch.gather_rows([X], IDX + 5), r"reaches from 5 to 5.*0\.\.4"),
        (lambda: dispatch.gather_rows([X], IDX - 1), "reaches from -1"),
        (lambda: dispatch.gather_rows([X.clone().requires_grad_()], IDX + 5), "reaches from 5"),
        (lambda: dispatch.unprune(X, IDX, 9), r"g is .*\(2, 3, \*\)"),
        (lambda: dispatch.unprune(X[:, :3], IDX + 9, 9), "reaches from 9"),
        (lambda: dispatch.unprune(X[:, :3], IDX, -1), "n=-1"),
        (lambda: dispatch.greedy_maxmin(X, 2), r"sim is .*\(2, 5, 5\)"),
        (lambda: dispatch.greedy_maxmin(SIM.long(), 2), "sim is torch.int64.*floating"),
        (lambda: dispatch.greedy_maxmin(SIM, -2), "k=-2"),
        (lambda: dispatch.greedy_maxmin(SIM, 2, S[:, :4]), r"weight is .*\(2, 5\)"),
        (lambda: dispatch.greedy_maxmin_features(S, 2), r"features is .*\(B, N, D\)"),
        (lambda: dispatch.greedy_dpp(SIM, None, 2), "relevance is a NoneType"),
        (lambda: dispatch.greedy_dpp_features(X, S.to("meta"), 2), "relevance is on meta"),
        (lambda: dispatch.zoo_sensitivity(X, torch.zeros(4, 4)), r"kernel is .*\(3, 3\)"),
        (lambda: dispatch.zoo_sensitivity(X, torch.zeros(3, 3).double()), "expected the same"),
        (lambda: dispatch.ordered_indices(S, 0, 5), "idx is torch.float32.*int32 or int64"),
        (lambda: dispatch.host_slots(IDX, 2), "3 entries a row; expected at most the 2 slots"),
        (lambda: dispatch.host_slots(IDX - 2, 5), r"reaches from -2.*-1\.\.4"),
        (lambda: dispatch.stretch(S.long(), 1e-4), "scores is torch.int64.*floating"),
        (lambda: dispatch.detrend(S, torch.ones(4).bool()), r"real is .*\(5\)"),
        (lambda: dispatch.contextual_groups(X, IDX + 5, 0, 1), r"reaches from 5 to 5.*0\.\.4"),
        (lambda: dispatch.contextual_groups(X, IDX, 0, 3), "contextual=3; expected at most the 2 patches"),
        (lambda: dispatch.contextual_rows(X, IDX, IDX, 1, "add"), r"row is .*\(2, 5\)"),
        (lambda: dispatch.contextual_rows(X, IDX - 1, torch.zeros(2, 5).long(), 1, "add"), "from -1"),
        (lambda: dispatch.crop_variance(X, IDX + 5), r"reaches from 5 to 5.*-1\.\.4"),
        (lambda: dispatch.crop_variance(X, IDX - 2), r"reaches from -2.*-1\.\.4"),
        (lambda: dispatch.crop_scores(S, torch.zeros(2, 3, 3), IDX, 1.0), r"variance is .*\(2, 2, 3\)"),
        (lambda: dispatch.share_out(S, IDX, 3, 1.0, "paper"), r"members is .*\(5, \*\)"),
        (lambda: dispatch.top_k_in_groups(X, IDX, IDX, 2), r"members is .*\(5, 3\)"),
    ],
)
def test_it_is_refused_by_name(call, message):
    with pytest.raises(InvariantError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dispatch.topk_select(S, 1, backend="tritn"), "'tritn'.*Did you mean 'triton'"),
        (lambda: dispatch.use("cuda").__enter__(), "backend='cuda'.*reference, torch, triton"),
        (lambda: dispatch.greedy_maxmin(SIM, 2, first="n"), "first='n'.*nn, argmax"),
        (lambda: dispatch.share_out(S[:, :2], IDX, 3, 1.0, "papr"), "rule='papr'.*Did you mean 'paper'"),
    ],
)
def test_words_without_a_meaning_are_refused(call, message):
    with pytest.raises(SpecError, match=message):
        call()


def test_forcing_triton_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with dispatch.use("triton"), pytest.raises(UnsupportedError, match=r"on cpu|not installed"):
        dispatch.topk_select(S, 1)
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    with pytest.raises(UnsupportedError, match=r"topk_select: Triton is not installed.*backend 'torch'"):
        dispatch.topk_select(S, 1, backend="triton")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dispatch.greedy_maxmin(SIM.double(), 2, backend="triton"), "float64"),
        (lambda: dispatch.unprune(X[:, :3], IDX, 9, backend="triton"), "ordered=True"),
    ],
)
def test_what_triton_cannot_do_is_an_error_where_it_is_there(monkeypatch, call, message):
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedError, match=message):
        call()


def test_the_package_offers_the_door():
    assert kernels.prune is dispatch.prune and "prune" in dir(kernels)
    with pytest.raises(AttributeError, match=r"public names: .*prune"):
        kernels.prun  # noqa: B018
