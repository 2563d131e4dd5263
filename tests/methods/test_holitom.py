# SPDX-License-Identifier: Apache-2.0
"""HoliTom: windows against all partitions, rows and counts, and the part inside the language model."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch

from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.methods.holitom import HoliTom
from vlmprune.methods.holitom.inner import HoliTomInner
from vlmprune.methods.holitom.windows import best_windows, shortened
from vlmprune.spec import Budget


def clip_of(frames: int, n: int, seed: int, width: int = 8) -> VisualTokens:
    """Half of the places stand still in each of two scenes."""
    random = torch.Generator().manual_seed(seed)
    scene = torch.randn(2, n, width, generator=random).repeat_interleave(-(-frames // 2), dim=0)[:frames]
    noise = torch.randn(frames, n, width, generator=random)
    noise[:, ::2] *= 0.05
    return VisualTokens(
        features=(scene + noise).flatten(0, 1)[None],
        received_attention=torch.rand(1, frames * n, generator=random),
        grids=((1, n),) * frames,
        frames=True,
    )


def gain(still: np.ndarray, b: int, e: int) -> int:
    return int(still[b:e].all(0).sum()) * (e - b)


@pytest.mark.parametrize("seed", range(12))
def test_windows_save_as_much_as_the_best_of_all_partitions(seed: int) -> None:
    random = np.random.default_rng(seed)
    frames, n, longest = int(random.integers(2, 9)), int(random.integers(1, 6)), int(random.integers(2, 9))
    still = random.random((frames - 1, n)) < random.choice([0.3, 0.7, 0.95])
    best = 0
    for cut in product([False, True], repeat=frames - 1):
        starts = [0, *(t + 1 for t, c in enumerate(cut) if c), frames]
        parts = [(a, b - 1) for a, b in pairwise(starts)]
        if all(e - b < longest for b, e in parts):
            best = max(best, sum(gain(still, b, e) for b, e in parts))
    found = best_windows(torch.from_numpy(still), n, longest)
    assert sum(w.saved for w in found) == best
    assert [t for w in found for t in range(w.start, w.stop)] == list(range(frames))
    # nothing is averaged for nothing: a window of several frames saves something, but for its length
    assert all(w.saved == gain(still, w.start, w.stop - 1) for w in found)
    assert all(w.length == 1 or w.saved > 0 for w in found)


def test_of_equal_windows_the_shorter_and_the_single_frame_win() -> None:
    still = torch.tensor([[True, True], [True, False], [True, True]])
    # all four frames save 3; two pairs save 2 + 2
    assert [(w.start, w.stop) for w in best_windows(still, 2)] == [(0, 2), (2, 4)]
    still = torch.tensor([[True, False], [False, True]])
    # either pair saves 1: the later frame stays alone
    assert [(w.start, w.stop) for w in best_windows(still, 2)] == [(0, 2), (2, 3)]


@pytest.mark.parametrize(("frames", "n"), [(1, 9), (2, 5), (8, 6), (5, 16)])
def test_every_budget_gives_exactly_as_many_rows(frames: int, n: int) -> None:
    tokens = clip_of(frames, n, seed=frames)
    for k in range(1, frames * n):
        merged = choose(HoliTom(), tokens, k)
        assert merged.features.shape[1] == k and bool((merged.slots[0].diff() > 0).all())


def test_windows_are_cut_where_the_budget_is_above_what_they_leave() -> None:
    still = torch.ones(6, 4, dtype=torch.bool)
    still[5, 1:] = False  # the last frame is another scene, but for one place
    windows = best_windows(still, 4)
    assert [(w.start, w.stop, w.saved) for w in windows] == [(0, 6, 20), (6, 7, 0)]
    lengths = {k: [w.length for w in shortened(windows, 28, k)] for k in (8, 9, 12, 13, 16, 17, 28)}
    assert lengths[8] == [6, 1] and lengths[9] == lengths[12] == [5, 1, 1]
    assert lengths[13] == lengths[16] == [2, 2, 2, 1] and lengths[17] == lengths[28] == [1] * 7
    assert [w.still for w in shortened(windows, 28, 28)] == [0] * 7


@pytest.mark.parametrize("beta", [0.6, None])
def test_rows_of_a_still_clip_are_those_of_a_transcription(beta: float | None) -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(10, 6, generator=random)
    clip = (x + 0.01 * torch.randn(4, 10, 6, generator=random)).flatten(0, 1)[None]
    tokens = VisualTokens(
        features=clip, received_attention=torch.zeros(1, 40), grids=((2, 5),) * 4, frames=True
    )
    merged = choose(HoliTom(beta=beta), tokens, 3)
    mean = clip.view(4, 10, 6).mean(0).double().numpy()
    D = np.linalg.norm(mean[:, None] - mean, axis=-1) / 6**0.5
    density = np.exp(-(np.sort(D)[:, :3] ** 2).mean(1))
    apart = np.array(
        [min((D[i, j] for j in range(10) if density[j] > density[i]), default=D.max()) for i in range(10)]
    )
    centres = sorted(np.argsort(-density * apart, kind="stable")[:3].tolist())
    assert merged.slots[0].tolist() == centres  # in the first frame
    joins = D[:, centres].argmin(1)
    for number, centre in enumerate(centres):
        mine = [i for i in range(10) if joins[i] == number and i not in centres]
        want = mean[centre]
        if mine and beta is not None:
            want = beta * want + (1 - beta) * mean[mine].mean(0)
        elif mine:
            want = mean[[centre, *mine]].mean(0)
        np.testing.assert_allclose(merged.features[0, number].numpy(), want, rtol=1e-4, atol=1e-5)


def test_changing_places_keep_what_is_attended_to_most() -> None:
    tokens = clip_of(4, 6, seed=1)
    merged = choose(HoliTom(tau=1.0), tokens, 8)  # nothing is still
    a = tokens.received_attention.view(4, 6)
    want = [t * 6 + int(i) for t in range(4) for i in a[t].topk(2).indices.sort().values]
    assert merged.slots[0].tolist() == want
    assert torch.equal(merged.features[0], tokens.features[0, want])


def test_one_frame_has_no_window() -> None:
    (merged,) = choose_own(HoliTom(variant="official", r=0.5), clip_of(1, 9, seed=0))
    assert merged.slots.shape[0] == 5


# --- inside the language model --------------------------------------------------------------------


def tokens_inside(n: int, seed: int, batch: int = 2) -> VisualTokens:
    random = torch.Generator().manual_seed(seed)
    return VisualTokens(
        features=torch.randn(batch, n, 5, generator=random),
        text_attention=torch.rand(batch, 3, 2, n, generator=random),
    )


@pytest.mark.parametrize("combine", ["mean", "sequential"])
def test_what_leaves_is_folded_in_as_in_a_transcription(combine: str) -> None:
    tokens = tokens_inside(17, seed=2)
    merged = choose(HoliTomInner(combine=combine), tokens, 4)
    for b in range(2):
        x = tokens.features[b].double().numpy()
        a = tokens.text_attention[b, :, -1].double().numpy().mean(0)
        keep = sorted(np.argsort(-a, kind="stable")[:4].tolist())
        u = x / np.linalg.norm(x, axis=1, keepdims=True)
        rows, joined = x[keep].copy(), [1] * 4
        for i in range(17):
            if i in keep:
                continue
            j = int((u[keep] @ u[i]).argmax())
            if combine == "sequential":
                rows[j] = (rows[j] + x[i]) / 2
            else:
                rows[j], joined[j] = rows[j] + x[i], joined[j] + 1
        assert merged.slots[b].tolist() == keep
        want = rows / np.array(joined)[:, None]
        np.testing.assert_allclose(merged.features[b].numpy(), want, rtol=1e-4, atol=1e-5)


def test_the_layer_is_as_deep_as_the_published_one() -> None:
    (cut,) = HoliTomInner().cuts(28, Budget(0.5), 40)
    assert (cut.layer, cut.keep, cut.source) == (18, 20, 17)
    assert HoliTomInner().cuts(4, Budget(9), 40)[0].layer == 3
    with pytest.raises(SpecError, match=r"layer=28 but the language model has layers 0..27"):
        HoliTomInner(layer=28).cuts(28, Budget(0.5), 40)
    with pytest.raises(SpecError, match=r"holitom_inner@0.5"):
        HoliTomInner().cuts(28, None, 40)
