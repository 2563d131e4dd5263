# SPDX-License-Identifier: Apache-2.0
"""ZOO-Prune against a literal transcription; its estimators are held by test_sensitivity.py."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from projectors import mlp
from torch import nn

import vlmprune
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, InvariantError, SpecError, UnsupportedError
from vlmprune.methods.zooprune import ZOOPrune, hybrid_greedy, scaled, sensitivity
from vlmprune.testing.conformance import shared_model
from vlmprune.testing.device import PretendedDevice, moved, pretending
from vlmprune.testing.tiny import tiny_inputs

ESTIMATORS = ("exact", "zo", "jvp")


def tokens_of(projector, batch=2, n=40, width=12, seed=0, dtype=torch.float32):
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(batch, n, width))).to(dtype)
    return VisualTokens(features=projector(x), encoder_features=x, projector=projector)


def transcription(project, x, z, u, h, k):
    """One image: patches x (N, C), tokens z (N, D), raw directions u (m, C)."""
    u = u / (np.linalg.norm(u, axis=1, keepdims=True) + 1e-12)
    s = np.mean(
        [np.linalg.norm((project(x + h * d) - project(x - h * d)) / (2 * h), axis=1) for d in u], axis=0
    )
    weight = (s - s.min()) / (s.max() - s.min() + 1e-8)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    picks = [int(weight.argmax())]
    while len(picks) < k:
        value = weight * (1 - (unit @ unit[picks].T).max(axis=1))
        value[picks] = -np.inf
        picks.append(int(value.argmax()))
    return s, picks


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("k", [1, 9, 39])
def test_sensitivities_and_picks_follow_the_transcription(k, norm):
    projector = mlp(norm=norm)
    tokens, method = tokens_of(projector), ZOOPrune(estimator="zo", m=7, seed=3)
    raw = torch.randn(7, 12, generator=torch.Generator().manual_seed(3)).double().numpy()
    exact = copy.deepcopy(projector).double()
    found = method.sensitivity(tokens)
    order, _ = hybrid_greedy(scaled(found), tokens.features, k)
    for row in range(2):
        x, z = tokens.encoder_features[row].double().numpy(), tokens.features[row].double().numpy()
        s, picks = transcription(lambda x: exact(torch.from_numpy(x)).numpy(), x, z, raw, 0.01, k)
        np.testing.assert_allclose(found[row], s, rtol=2e-4)
        assert order[row].tolist() == picks
        assert choose(method, tokens, k)[row].tolist() == sorted(picks)


def test_the_most_sensitive_token_is_first_and_a_copy_of_it_late():
    """Token 1 is the most sensitive, 2 its copy, 0 and 3 are less sensitive but different, 4 is not sensitive
    at all.
    """
    weight = torch.tensor([[0.5, 1.0, 1.0, 0.2, 0.0]])
    features = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.1], [-1.0, -1.0]]])
    order, worth = hybrid_greedy(weight, features, 5)
    assert order[0, :3].tolist() == [1, 0, 3]
    torch.testing.assert_close(worth[0, :2], torch.tensor([1.0, 0.5]))
    assert sorted(order[0].tolist()) == [0, 1, 2, 3, 4], (
        "each once, though all that are left are worth nothing"
    )


def test_lower_indices_win_ties_and_zero_vectors_are_far_from_all():
    order, worth = hybrid_greedy(torch.ones(1, 4), torch.zeros(1, 4, 3), 4)
    assert order[0].tolist() == [0, 1, 2, 3]
    assert worth[0].tolist() == [1, 1, 1, 1]


def test_each_row_is_stretched_and_a_constant_row_is_one():
    s = torch.tensor([[2.0, 3.0, 4.0], [5.0, 5.0001, 5.0004], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(scaled(s), torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]))


@pytest.mark.parametrize("linear", [nn.Linear(12, 16), lambda x: x[..., :5] * 3], ids=["module", "function"])
def test_a_linear_projector_leaves_diversity_alone(linear):
    with torch.no_grad():
        tokens = tokens_of(linear)
        method = ZOOPrune(estimator="zo")
        assert (method.score(tokens) == 1).all()
        assert choose(method, tokens, 9)[:, 0].tolist() == [
            0,
            0,
        ]  # all weigh the same, so the first token is picked first


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_linear_layers_without_a_bend_are_constant_too(estimator):
    tokens = tokens_of(mlp(act=nn.Identity()))
    assert (ZOOPrune(estimator=estimator).score(tokens) == 1).all()


def test_the_norm_ablation_needs_features_only():
    tokens, method = tokens_of(mlp()), ZOOPrune(estimator="norm")
    alone = VisualTokens(features=tokens.features)
    assert method.needs == ("features",)
    torch.testing.assert_close(method.sensitivity(alone), tokens.features.norm(dim=-1))
    assert choose(method, alone, 9).shape == (2, 9)


# --- what must not change the answer --------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_are_independent_walks_nested_and_runs_reproduce(estimator):
    tokens, method = tokens_of(mlp(norm=True)), ZOOPrune(estimator=estimator)
    keep = choose(method, tokens, 20)
    second = VisualTokens(
        features=tokens.features[1:], encoder_features=tokens.encoder_features[1:], projector=tokens.projector
    )
    torch.rand(3)  # the global generator takes no part
    assert torch.equal(choose(method, second, 20)[0], keep[1])
    assert torch.equal(choose(method, tokens, 20), keep)
    assert method.nested and all(
        set(few) < set(many)
        for few, many in zip(choose(method, tokens, 7).tolist(), keep.tolist(), strict=True)
    )


def test_another_seed_is_another_draw():
    tokens = tokens_of(mlp())
    few = [ZOOPrune(estimator="zo", m=2, seed=seed).sensitivity(tokens) for seed in (0, 0, 1)]
    assert torch.equal(few[0], few[1]) and not torch.allclose(few[0], few[2])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rank", [None, 4])
def test_chunks_bound_memory_and_nothing_else(estimator, rank, monkeypatch):
    tokens, method = tokens_of(mlp(norm=True)), ZOOPrune(estimator=estimator, m=10, rank=rank)
    whole = method.sensitivity(tokens)
    monkeypatch.setattr(sensitivity, "_VALUES", 3 * 2 * 40 * 20)  # three directions at a time
    torch.testing.assert_close(method.sensitivity(tokens), whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("norm", [False, True])
def test_half_precision_is_probed_in_float32(estimator, norm):
    half = mlp(64, 96, 80, norm=norm).bfloat16()
    single = copy.deepcopy(half).float()
    x = torch.randn(1, 60, 64).bfloat16()
    method = ZOOPrune(estimator=estimator)
    given = [
        VisualTokens(features=half(x), encoder_features=x, projector=projector)
        for projector in (half, single)
    ]
    keep = [set(choose(method, tokens, 20)[0].tolist()) for tokens in given]
    assert keep[0] == keep[1], "the weights are the same numbers, so nothing may differ"
    exact = VisualTokens(features=single(x.float()), encoder_features=x.float(), projector=single)
    assert (
        len(keep[0] & set(choose(method, exact, 20)[0].tolist())) >= 19
    )  # features rounded to bfloat16 may turn a close call
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mode_of_the_caller_does_not_matter(estimator):
    projector = mlp(norm=True).requires_grad_(True)
    tokens, method = tokens_of(projector), ZOOPrune(estimator=estimator)
    plain = method.sensitivity(tokens)
    assert not plain.requires_grad and all(weight.grad is None for weight in projector.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.sensitivity(tokens), plain)
    with torch.inference_mode():
        x = tokens.encoder_features.clone()
        inside = VisualTokens(features=projector(x), encoder_features=x, projector=projector)
        assert torch.equal(method.sensitivity(inside), plain)
        born = mlp(norm=True)  # its weights have no version counter
        assert torch.equal(
            method.sensitivity(VisualTokens(features=born(x), encoder_features=x, projector=born)), plain
        )


def test_weights_on_a_device_are_compared_once_by_every_method_object():
    """By value, which waits; afterwards a look at their versions is enough."""
    device = PretendedDevice()
    projector, x = moved(mlp(), device), device.away(torch.randn(1, 9, 12))
    first, second = ZOOPrune(), ZOOPrune()
    waits, launches = [], []
    with pretending(device):
        tokens = VisualTokens(features=projector(x), encoder_features=x, projector=projector)
        for method in (first, first, second, second, copy.deepcopy(second)):
            device.take()
            method.sensitivity(tokens)
            waits.append(device.counts.waits > 0)
            launches.append(device.counts.launches)
    assert waits == [True, False, True, False, True]
    assert launches[1] == launches[3] < 15
    assert first == second and hash(first) == hash(second)


# --- other projectors -----------------------------------------------------------------------------


class Residual(nn.Module):
    """Has the layers of the usual projector and something more."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(12, 20, 12)

    def forward(self, x):
        return x.sin() + self.layers(x)


