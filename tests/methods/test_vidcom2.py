# SPDX-License-Identifier: Apache-2.0
"""VidCom2 against a literal transcription; counts at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.methods.vidcom2 import VidCom2, calm_channels


def clip_of(frames: int, n: int, seed: int, width: int = 10) -> VisualTokens:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, n, width, generator=random) + torch.randn(1, frames, n, width, generator=random)
    return VisualTokens(features=x.flatten(1, 2), grids=((1, n),) * frames, frames=True)


def by_hand(x: np.ndarray, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Official mask (T, n) and v + f of x (T, n, D)."""
    frames, n, width = x.shape
    calm = np.sort(np.argsort(x.reshape(-1, width).var(0), kind="stable")[: width // 2])
    z = x[..., calm] / np.linalg.norm(x[..., calm], axis=-1, keepdims=True)

    def near(centre: np.ndarray) -> np.ndarray:
        far = ((z - centre) ** 2).sum(-1)
        return sum(np.exp(-far / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    v, f = near(z.mean((0, 1))), near(z.mean(1, keepdims=True))
    u = -v.mean(1)
    p = np.exp((u - u.max()) / 0.01)
    p /= p.sum()
    counts = np.maximum(1, np.round(np.minimum(1, b * (1 + p - 1 / frames)) * n)).astype(int)
    mask = np.zeros((frames, n), bool)
    for t in range(frames):
        mask[t, np.argsort((v + f)[t], kind="stable")[: counts[t]]] = True
    return mask, v + f


@pytest.mark.parametrize(("frames", "n", "b"), [(5, 16, 0.25), (3, 9, 0.7), (1, 12, 0.5), (12, 4, 0.3)])
def test_kept_sets_are_those_of_a_transcription(frames: int, n: int, b: float) -> None:
    tokens = clip_of(frames, n, seed=n)
    mask, likeness = by_hand(tokens.features[0].view(frames, n, -1).double().numpy(), b)
    official = choose_own(VidCom2(variant="official", b=b), tokens)[0].tolist()
    assert official == np.flatnonzero(mask).tolist()
    k = round(b * frames * n)
    mask, likeness = by_hand(tokens.features[0].view(frames, n, -1).double().numpy(), k / (frames * n))
    order = np.lexsort((likeness.ravel(), ~mask.ravel()))[:k]
    assert choose(VidCom2(), tokens, k)[0].tolist() == sorted(order.tolist())


def test_with_fewer_tokens_than_frames_the_best_of_each_frame_compete() -> None:
    tokens, n = clip_of(9, 6, seed=1), 6
    mask, likeness = by_hand(tokens.features[0].view(9, n, -1).double().numpy(), 1e-9)
    assert mask.sum(1).tolist() == [1] * 9
    winners = np.flatnonzero(mask)
    want = winners[np.argsort(likeness.ravel()[winners], kind="stable")[:4]]
    assert choose(VidCom2(), tokens, 4)[0].tolist() == sorted(want.tolist())


def test_ties_go_to_the_lower_channel_and_the_lower_token() -> None:
    x = torch.ones(1, 4, 5, 6)
    assert calm_channels(x).tolist() == [[0, 1, 2]]
    assert calm_channels(torch.ones(1, 4, 5, 1)).tolist() == [[0]]
    tokens = VisualTokens(features=x.flatten(1, 2), grids=((1, 5),) * 4, frames=True)
    assert choose(VidCom2(), tokens, 8)[0].tolist() == [0, 1, 5, 6, 10, 11, 15, 16]


def test_a_frame_unlike_the_others_keeps_more() -> None:
    tokens = clip_of(6, 20, seed=2)
    x = tokens.features.view(1, 6, 20, -1).clone()
    x[:, 3] = -x[:, 3]
    odd = VisualTokens(features=x.flatten(1, 2), grids=tokens.grids, frames=True)
    per_frame = torch.bincount(choose(VidCom2(), odd, 30)[0] // 20, minlength=6)
    assert int(per_frame.argmax()) == 3 and int(per_frame[3]) <= 10


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match="b=0"):
        VidCom2(b=0)
