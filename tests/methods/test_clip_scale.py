# SPDX-License-Identifier: Apache-2.0
"""Long clips: what choosing holds grows with the frames, and nothing is tokens x tokens."""

from __future__ import annotations

import time

import pytest
import torch

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods import baselines
from vlmprune.methods.baselines import Pool
from vlmprune.registry import get, list_methods
from vlmprune.speed.memory import LiveBytes

METHODS = [name for name in list_methods() if get(name).clips]
PLACES, SCENE = 64, 8  # tokens of a frame, frames of a scene


def clip_of(frames: int, n: int, width: int) -> VisualTokens:
    """Scenes of eight frames, in which two places of three stand still."""
    random = torch.Generator().manual_seed(0)
    scene = torch.randn(-(-frames // SCENE), n, width, generator=random).repeat_interleave(SCENE, dim=0)
    noise = torch.randn(frames, n, width, generator=random)
    noise[:, torch.arange(n) % 3 > 0] *= 0.05
    return VisualTokens(
        features=(scene[:frames] + noise).flatten(0, 1)[None],
        received_attention=torch.rand(1, frames * n, generator=random),
        grids=((1, n),) * frames,
        frames=True,
    )


def held(method: str, frames: int) -> int:
    """The most bytes that choosing holds at a time, the clip itself left out."""
    tokens = clip_of(frames, PLACES, width=16)
    with torch.no_grad(), LiveBytes() as live:
        choose(get(method)(), tokens, tokens.count // 2)
    return live.peak


@pytest.mark.parametrize("method", METHODS)
def test_memory_grows_with_the_frames_and_not_with_their_square(method: str) -> None:
    short, long = held(method, 16), held(method, 64)
    assert long < 5 * short
    assert long < (64 * PLACES) ** 2  # a map of all pairs, even of single bytes, would be more


def test_pool_of_a_long_clip_goes_frame_by_frame_and_gives_the_same_rows(monkeypatch) -> None:
    tokens = clip_of(16, 36, width=8)
    whole = choose(Pool(), tokens, 100)
    monkeypatch.setattr(baselines, "_AT_ONCE", 0)
    apart = choose(Pool(), tokens, 100)
    assert torch.equal(whole.slots, apart.slots)
    torch.testing.assert_close(apart.features, whole.features)
    few = choose(Pool(), tokens, 3)  # most frames have no cell
    monkeypatch.undo()
    torch.testing.assert_close(few.features, choose(Pool(), tokens, 3).features)
    monkeypatch.setattr(baselines, "_AT_ONCE", 0)
    assert held("pool", 64) < 5 * held("pool", 16)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "pool", "uniform", "random"])
def test_100_000_tokens_are_chosen_of_without_a_map_of_all_pairs(method: str) -> None:
    tokens = clip_of(512, 196, width=16)
    with torch.no_grad(), LiveBytes() as live:
        choose(get(method)(), tokens, tokens.count // 3)
    assert live.peak < tokens.count**2 / 10  # of bytes: a tenth of a map of all pairs in one byte each


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_64_frames_of_196_tokens_are_chosen_of_in_two_seconds(method: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tokens, took = clip_of(64, 196, width=896), []
        for _ in range(3):
            started = time.process_time()
            with torch.no_grad():
                choose(get(method)(), tokens, tokens.count // 2)
            took.append(time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    assert min(took) < 2, took