@pytest.mark.parametrize(
    "projector", [lambda x: x.sin(), Residual(), nn.Linear(12, 16), nn.Sequential(mlp(), nn.GELU())]
)
def test_projectors_of_another_form_are_for_zo_alone(projector):
    with torch.no_grad():
        tokens = tokens_of(projector)
    assert choose(ZOOPrune(estimator="zo"), tokens, 9).shape == (2, 9)
    for method in (ZOOPrune(estimator="exact"), ZOOPrune(estimator="jvp"), ZOOPrune(estimator="zo", rank=4)):
        with pytest.raises(UnsupportedError, match="estimator='zo'"):
            choose(method, tokens, 9)


def test_missing_encoder_features_are_named():
    with pytest.raises(CaptureError, match="encoder_features"):
        choose(ZOOPrune(), VisualTokens(features=torch.randn(1, 9, 4)), 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["features", "encoder_features"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_not_finite_is_refused(estimator, field, value):
    tokens = tokens_of(mlp(norm=True))
    getattr(tokens, field)[0, 3, 0] = value
    with pytest.raises(InvariantError, match="not finite"):
        choose(ZOOPrune(estimator=estimator), tokens, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "zoo"},
        {"m": 0},
        {"m": 1.5},
        {"h": 0},
        {"h": float("inf")},
        {"h": "x"},
        {"rank": 0},
        {"seed": -1},
        {"seed": True},
    ],
)
def test_options_without_a_meaning_are_refused(options):
    with pytest.raises(SpecError, match=f"{next(iter(options))}="):
        ZOOPrune(**options)


