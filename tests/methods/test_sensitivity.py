# SPDX-License-Identifier: Apache-2.0
"""Sensitivity of a projector: estimators against the Jacobian and each other, and what is remembered of a
projector.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from projectors import mlp
from torch import nn

from vlmprune.methods.zooprune import cache, sensitivity
from vlmprune.methods.zooprune.projector import two_layers
from vlmprune.methods.zooprune.sensitivity import closed_form, directional, finite_difference, unit_directions
from vlmprune.testing.conformance import shared_model


def spearman(a, b):
    ranks = torch.stack([a.flatten().argsort().argsort(), b.flatten().argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=["gelu", "tanh", "silu"])
@pytest.mark.parametrize("rank", [None, 5])
def test_estimators_agree_with_the_jacobian(norm, act, rank):
    projector = mlp(norm=norm, act=act).double()
    if norm:
        projector[0].eps = 0.05  # large enough to matter
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    layers = two_layers(projector, torch.float64, rank)
    if rank is None:
        torch.testing.assert_close(layers(x), projector(x))
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(layers, token) for token in x.flatten(0, 1)]
    )  # (12, D, C)
    length = jacobian.flatten(1).norm(dim=1).view(2, 6) / 12**0.5
    torch.testing.assert_close(closed_form(projector, x, rank), length, rtol=1e-9, atol=0)
    u = unit_directions(30, 12, seed=1).double()
    mean = (jacobian @ u.T).norm(dim=1).mean(1).view(2, 6)
    torch.testing.assert_close(directional(projector, x, u, rank), mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(finite_difference(projector, x, u, 1e-4, rank), mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "vipllava"])
def test_estimators_rank_the_tokens_of_a_model_alike(family):
    projector = shared_model(family, None, None).model.multi_modal_projector
    width = two_layers(projector).first.matrix.shape[1]
    x, many = (
        torch.randn(1, 144, width, generator=torch.Generator().manual_seed(0)),
        unit_directions(1024, width, seed=1),
    )
    reference = finite_difference(projector, x, many, 0.01)
    assert spearman(directional(projector, x, many), reference) > 0.9999
    assert spearman(closed_form(projector, x), reference) > 0.99
    assert (
        0.9
        < spearman(finite_difference(projector, x, unit_directions(64, width, seed=0), 0.01), reference)
        < 0.9999
    )


def test_low_rank_is_the_best_approximation_and_full_rank_changes_nothing():
    projector, x = mlp(), torch.randn(1, 10, 12)
    cut = two_layers(projector, rank=3)
    for layer, full in ((cut.first, projector[0]), (cut.second, projector[2])):
        rest = torch.linalg.svdvals(full.weight)[3:]
        torch.testing.assert_close((layer.matrix - full.weight).norm(), rest.norm())
        assert torch.equal(layer.bias, full.bias)
    torch.testing.assert_close(two_layers(projector, rank=99)(x), projector(x))
    assert not torch.allclose(cut(x), projector(x), atol=1e-2)


# --- what is remembered of a projector ------------------------------------------------------------


def change_by_optimizer(projector):
    projector.requires_grad_(True)
    projector(torch.ones(1, 12)).sum().backward()
    torch.optim.SGD(projector.parameters(), lr=0.5).step()


def change_behind_autograd(projector):
    projector[2].weight.data.mul_(torch.linspace(0.1, 3, 16)[:, None])


def change_one_number(projector):
    projector[2].weight[0, 1] += 3


@pytest.mark.parametrize("change", [change_by_optimizer, change_behind_autograd, change_one_number])
@pytest.mark.parametrize("rank", [None, 4])
def test_fine_tuning_is_noticed(change, rank):
    projector, x = mlp(), torch.randn(1, 9, 12)
    before = closed_form(projector, x, rank)
    change(projector)
    after = closed_form(projector, x, rank)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, closed_form(copy.deepcopy(projector), x, rank))


def test_the_matrix_is_made_once_and_dies_with_its_projector(monkeypatch):
    projector, x, made = mlp(), torch.randn(1, 9, 12), []
    make = sensitivity._kernel
    monkeypatch.setattr(sensitivity, "_kernel", lambda layers: made.append(1) or make(layers))
    before = dict(vars(projector[0]))
    for _ in range(3):
        closed_form(projector, x)
    assert len(made) == 1
    assert vars(projector[0]) == before and not projector[0]._forward_hooks
    gc.collect()
    held = len(cache._KNOWN)
    del projector, before
    gc.collect()
    assert len(cache._KNOWN) == held - 1


# --- mergers --------------------------------------------------------------------------------------


class Merger(nn.Module):
    """As those of Qwen: four patches in a row become one token, axes flattened."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(6), mlp(24, 20, 16)

    def forward(self, x):
        return self.mlp(self.norm(x).view(-1, 24))


def test_a_merger_is_probed_at_its_patches():
    merger, patches = Merger(), torch.randn(2, 32, 6)
    u = unit_directions(16, 6, seed=0)
    with torch.no_grad():
        lengths = [(merger(patches + 0.01 * d) - merger(patches - 0.01 * d)).norm(dim=-1) / 0.02 for d in u]
    torch.testing.assert_close(
        finite_difference(merger, patches, u, 0.01),
        torch.stack(lengths).mean(0).view(2, 8),
        rtol=2e-4,
        atol=0,
    )
    half = finite_difference(copy.deepcopy(merger).bfloat16(), patches, u, 0.01)
    torch.testing.assert_close(half, torch.stack(lengths).mean(0).view(2, 8), rtol=0.05, atol=0)
