# SPDX-License-Identifier: Apache-2.0
"""Methods for clips: what they share, and what they refuse by name."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.methods.clips import neighbour_cosine, same_place_cosine
from vlmprune.registry import get, list_methods
from vlmprune.testing.tiny import tiny_inputs, tiny_model

METHODS = [name for name in list_methods() if get(name).clips]
BEFORE = [name for name in METHODS if get(name).slot == "before_lm"]


def clip(frames: int = 6, grid: tuple[int, int] = (4, 4), width: int = 8, batch: int = 2, **more):
    """Tokens of clips: a still scene with noise in some places."""
    random = torch.Generator().manual_seed(frames)
    n = grid[0] * grid[1]
    still = torch.randn(batch, 1, n, width, generator=random)
    loud = (torch.rand(batch, frames, n, 1, generator=random) < 0.5).float()
    x = still + loud * torch.randn(batch, frames, n, width, generator=random)
    return VisualTokens(
        features=x.flatten(1, 2),
        received_attention=torch.rand(batch, frames * n, generator=random),
        grids=(grid,) * frames,
        frames=True,
        **more,
    )


@pytest.mark.parametrize("method", BEFORE)
def test_images_and_tiles_are_refused_by_name(method: str) -> None:
    model, spec = tiny_model("llava_onevision"), f"{method}@0.5"
    with vlmprune.prune(model, spec), pytest.raises(UnsupportedError, match=f"{method} compares the frames"):
        model(**tiny_inputs("llava_onevision", images=(1,)))
    with vlmprune.prune(model, spec), pytest.raises(UnsupportedError, match=f"{method} compares the frames"):
        model(**tiny_inputs("llava_onevision", images=(1,), video=True))


@pytest.mark.parametrize("method", BEFORE)
@pytest.mark.parametrize(("scope", "what"), [("crop", "one frame at a time"), ("total", "all clips")])
def test_other_scopes_are_refused_by_name(method: str, scope: str, what: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{method}@0.5/{scope} is spent on {what}.*use {method}@0.5,"):
        vlmprune.parse(f"{method}@0.5/{scope}")
    with pytest.raises(UnsupportedError, match="is spent on"):
        vlmprune.select(get(method)(), keep=f"0.5/{scope}", features=clip().features)


@pytest.mark.parametrize("method", BEFORE)
def test_plain_tensors_must_say_that_they_are_a_clip(method: str) -> None:
    tokens = clip()
    given = {"features": tokens.features, "received_attention": tokens.received_attention}
    with pytest.raises(UnsupportedError, match="frames=True"):
        vlmprune.select(f"{method}@0.5", grid=tokens.grids, **given)
    uneven = ((4, 4),) * 4 + ((2, 8), (8, 2))
    with pytest.raises(UnsupportedError, match="expected one size for all frames"):
        vlmprune.select(f"{method}@0.5", grid=uneven, frames=True, **given)
    kept = vlmprune.select(f"{method}@0.5", grid=tokens.grids, frames=True, **given)
    assert kept.shape == (2, 48) and bool((kept.diff() > 0).all())


@pytest.mark.parametrize("method", BEFORE)
def test_the_official_count_takes_no_budget_and_the_exact_one_needs_it(method: str) -> None:
    with pytest.raises(SpecError, match="has a budget, but method"):
        vlmprune.parse(f"{method}(variant=official)@0.5")
    model = tiny_model("llava_onevision")
    with pytest.raises(SpecError, match="has no budget"):
        vlmprune.prune(model, method)
    inputs = tiny_inputs("llava_onevision", images=(0, 0), video=True, frames=9)
    with vlmprune.prune(model, f"{method}(variant=official)") as run, torch.no_grad():
        model(**inputs)
    assert all(0 < kept < 81 for kept in run.last.realised_tokens)


@pytest.mark.parametrize("method", BEFORE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unit_is_answered_as_it_is_alone(method: str, dtype: torch.dtype) -> None:
    tokens, built = clip(), get(method)()
    whole = choose(built, VisualTokens(**fields(tokens, slice(None), dtype)), 60)
    for i in range(2):
        alone = choose(built, VisualTokens(**fields(tokens, slice(i, i + 1), dtype)), 60)
        for name in ("features", "slots") if built.kind() == "merge" else (None,):
            one, row = (x if name is None else getattr(x, name) for x in (alone, whole))
            assert torch.equal(one[0], row[i])


def fields(tokens: VisualTokens, at: slice, dtype: torch.dtype) -> dict:
    given = {name: getattr(tokens, name)[at].to(dtype) for name in ("features", "received_attention")}
    return given | {"grids": tokens.grids, "frames": True}


def test_cosines_of_places_that_did_not_change_tie() -> None:
    x = torch.randn(1, 9, 5, 7).expand(1, 9, 5, 7).clone()
    x[:, 4:] = x[:, 3:4]  # still from frame 3 on
    x[:, 3:, 2] = 0
    found = neighbour_cosine(x)
    assert found.shape == (1, 8, 5)
    assert bool((found[:, 3:, [0, 1, 3, 4]] == 1).all()) and bool((found[:, 3:, 2] == 0).all())
    want = torch.nn.functional.cosine_similarity(x[:, [7, 0, 2]], x[:, [1, 1, 8]], dim=-1)
    torch.testing.assert_close(same_place_cosine(x, [7, 0, 2], [1, 1, 8]), want)


def test_frame_vectors_are_one_for_each_frame() -> None:
    with pytest.raises(SpecError, match=r"frame_vectors has shape \(2, 5, 3\); expected .* 6 frames"):
        clip(frame_vectors=torch.zeros(2, 5, 3))