def test_impossible_budgets_are_refused():
    with pytest.raises(InvariantError, match="cannot pick 5"):
        hybrid_greedy(torch.ones(1, 4), torch.ones(1, 4, 2), 5)


# --- in a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_tile_has_its_own_run(estimator):
    """Scope crop: an equal share of every tile, chosen as if the tile were alone; newlines stay."""
    model, inputs = shared_model("llava_next", None, None), tiny_inputs("llava_next", size=(168, 168))
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    x, features = seen[0]  # (T, 36, C), (T, 36, D): a base tile and 2 x 2 of 6 x 6 patches, nothing to unpad
    tiles = choose(
        ZOOPrune(estimator=estimator),
        VisualTokens(features=features, encoder_features=x, projector=model.model.multi_modal_projector),
        4,
    )
    with vlmprune.prune(model, f"zooprune(estimator={estimator})@4/crop") as run, torch.no_grad():
        model(**inputs)
    expected = tiles[0].tolist()
    for tile, kept in enumerate(tiles[1:].tolist()):
        expected += [36 + (tile // 2 * 6 + p // 6) * 12 + tile % 2 * 6 + p % 6 for p in kept]
    assert run.last.keep[0].keep_idx.tolist() == sorted(expected)
    assert run.last.realised_tokens == [20]


def test_a_gated_projector_is_refused_by_the_exact_form_and_probed_by_the_other() -> None:
    """Cohere's: the gate takes half of what the first layer gives, so that two layers are not the map."""

    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Linear(4, 12), nn.SiLU(), nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value, gate = self.first(x).chunk(2, dim=-1)
            return self.second(self.act(gate) * value)

    torch.manual_seed(0)
    gated, patches = Gated(), torch.randn(1, 9, 4)
    tokens = {"features": gated(patches).detach(), "encoder_features": patches, "projector": gated}
    with pytest.raises(UnsupportedError, match="estimator='zo'"):
        vlmprune.select("zooprune", keep=3, **tokens)
    assert vlmprune.select("zooprune(estimator=zo)", keep=3, **tokens).shape == (1, 3)


def test_a_merging_projector_is_probed_through_the_public_verb() -> None:
    class Merger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.GELU(), torch.nn.Linear(12, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.map(x.unflatten(-2, (-1, 4)).flatten(-2))  # (..., P, 4) -> (..., P / 4, 8)

    torch.manual_seed(0)
    merger, patches = Merger(), torch.randn(2, 36, 4)
    tokens = {"features": merger(patches).detach(), "encoder_features": patches, "projector": merger}
    keep_idx = vlmprune.select("zooprune(estimator=zo)", keep=3, **tokens)
    assert keep_idx.shape == (2, 3) and bool((keep_idx.diff() > 0).all()) and int(keep_idx.max()) < 9
    alone = vlmprune.select(
        "zooprune(estimator=zo)",
        keep=3,
        features=tokens["features"][1:],
        encoder_features=patches[1:],
        projector=merger,
    )
    assert torch.equal(alone[0], keep_idx[1])
    with pytest.raises(vlmprune.VlmPruneError, match="36 patches become 9 tokens"):
        vlmprune.select(
            "visionzip",
            keep=5,
            cls_attention=torch.rand(2, 1, 9),
            keys=torch.rand(2, 9, 4),
            cls_features=torch.rand(2, 1, 4),
            **tokens,
        )
