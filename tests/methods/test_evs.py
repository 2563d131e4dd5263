# SPDX-License-Identifier: Apache-2.0
"""EVS against a literal transcription and the function of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vlmprune
from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.methods.evs import EVS, official_keep


def clip_of(frames: int, n: int, seed: int, width: int = 6) -> VisualTokens:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, n, width, generator=random) + 0.3 * torch.randn(
        1, frames, n, width, generator=random
    )
    return VisualTokens(features=x.flatten(1, 2), grids=((1, n),) * frames, frames=True)


def by_hand(x: np.ndarray, k: int) -> list[int]:
    """Kept tokens of x (T, n, D)."""
    norm = np.linalg.norm(x, axis=-1)
    d = np.full(x.shape[:2], 255.0)
    d[1:] = 1 - (x[1:] * x[:-1]).sum(-1) / (norm[1:] * norm[:-1])
    return sorted(np.argsort(-d.ravel(), kind="stable")[:k].tolist())


@pytest.mark.parametrize(("frames", "n", "k"), [(2, 5, 7), (7, 9, 20), (20, 4, 79), (5, 6, 6)])
def test_kept_sets_are_those_of_a_transcription(frames: int, n: int, k: int) -> None:
    tokens = clip_of(frames, n, seed=k)
    kept = choose(EVS(), tokens, k)[0].tolist()
    assert kept == by_hand(tokens.features[0].view(frames, n, -1).double().numpy(), k)
    assert kept[:n] == list(range(n))
    # with the sign turned, the clip gives other tokens where there is a choice
    lowest = torch.topk(EVS().score(tokens)[0, n:], k - n, largest=False).indices + n
    assert k == n or sorted(lowest.tolist()) != kept[n:]


def test_official_counts_and_sets_are_those_of_transformers() -> None:
    twin = pytest.importorskip("transformers.models.nemotron_h_omni.modeling_nemotron_h_omni")
    random = np.random.default_rng(0)
    for seed in range(40):
        frames, n = (int(x) for x in random.integers(1, 14, 2))
        q, dtype = float(random.choice([0, 0.1, 0.3, 0.75, 0.9, random.random()])), torch.float32
        tokens = clip_of(frames, n, seed)
        if seed % 4 == 0:
            dtype = torch.bfloat16
            tokens = VisualTokens(features=tokens.features.to(dtype), grids=tokens.grids, frames=True)
        want = twin.compute_retention_mask(tokens.features[0], frames, q)
        kept = choose_own(EVS(variant="official", q=q), tokens)[0]
        assert kept.tolist() == want.nonzero()[:, 0].tolist(), (frames, n, q, dtype)


def test_official_counts_are_truncated_in_floating_point() -> None:
    assert official_keep(50, 20, 0.9) == 99
    assert official_keep(50, 20, 0.99) == 50


def test_less_than_one_frame_is_refused_and_names_the_least() -> None:
    tokens = clip_of(4, 9, seed=0)
    with pytest.raises(SpecError, match=r"8 tokens of 4 frames are too few for evs.*keep at least 9"):
        choose(EVS(), tokens, 8)
    assert choose(EVS(), tokens, 9)[0].tolist() == list(range(9))


def test_a_still_clip_keeps_its_earlier_frames() -> None:
    x = torch.randn(1, 1, 3, 50).expand(1, 5, 3, 50).reshape(1, 15, 50)
    kept = vlmprune.select("evs@8", features=x, grid=((1, 3),) * 5, frames=True)
    assert kept.tolist() == [list(range(8))]


@pytest.mark.parametrize("q", [1, -0.1, 1.5])
def test_a_rate_drops_less_than_all(q: float) -> None:
    with pytest.raises(SpecError, match="q="):
        EVS(q=q)
