# SPDX-License-Identifier: Apache-2.0
"""Debiasing against literal transcriptions of its formulas, around every base method, and its calibration
files.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import vlmprune
from vlmprune.core.select import choose, top_k
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, InvariantError, SpecError, UnsupportedError
from vlmprune.methods.debias import Debias, calibrate
from vlmprune.methods.debias.calibration import Calibration, identity
from vlmprune.methods.debias.fit import fit_exponential, fit_log_linear
from vlmprune.methods.debias.padding import real_patches
from vlmprune.methods.debias.trend import PUBLISHED, weights
from vlmprune.methods.fastervlm import FasterVLM
from vlmprune.methods.fastv import FastV
from vlmprune.methods.pyramiddrop import PyramidDrop
from vlmprune.methods.sparsevlm import SparseVLM
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row

BASES = {"fastv": FastV(), "pyramiddrop": PyramidDrop(), "sparsevlm": SparseVLM(), "fastervlm": FasterVLM()}
IN_MODEL = ["debias+fastv@9", "debias+pyramiddrop", "debias+sparsevlm@20", "debias+fastervlm@9"]


def attention(batch=2, heads=3, rows=2, n=36, sigma=1.5, seed=0):
    """(B, H, R, N) rows that rise over the places."""
    noise = np.random.default_rng(seed).uniform(0.2, 1.0, size=(batch, heads, rows, n))
    return (noise * np.exp(sigma * np.arange(n) / n) / n).astype(np.float32)


def tokens(a, cut=0, grids=((6, 6),)):
    features = torch.from_numpy(
        np.random.default_rng(1).normal(size=(*a.shape[:1], a.shape[-1], 5)).astype(np.float32)
    )
    rows = torch.from_numpy(a)
    mask = torch.ones(a.shape[0], a.shape[2], dtype=torch.bool)
    return VisualTokens(
        features, text_attention=rows, cls_attention=rows[:, :, 0], query_mask=mask, cut=cut, grids=grids
    )


def weight_by_hand(curve, n):
    """One factor after the other, as the tables of the release are made."""
    if curve == "cubic":
        return np.array(
            [1 / (1 + 3.0151976e-3 * i - 1.4597908e-5 * i**2 + 2.5691135e-8 * i**3) for i in range(n)]
        )
    return np.array([np.exp(-curve * i / n) for i in range(n)])


# --- trend ----------------------------------------------------------------------------------------


def test_the_constants_are_the_means_of_the_released_ones():
    ledger = yaml.safe_load((Path(__file__).parents[2] / "methods" / "debias.yaml").read_text())
    for base, sigma in PUBLISHED.items():
        decays = ledger["released_decays"][base]
        assert len(decays) == len(ledger["released_decays"]["test_sets"]) == 10
        assert round(0.576 * np.mean(decays), 2) == sigma


@pytest.mark.parametrize(("base", "curve"), [("pyramiddrop", 1.89), ("sparsevlm", 1.94), ("fastv", "cubic")])
def test_published_constants_divide_the_scores(base, curve):
    a = attention(n=576)
    given, inner = tokens(a, grids=((24, 24),)), BASES[base]
    by_hand = inner.score(given).numpy() * weight_by_hand(curve, 576)
    for method in (Debias(inner), Debias(inner, trend="constants")):
        np.testing.assert_allclose(method.score(given).numpy(), by_hand, rtol=1e-6)


def test_the_table_of_fastv_ends_where_the_released_one_does_and_scales_with_the_number_of_patches():
    curve = 1 / weights(Debias(FastV()).curve, 576)[0]
    assert curve[0] == 1 and curve[575].item() == pytest.approx(2.791, abs=5e-4)
    torch.testing.assert_close(1 / weights(Debias(FastV()).curve, 36)[0], curve[::16])


@pytest.mark.parametrize("inner", BASES.values(), ids=BASES)
def test_a_given_sigma_replaces_the_constants(inner):
    given = tokens(attention())
    by_hand = inner.score(given).numpy() * weight_by_hand(0.7, 36)
    np.testing.assert_allclose(Debias(inner, sigma=0.7).score(given).numpy(), by_hand, rtol=1e-6)


@pytest.mark.parametrize("inner", BASES.values(), ids=BASES)
def test_the_own_trend_of_every_picture_is_flat_afterwards(inner):
    given = tokens(attention())
    before, after = inner.score(given), Debias(inner, trend="self").score(given)
    x = np.arange(36) / 36
    for row in range(2):
        slope, _ = np.polyfit(x, np.log(before[row].numpy()), 1)
        np.testing.assert_allclose(after[row].numpy(), before[row].numpy() * np.exp(-slope * x), rtol=1e-5)
        assert slope > 0.5 and abs(np.polyfit(x, np.log(after[row].numpy()), 1)[0]) < 1e-5


def test_fastervlm_has_no_constants_and_fits_its_own_trend():
    given = tokens(attention())
    assert Debias(FasterVLM()).score(given).equal(Debias(FasterVLM(), trend="self").score(given))
    with pytest.raises(
        SpecError, match=r"no constants are published for 'fastervlm', only for \['fastv'.*trend=self"
    ):
        Debias(FasterVLM(), trend="constants")


def test_scores_of_zero_are_left_out_of_the_fit():
    a = attention(batch=1)
    a[..., 5] = 0
    x, used = np.arange(36) / 36, np.arange(36) != 5
    raw = FastV().score(tokens(a))[0].numpy()
    slope, _ = np.polyfit(x[used], np.log(raw[used]), 1)
    np.testing.assert_allclose(
        Debias(FastV(), trend="self").score(tokens(a))[0].numpy(), raw * np.exp(-slope * x), rtol=1e-5
    )


@pytest.mark.parametrize("alive", [0, 1])
def test_a_trend_cannot_be_seen_in_fewer_than_two_scores(alive):
    a = np.zeros((1, 1, 1, 36), dtype=np.float32)
    a[..., :alive] = 0.5
    assert Debias(FastV(), trend="self").score(tokens(a)).equal(FastV().score(tokens(a)))


def test_without_trend_and_padding_scores_stay():
    given = tokens(attention())
    for trend in ("none", None):
        assert Debias(FastV(), trend=trend).score(given).equal(FastV().score(given))


@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm"])
def test_later_stages_are_plain(name):
    given, method = tokens(attention(), cut=1), Debias(BASES[name], sigma=2.0)
    assert method.score(given).equal(BASES[name].score(given))
    plain, wrapped = choose(BASES[name], given, 20), choose(method, given, 20)
    if name == "sparsevlm":
        plain, wrapped = plain.features, wrapped.features
    assert wrapped.equal(plain)


def test_recycling_ranks_by_the_uncorrected_score():
    """24 of 36 are kept by the corrected score; of the other 12, the 4 best of the raw one become one row."""
    a = attention(batch=1, sigma=3.0)
    given, method = tokens(a), Debias(SparseVLM(), sigma=3.0)
    raw = a.mean(axis=(1, 2))[0]
    order = np.argsort(-raw * weight_by_hand(3.0, 36), kind="stable")
    kept, rest = np.sort(order[:24]), sorted(order[24:], key=lambda i: -raw[i])
    assert set(kept) != set(np.argsort(-raw)[:24]) and set(rest[:4]) != set(order[24:28])
    merged = choose(method, given, 25)
    assert merged.slots[0].tolist() == [*kept.tolist(), -1]
    torch.testing.assert_close(merged.features[0, 24], given.features[0, rest[:4]].mean(0))


# --- padding --------------------------------------------------------------------------------------


def stripes(bits, upright=False):
    """A mask in which rows, or columns, are real where the text says 1."""
    line = torch.tensor([bit == "1" for bit in bits])
    mask = line[:, None].expand(-1, len(bits))
    return (mask.T if upright else mask).flatten()


@pytest.mark.parametrize(
    ("rule", "size", "threshold", "bits"),
    [
        ("area", (100, 100), 0.0, "111111"),
        ("area", (300, 200), 0.5, "011110"),  # a margin of exactly one patch
        ("area", (300, 150), 0.5, "011110"),  # one and a half: half a patch is not more than half
        ("area", (300, 150), 0.49, "001100"),
        ("area", (300, 290), 0.1, "111111"),  # a tenth is not more than 0.1
        ("area", (300, 290), 0.09, "011110"),
        ("area", (1000, 1), 0.5, "000000"),
        ("integer", (100, 100), 0.5, "111111"),
        ("integer", (300, 200), 0.5, "011110"),
        ("integer", (300, 150), 0.5, "011110"),  # three patches, an odd rest: one on each side
        ("integer", (300, 101), 0.5, "001100"),
        ("integer", (300, 49), 0.5, "000000"),  # no whole patch
        ("resize", (100, 100), 0.5, "111111"),
        ("resize", (300, 200), 0.5, "011110"),
    ],
)
def test_padding_follows_from_the_size_of_the_picture(rule, size, threshold, bits):
    assert real_patches(rule, 6, size, threshold).equal(stripes(bits))
    assert real_patches(rule, 6, size[::-1], threshold).equal(stripes(bits, upright=True))


@pytest.mark.parametrize(("threshold", "count"), [(0.01, 336), (0.5, 384)])
def test_published_counts_of_real_patches(threshold, count):
    assert int(real_patches("area", 24, (640, 426), threshold).sum()) == count


@pytest.mark.parametrize("rule", ["area", "integer", "resize"])
def test_640_by_480_leaves_432_patches_under_every_rule(rule):
    assert int(real_patches(rule, 24, (640, 480)).sum()) == 432


def test_padding_ranks_by_its_own_score_behind_all_real_patches():
    a = attention(batch=1)
    a[..., :6] *= 100  # sinks on the upper margin
    given = tokens(a)
    method = Debias(FastV(), trend="none", pad="area", image_size=(300, 200))
    raw, real = FastV().score(given)[0], stripes("011110")
    scores = method.score(given)[0]
    assert scores[real].equal(raw[real])
    assert scores[~real].argsort().tolist() == raw[~real].argsort().tolist() and (scores[~real] < 0).all()
    assert set(choose(method, given, 24)[0].tolist()) == set(real.nonzero()[:, 0].tolist())
    best = (raw * ~real).argmax().item()
    assert set(choose(method, given, 25)[0].tolist()) == {*real.nonzero()[:, 0].tolist(), best}


def test_equal_padding_keeps_the_lower_index_first():
    a = np.full((1, 1, 1, 36), 0.01, dtype=np.float32)
    method = Debias(FastV(), trend="none", pad="area", image_size=(300, 200))
    assert choose(method, tokens(a), 26)[0].tolist() == [0, 1, *range(6, 30)]


def test_padding_has_no_say_in_the_fit():
    a, real = attention(batch=1), stripes("011110").numpy()
    sinks = a.copy()
    sinks[..., ~real] *= 1000
    method = Debias(FastV(), trend="self", pad="area", image_size=(300, 200))
    found = [method.score(tokens(x))[0].numpy()[real] for x in (a, sinks)]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("grids", [((4, 9),), ((6, 3), (6, 3))])
def test_padding_needs_one_square_of_patches(grids):
    method = Debias(FastV(), pad="area", image_size=(300, 200))
    with pytest.raises(UnsupportedError, match="one square of patches"):
        method.score(tokens(attention(), grids=grids))
    with pytest.raises(CaptureError, match="'grids'"):
        method.score(tokens(attention(), grids=()))


# --- spec -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "debias(trend=self)+fastv(layer=3)@0.25",
        "debias+pyramiddrop",
        "debias(sigma=1.2)+sparsevlm(version=plus)@128",
        "debias(image_size=(640,480),pad=area,threshold=0.01)+fastervlm@64",
        "debias(trend=None)+fastv@9",
    ],
)
def test_specs_round_trip(text):
    assert str(vlmprune.parse(text)) == text
    assert vlmprune.parse(str(vlmprune.parse(text))) == vlmprune.parse(text)


def test_a_wrapper_declares_what_its_inner_method_does():
    for inner in (
        *BASES.values(),
        FasterVLM(cls="mean", layer=-1, anyres="spatial"),
        SparseVLM(version="plus"),
    ):
        method = Debias(inner)
        for name in ("slot", "needs", "layout", "positions", "query_aware", "nested", "budgeted"):
            assert getattr(method, name) == getattr(inner, name)
        assert method.kind() == inner.kind()
    assert replace(Debias(FastV()), sigma=1.0).curve == 1.0
    assert pickle.loads(pickle.dumps(Debias(SparseVLM()))) == Debias(SparseVLM())


@pytest.mark.parametrize(
    "inner", ["random@9", "uniform@9", "divprune@9", "pool@9", "dense", "visionzip@20", "debias+fastv@9"]
)
def test_only_what_ranks_by_attention_can_be_debiased(inner):
    name = inner.split("@")[0].split("+")[0]
    with pytest.raises(SpecError, match=f"'{name}'.*fastv, pyramiddrop, sparsevlm or fastervlm"):
        vlmprune.parse(f"debias+{inner}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("trend=slef", r"trend='slef'.*Did you mean 'self'"),
        ("trend='gone.json'", r"'gone.json' cannot be read.*calibrate"),
        ("trend=self,sigma=1.0", "give one of them"),
        ("sigma=30.0", "from -20 to 20"),
        ("pad=aera,image_size=(4,3)", "Did you mean 'area'"),
        ("pad=area", r"pad='area' with image_size=None; give both or none"),
        ("image_size=(4,3)", "give both or none"),
        ("pad=area,image_size=(4,0)", r"\(width, height\)"),
        ("pad=area,image_size=(4,3,3)", "image_size"),
        ("pad=area,image_size=(4,3),threshold=1.0", "threshold=1.0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        vlmprune.parse(f"debias({options})+fastv@9")


def test_scores_that_are_no_attention_are_refused():
    for bad in (-0.5, float("nan"), float("inf")):
        a = attention()
        a[0, 0, -1, 3] = bad
        with pytest.raises(InvariantError, match="fastv gave scores below zero or not finite"):
            Debias(FastV()).score(tokens(a))


def test_select_works_from_plain_tensors():
    a = attention(batch=2)[:, :, 0]
    raw = a.mean(axis=1)
    keep = vlmprune.select("debias(sigma=1.5)+fastervlm", keep=9, cls_attention=torch.from_numpy(a))
    by_hand = top_k(torch.from_numpy(raw * weight_by_hand(1.5, 36).astype(np.float32)), 9)
    assert keep.tolist() == by_hand.tolist()


# --- in models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava")


@pytest.mark.parametrize("spec", IN_MODEL)
def test_rows_of_a_batch_answer_as_alone(model, spec):
    images = (1, 2, 0)
    inputs = tiny_inputs("llava", images=images)
    with vlmprune.prune(model, spec) as run:
        together = generate(model, inputs)
        kept = [m.keep_idx.tolist() for m in run.last.keep]
        alone = []
        for i in range(3):
            assert generate(model, tiny_row(inputs, "llava", i, images))[0].tolist() == together[i].tolist()
            alone += [m.keep_idx.tolist() for m in run.last.keep]
    assert kept == alone


@pytest.mark.parametrize("spec", IN_MODEL)
def test_without_trend_and_padding_it_is_the_inner_method(model, spec):
    kept = []
    for wrapper in ("debias(trend=None)+", "", "debias(sigma=9.0)+"):
        with vlmprune.prune(model, wrapper + spec.removeprefix("debias+")) as run:
            model(**tiny_inputs("llava"))
        kept.append(run.last.keep[0].keep_idx.tolist())
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize(
    "spec", ["debias+fastv@1.0", "debias+pyramiddrop@1.0", "debias+sparsevlm@1.0", "debias+fastervlm@1.0"]
)
def test_keeping_all_is_dense(model, spec):
    inputs = tiny_inputs("llava", images=(1, 2))
    dense = model(**inputs).logits
    with vlmprune.prune(model, spec):
        assert model(**inputs).logits.equal(dense)


@pytest.mark.parametrize("base", ["fastv@12", "fastervlm@12"])
def test_padding_is_dropped_first_in_a_model(model, base):
    with vlmprune.prune(model, f"debias(pad=area,image_size=(300,100))+{base}") as run:
        model(**tiny_inputs("llava"))
    assert run.last.keep[0].keep_idx.tolist() == list(range(12, 24))


def test_padding_of_tiled_pictures_is_refused():
    tiled = tiny_model("llava_next")
    with (
        vlmprune.prune(tiled, "debias(pad=area,image_size=(300,100))+fastv@12"),
        pytest.raises(UnsupportedError, match="one square of patches"),
    ):
        tiled(**tiny_inputs("llava_next"))


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [-1.0, 0.0, 1.3, 3.0])
def test_both_fits_find_an_exponential(sigma):
    mean = 0.002 * np.exp(sigma * np.arange(50) / 50)
    np.testing.assert_allclose(fit_log_linear(mean), (0.002, sigma), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fit_exponential(mean), (0.002, sigma), rtol=1e-9, atol=1e-9)


def test_the_fit_has_the_least_squares():
    rng = np.random.default_rng(0)
    x = np.arange(80) / 80
    mean = 0.01 * np.exp(1.2 * x) * rng.uniform(0.5, 1.5, 80)
    mu, sigma = fit_exponential(mean)

    def error(mu, sigma):
        return np.square(mean - mu * np.exp(sigma * x)).sum()

    around = [error(mu * a, sigma * b) for a in (0.999, 1.0, 1.001) for b in (0.999, 1.0, 1.001)]
    assert np.argmin(around) == 4
    assert error(mu, sigma) < error(*fit_log_linear(mean))


@pytest.mark.parametrize(
    "mean", [np.array([1.0]), np.array([1.0, 0.0]), np.array([1.0, np.nan]), np.ones((2, 2))]
)
def test_what_has_no_trend_is_refused(mean):
    with pytest.raises(SpecError, match="two or more finite numbers above zero"):
        fit_exponential(mean)


@pytest.fixture
def made(model, tmp_path):
    path = tmp_path / "fastv.json"
    return path, calibrate(
        model, [tiny_inputs("llava", images=(1, 2)), tiny_inputs("llava")], "fastv@9", path
    )


@pytest.mark.parametrize(
    "base", ["fastv@9", "pyramiddrop", "pyramiddrop(shares=(0.5,0.3,0.2))", "sparsevlm@20", "fastervlm"]
)
def test_a_calibration_fits_the_mean_score_of_every_place(model, tmp_path, base, monkeypatch):
    seen = []
    cls = type(vlmprune.parse(base).build()[0].method)
    score = cls.score
    monkeypatch.setattr(cls, "score", lambda self, t: seen.append((t.cut, score(self, t))) or score(self, t))
    samples = [tiny_inputs("llava", images=(1, 2)), tiny_inputs("llava")]
    found = calibrate(model, samples, base, tmp_path / "c.json")
    assert {stage for stage, _ in seen} == {0}
    mean = torch.cat([scores for _, scores in seen]).double().mean(0).numpy()
    np.testing.assert_allclose((found.mu, found.sigma), fit_exponential(mean), rtol=1e-6)
    assert (found.base, found.tokens, found.pictures, found.samples) == (base.split("@")[0], 36, 4, 2)
    assert Calibration.load(tmp_path / "c.json") == found


def test_a_calibrated_trend_is_divided_out(model, made):
    path, found = made
    inputs = tiny_inputs("llava")
    kept = []
    for options in (f"trend='{path}'", f"sigma={found.sigma!r}"):
        with vlmprune.prune(model, f"debias({options})+fastv@9") as run:
            model(**inputs)
        kept.append(run.last.keep[0].keep_idx.tolist())
    assert kept[0] == kept[1]
    text = f"debias(trend='{path}')+fastv@9"
    assert vlmprune.parse(str(vlmprune.parse(text))) == vlmprune.parse(text)


def test_a_calibration_of_another_method_is_refused(made):
    with pytest.raises(SpecError, match=r"calibrated for 'fastv', not for 'fastv\(layer=3\)'"):
        vlmprune.parse(f"debias(trend='{made[0]}')+fastv(layer=3)@9")


@pytest.mark.parametrize("other", ["siglip", "deeper", "renamed"])
def test_a_calibration_of_another_model_is_refused_before_anything_is_attached(made, other):
    stranger = tiny_model(
        "llava", **{"siglip": {"tower": "siglip"}, "deeper": {"layers": 5}, "renamed": {}}[other]
    )
    if other == "renamed":
        stranger.config._name_or_path = "someone/finetuned"
    with pytest.raises(SpecError, match=r"calibrated on model ''.*calibrate on this one"):
        vlmprune.attach(stranger, f"debias(trend='{made[0]}')+fastv@9")
    assert not stranger._forward_pre_hooks


def test_score_asks_for_the_model_too(model, tmp_path):
    path = tmp_path / "c.json"
    calibrate(model, [tiny_inputs("llava", images=(1, 2)), tiny_inputs("llava")], "fastervlm", path)
    assert len(vlmprune.score(model, tiny_inputs("llava"), f"debias(trend='{path}')+fastervlm")) == 1
    with pytest.raises(SpecError, match="calibrate on this one"):
        vlmprune.score(
            tiny_model("llava", layers=5), tiny_inputs("llava"), f"debias(trend='{path}')+fastervlm"
        )


def test_the_folder_of_a_model_does_not_count(model):
    config = tiny_model("llava").config
    names = []
    for path in ("llava-hf/llava-1.5-7b-hf", "/data/models/llava-1.5-7b-hf"):
        config._name_or_path = path
        names.append(identity(config))
    assert (
        names[0] == names[1] and names[0][0] == "llava-1.5-7b-hf" and names[0][1] == identity(model.config)[1]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"sigma": 0.5}, "was changed since it was written"),
        (lambda c: c | {"version": 2}, "is not a calibration file of version 1"),
        (lambda c: {k: v for k, v in c.items() if k != "base"}, "is not a calibration file"),
        (lambda c: c | {"version": [1]}, "is not a calibration file of version 1"),
        (lambda c: c | {"sigma": [1]}, "was changed since it was written"),
        (lambda c: [c], "is not a calibration file"),
    ],
)
def test_changed_files_are_refused(made, change, message):
    path, _ = made
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(SpecError, match=message):
        Debias(FastV(), trend=str(path))


def test_files_that_are_no_json_are_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("sigma: 1")
    with pytest.raises(SpecError, match="cannot be read"):
        Debias(FastV(), trend=str(path))
    Calibration(float("nan"), 1.0, "fastv", 36, 1, 1, "", "").save(path)
    with pytest.raises(SpecError, match="sigma=nan; expected a number from -20 to 20"):
        Debias(FastV(), trend=str(path))


def test_one_peaked_picture_shows_no_trend(model, tmp_path):
    with pytest.raises(SpecError, match=r"mean of 1 pictures has no smooth trend: .*average more"):
        calibrate(model, [tiny_inputs("llava")], "fastervlm", tmp_path / "c.json")


def test_calibration_needs_pictures_of_one_size_and_a_method_that_ranks_by_attention(model, tmp_path):
    path = tmp_path / "c.json"
    text_only = tiny_inputs("llava", images=(0,))
    for inputs in ([], [text_only]):
        with pytest.raises(SpecError, match=rf"{len(inputs)} samples hold pictures of \[\] tokens"):
            calibrate(model, inputs, "fastv@9", path)
    with pytest.raises(SpecError, match="no attention score"):
        calibrate(model, [tiny_inputs("llava")], "divprune", path)
    with pytest.raises(SpecError, match=r"does not end in \.json"):
        calibrate(model, [tiny_inputs("llava")], "fastv@9", tmp_path / "c.txt")
    tiled = tiny_model("llava_next")
    with pytest.raises(SpecError, match=r"pictures of \[\d+, \d+"):
        calibrate(tiled, [tiny_inputs("llava_next", images=(3,))], "fastv@9", path)
    assert not path.exists()
