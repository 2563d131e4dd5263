# SPDX-License-Identifier: Apache-2.0
"""HoloV against literal transcriptions of the paper's rule and of the official rule, crop by crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.core.grid import cells
from vlmprune.core.method import Need
from vlmprune.core.select import choose, top_k_in_groups
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, InvariantError, SpecError
from vlmprune.kernels import crops as kernels
from vlmprune.kernels.crops import capped, in_crops, official_quota, paper_quota, sizes_of
from vlmprune.kernels.dispatch import crop_variance
from vlmprune.methods.holov import HoloV, official_scores
from vlmprune.methods.holov.crops import bands, windows


def picture(grids=((12, 12),), batch=1, seed=0, peak=2.0, width=8):
    """Features (B, N, D) and attention (B, N); a larger peak concentrates attention."""
    rng, n = np.random.default_rng(seed), sum(rows * cols for rows, cols in grids)
    weight = np.exp(peak * rng.normal(size=(batch, n)))
    return rng.normal(size=(batch, n, width)), weight / weight.sum(1, keepdims=True)


def tokens(x, a, grids=((12, 12),), dtype=torch.float32):
    x, a = (None if v is None else torch.from_numpy(v).to(dtype) for v in (x, a))
    return VisualTokens(features=x, cls_attention=a, grids=grids)


def token_variance(x):
    z = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-6)
    s = z @ z.T
    np.fill_diagonal(s, 0)
    others = max(1, len(x) - 1)
    mean = s.sum(1, keepdims=True) / others
    return ((s - mean) ** 2).sum(1) / others


def paper_transcription(x, a, crop_of, k, alpha=1.0, tau=1.0):
    crops = [np.flatnonzero(crop_of == c) for c in range(crop_of.max() + 1)]
    h = []
    for c in crops:
        v = token_variance(x[c])
        h.append(a[c] + alpha * a[c].mean() / (v.mean() + 1e-6) * v)
    size = np.array([len(c) for c in crops])
    weight = np.array([one.mean() for one in h]) ** tau
    weight /= weight.sum()
    quota = np.floor(k * weight).astype(int)
    quota[weight.argmax()] += k - quota.sum()
    surplus, quota = np.maximum(quota - size, 0).sum(), np.minimum(quota, size)
    pull = weight * (size - quota)
    quota += np.minimum(np.floor(surplus * pull / max(pull.sum(), 1e-300)).astype(int), size - quota)
    for c in np.argsort(-weight, kind="stable"):
        quota[c] += min(k - quota.sum(), size[c] - quota[c])
    return sorted(
        i for c, one, q in zip(crops, h, quota, strict=True) for i in c[np.argsort(-one, kind="stable")[:q]]
    )


def official_transcription(x, a, crops, k, alpha=0.09):
    """Quotas, and positions in order of output, with similarity matrices, as the official code has them."""
    parts, scores = np.array_split(np.arange(len(a)), crops), []
    for c in parts:
        v, scaled = token_variance(x[c]), 1000 * a[c]
        h = scaled + alpha * scaled.mean() / (v.mean() + 1e-6) * v
        scores.append(h.mean() if len(c) > 1 else a[c][0])
    weight = np.array(scores) / (np.sum(scores) + 1e-6)
    quota = np.floor(k * weight).astype(int)
    quota[np.argsort(-weight, kind="stable")[: k - quota.sum()]] += 1
    out = []
    for c, q in zip(parts, quota, strict=True):
        out += list(c) if q >= len(c) else list(c[np.argsort(-a[c], kind="stable")[:q]])
    return quota.tolist(), (out + [-1] * k)[:k]


# Two blocks, as of a tiled image; a grid that windows do not divide; one row.
GRIDS = [((12, 12),), ((7, 11),), ((6, 6), (9, 11)), ((1, 20),)]


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("peak", [0.3, 1.0, 4.0])  # 4: windows are granted more than they hold
@pytest.mark.parametrize(("crops", "alpha", "tau"), [(4, 1.0, 1.0), (7, 0.3, 2.0), (1, 1.0, 1.0)])
def test_the_paper_rule_is_followed(grids, peak, crops, alpha, tau):
    x, a = picture(grids, peak=peak)
    method = HoloV(crops=crops, alpha=alpha, tau=tau)
    crop_of = np.empty(a.shape[1], dtype=int)
    for number, row in enumerate(windows(grids, crops).tolist()):
        crop_of[[i for i in row if i >= 0]] = number
    for k in (1, 6, 13, a.shape[1] // 2, a.shape[1] - 1):
        expected = paper_transcription(x[0], a[0], crop_of, k, alpha, tau)
        assert choose(method, tokens(x, a, grids), k)[0].tolist() == expected


@pytest.mark.parametrize(
    ("n", "crops", "peak"), [(144, 16, 0.3), (144, 5, 1.0), (100, 7, 1.0), (144, 9, 4.0), (30, 20, 1.0)]
)
def test_the_official_rule_is_followed_up_to_its_zero_rows(n, crops, peak):
    x, a = picture(((1, n),), peak=peak, seed=4)
    held = torch.from_numpy(a).float()
    members = bands(n, crops)
    inside = in_crops(held, members)
    for k in (1, 9, 25, n - 1):
        quota, positions = official_transcription(x[0], a[0], crops, k)
        ours = official_quota(official_scores(inside.sum(-1) / sizes_of(members), members), k)
        assert ours[0].tolist() == quota
        assert top_k_in_groups(inside, members, ours, k)[0].tolist() == positions
        keep = choose(HoloV(variant="official", crops=crops), tokens(None, a, ()), k)[0].tolist()
        assert set(positions) - {-1} <= set(keep)


def test_official_selection_ignores_features_and_the_paper_does_not():
    x, a = picture()
    noise = picture(seed=9)[0]
    assert official_transcription(x[0], a[0], 16, 20) == official_transcription(noise[0], a[0], 16, 20)
    both = [choose(HoloV(variant="official", crops=16), tokens(f, a), 20).tolist() for f in (x, noise)]
    assert both[0] == both[1]
    assert HoloV(variant="official").needs == (Need("cls_attention"),)
    both = [choose(HoloV(crops=16), tokens(f, a), 20).tolist() for f in (x, noise)]
    assert both[0] != both[1]


def test_the_quotas_of_the_paper_ignore_features():
    (x, a), noise = picture(), picture(seed=9)[0]
    crop_of = cells(((12, 12),), 4)
    counts = [
        crop_of[choose(HoloV(crops=4), tokens(f, a), 20)[0]].bincount(minlength=4).tolist()
        for f in (x, noise)
    ]
    assert counts[0] == counts[1]


def test_windows_are_two_dimensional_and_bands_are_runs():
    assert windows(((4, 4),), 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert bands(10, 4).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, -1], [8, 9, -1]]


def test_no_window_spans_two_blocks_and_every_block_has_one():
    assert windows(((2, 2), (2, 4)), 3).tolist() == [[0, 1, 2, 3], [4, 5, 8, 9], [6, 7, 10, 11]]
    assert windows(((1, 2), (2, 4)), 1).tolist() == [[2, 3, 4, 5, 6, 7, 8, 9], [0, 1, -1, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("n", "k", "count"), [(576, 64, 16), (576, 128, 8), (576, 192, 5), (2880, 320, 16), (576, 575, 1)]
)
def test_the_number_of_crops_is_that_of_the_appendix(n, k, count):
    _, a = picture(((1, n),))
    attention = tokens(None, a, ())
    default, explicit = (
        choose(HoloV(variant="official", crops=crops), attention, k) for crops in (None, count)
    )
    assert default.tolist() == explicit.tolist()


def test_attention_and_variance_both_raise_a_token():
    x, a = picture(((1, 8),), peak=0.0)  # equal attention: variance decides
    varied = crop_variance(torch.from_numpy(x).float(), windows(((1, 8),), 1))[0, 0]
    assert choose(HoloV(crops=1), tokens(x, a, ((1, 8),)), 1).item() == varied.argmax()
    a[0, int(varied.argmin())] = 1.0
    assert choose(HoloV(crops=1), tokens(x, a, ((1, 8),)), 1).item() == varied.argmin()


def test_similarity_matrices_may_be_cut_into_chunks(monkeypatch):
    x, members = torch.from_numpy(picture()[0]).float(), windows(((12, 12),), 5)
    whole = crop_variance(x, members)
    for row, real in zip(members, whole[0], strict=True):
        inside = row[row >= 0]
        np.testing.assert_allclose(
            real[: len(inside)], token_variance(x[0, inside].double().numpy()), rtol=1e-4
        )
        assert (real[len(inside) :] == 0).all()
    monkeypatch.setattr(kernels, "_CHUNK", 7)
    torch.testing.assert_close(crop_variance(x, members), whole)


def test_surplus_goes_where_weight_and_room_are():
    sizes, weight = torch.tensor([9, 10, 9, 2]), torch.tensor([[0.7, 0.2, 0.1, 0.0]])
    quota = paper_quota(weight, 20)
    assert quota.tolist() == [[14, 4, 2, 0]]
    # 5 too many; pull 0.2 * 6 and 0.1 * 7: 3.2 and 1.8, the odd one to the heavier crop
    assert capped(quota, weight, sizes, 20).tolist() == [[9, 8, 3, 0]]
    # without weight there is no share: crops are filled in order
    assert capped(torch.tensor([[14, 0, 0, 0]]), torch.zeros(1, 4), sizes, 14).tolist() == [[9, 5, 0, 0]]


def test_a_shortfall_goes_to_the_heaviest_crop_or_to_the_heaviest_crops():
    weight = torch.tensor([[0.2, 0.45, 0.35]])
    assert paper_quota(weight, 4).tolist() == [[0, 3, 1]]
    assert official_quota(weight, 4).tolist() == [[0, 2, 2]]
    assert official_quota(weight, 2).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("crops", [3, 5, 7, 16])
def test_equal_crops_get_equal_quotas(crops):
    assert paper_quota(torch.full((1, crops), 1 / 576), 12 * crops).unique().tolist() == [12]


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_exactly_k_are_kept_always(data):
    grids = tuple(
        data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=3))
    )
    n = sum(rows * cols for rows, cols in grids)
    k, crops = data.draw(st.integers(1, n)), data.draw(st.none() | st.integers(1, n + 3))
    variant, tau = (
        data.draw(st.sampled_from(["paper", "official"])),
        data.draw(st.sampled_from([0.0, 1.0, 50.0])),
    )
    x, a = picture(
        grids, batch=2, seed=data.draw(st.integers(0, 99)), peak=data.draw(st.sampled_from([0.0, 1.0, 9.0]))
    )
    a[0] *= data.draw(st.sampled_from([0.0, 1e-30, 1.0, 1e6]))
    keep = choose(HoloV(crops=crops, variant=variant, tau=tau), tokens(x, a, grids), k)
    assert keep.shape == (2, k) and all(len(set(row)) == k for row in keep.tolist())


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("k", [1, 20, 143])
def test_one_token_crops_keep_the_most_attended(variant, k):
    x, a = picture()
    keep = choose(HoloV(crops=144, variant=variant), tokens(x, a), k)[0].tolist()
    assert keep == sorted(np.argsort(-a[0])[:k])


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_rows_are_independent(variant):
    x, a = picture(batch=3, peak=3.0)
    together = choose(HoloV(variant=variant), tokens(x, a), 20)
    for row in range(3):
        assert (
            choose(HoloV(variant=variant), tokens(x[[row]], a[[row]]), 20)[0].tolist()
            == together[row].tolist()
        )


def test_half_precision_is_computed_in_float32():
    x, a = picture()
    half = tokens(x, a, dtype=torch.bfloat16)
    same = tokens(half.features.double().numpy(), half.cls_attention[:, 0].double().numpy())
    assert choose(HoloV(), half, 20).tolist() == choose(HoloV(), same, 20).tolist()


def test_heads_are_averaged_and_towers_without_cls_use_received_attention():
    x, a = picture(batch=2)
    x, a = torch.from_numpy(x[:1]).float(), torch.from_numpy(a).float()
    heads = VisualTokens(features=x, cls_attention=a[None], grids=((12, 12),))
    received = VisualTokens(features=x, received_attention=a.mean(0)[None], grids=((12, 12),))
    assert HoloV(cls="mean").needs == (Need("received_attention"), Need("features"))
    assert choose(HoloV(cls="mean"), received, 20).tolist() == choose(HoloV(), heads, 20).tolist()


def test_black_pictures_are_ranked_by_attention():
    _, a = picture()
    keep = choose(HoloV(crops=1), tokens(np.zeros((1, 144, 8)), a), 20)[0].tolist()
    assert keep == sorted(np.argsort(-a[0])[:20])


REFUSED = [
    ("crops", 0),
    ("crops", 1.5),
    ("crops", True),
    ("alpha", -1.0),
    ("alpha", False),
    ("alpha", "high"),
    ("alpha", float("inf")),
    ("tau", float("nan")),
]


@pytest.mark.parametrize(
    ("name", "value"), [*REFUSED, ("tau", None), ("variant", "code"), ("cls", "tokn"), ("layer", "last")]
)
def test_unknown_options_are_refused(name, value):
    with pytest.raises(SpecError, match=f"{name}="):
        HoloV(**{name: value})


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(where, value):
    given = picture()
    given[where][0, 3] = value
    with pytest.raises(InvariantError, match="not finite"):
        choose(HoloV(), tokens(*given), 9)


def test_negative_attention_and_missing_tensors_are_refused():
    x, a = picture()
    with pytest.raises(InvariantError, match="negative"):
        choose(HoloV(variant="official"), tokens(x, -a), 9)
    with pytest.raises(CaptureError, match="'grids'"):
        choose(HoloV(), tokens(x, a, ()), 9)
    with pytest.raises(CaptureError, match="'features'"):
        choose(HoloV(), tokens(None, a), 9)
