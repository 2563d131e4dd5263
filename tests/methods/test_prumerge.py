# SPDX-License-Identifier: Apache-2.0
"""PruMerge against a literal transcription, by its own count and at a budget; ragged counts in a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmprune import parse, prune, select
from vlmprune.core.combine import act_as
from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.methods.baselines import Dense
from vlmprune.methods.prumerge import PruMerge
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row


def inputs(batch=2, n=36, width=6, seed=0, peaks=(3, 5)):
    """Units with about so many outliers each."""
    draw = np.random.default_rng(seed)
    a = draw.random((batch, n)) * 0.01 + 0.01
    for row, count in zip(a, peaks, strict=False):
        row[draw.permutation(n)[:count]] += draw.random(count) * 0.2 + 0.1
    x, keys, weight = (draw.normal(size=shape) for shape in ((batch, n, width), (batch, n, 8), (width, 5)))
    x, keys, weight, a = (torch.from_numpy(y).float() for y in (x, keys, weight, a))
    return VisualTokens(
        features=x @ weight,
        encoder_features=x,
        wide_keys=keys,
        wide_attention=a,
        projector=lambda rows: rows @ weight,
    )


def transcription(x, a, keys, centres, count, extra):
    """(k + 1, C) rows of one picture before the projector."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    rows = []
    for i in centres:
        others = [j for j in range(len(x)) if j != i]
        near = sorted(others, key=lambda j: (-(unit[i] @ unit[j]), j))[:count]
        rows.append(x[i] + sum(a[j] * x[j] for j in near))
    rest = [j for j in range(len(x)) if j not in centres]
    total = sum(a[j] * x[j] for j in rest)
    if extra != "none":
        rows.append(total if extra == "sum" else total / sum(a[j] for j in rest))
    return np.stack(rows)


def plain(tokens, row):
    given = (tokens.encoder_features, tokens.wide_attention, tokens.wide_keys)
    return [x[row].double().numpy() for x in given]


def own_centres(a, plus):
    """Outliers by attention, and every s-th patch."""
    low, high = np.percentile(a, [25, 75])
    order = np.argsort(-a, kind="stable").tolist()
    best = order[: max(1, int((a > high + 1.5 * (high - low)).sum()))]
    if plus:
        step = max(1, int(int(len(a) / len(best)) / 3))
        best += [i for i in range(0, len(a), step) if i not in best]
    return best


def budget_centres(a, k, plus):
    order = np.argsort(-a, kind="stable").tolist()
    if not plus:
        return order[: k - 1]
    best = order[: round((k - 1) / 4)]
    rest = [i for i in range(len(a)) if i not in best]
    m = k - 1 - len(best)
    return best + [rest[j * len(rest) // m] for j in range(m)]


@pytest.mark.parametrize("extra", ["sum", "mean"])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("k", [2, 3, 9, 20, 35])
def test_a_budget_gives_exactly_the_rows_of_the_rule(k, plus, extra):
    tokens = inputs()
    merged = choose(PruMerge(plus, neighbours=5, extra=extra, order="official"), tokens, k)
    assert merged.features.shape == (2, k, 5)
    for row in range(2):
        x, a, keys = plain(tokens, row)
        centres = budget_centres(a, k, plus)
        assert merged.slots[row].tolist() == [*centres, -1]
        want = torch.from_numpy(transcription(x, a, keys, centres, 5, extra)).float()
        torch.testing.assert_close(merged.features[row], tokens.projector(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plus", [False, True])
def test_without_a_budget_each_picture_has_its_own_count(plus):
    tokens = inputs()
    units = choose_own(PruMerge(plus, neighbours=5, order="official"), tokens)
    assert len({len(one.slots) for one in units}) == 2
    for row, one in enumerate(units):
        x, a, keys = plain(tokens, row)
        centres = own_centres(tokens.wide_attention[row].numpy(), plus)
        assert one.slots.tolist() == [*centres, -1]
        want = torch.from_numpy(transcription(x, a, keys, centres, 5, "sum")).float()
        torch.testing.assert_close(one.features, tokens.projector(want), rtol=1e-4, atol=1e-5)


def test_a_picture_does_not_depend_on_its_neighbours_unless_official():
    tokens = inputs()
    second = {k: v[1:] if isinstance(v, torch.Tensor) else v for k, v in vars(tokens).items()}
    alone = VisualTokens(**second)
    for method, same in ((PruMerge(), True), (PruMerge(variant="official"), False)):
        together, one = choose_own(method, tokens)[1], choose_own(method, alone)[0]
        assert (together.slots.tolist() == one.slots.tolist()) is same


def test_raster_order_is_the_official_one_sorted():
    tokens = inputs()
    raster, official = (choose(PruMerge(order=order), tokens, 9) for order in ("raster", "official"))
    order = official.slots[0, :-1].argsort()
    assert raster.slots[0].tolist() == [*official.slots[0][order].tolist(), -1]
    torch.testing.assert_close(raster.features[0, :-1], official.features[0][order])
    assert raster.slots[0].tolist() != official.slots[0].tolist()


def test_flat_attention_keeps_one_centre_and_ties_go_to_the_lower_index():
    tokens = inputs(batch=1, peaks=())
    object.__setattr__(tokens, "wide_attention", torch.full((1, 36), 1 / 37))
    assert choose_own(PruMerge(), tokens)[0].slots.tolist() == [0, -1]
    assert choose(PruMerge(), tokens, 4).slots.tolist() == [[0, 1, 2, -1]]
    assert choose_own(PruMerge(extra="none"), tokens)[0].slots.tolist() == [0]
    # the official code returns the other row alone, and has no grid to divide
    assert choose_own(PruMerge(variant="official"), tokens)[0].slots.tolist() == [-1]
    with pytest.raises(UnsupportedError, match="no even grid"):
        choose_own(PruMerge(True, variant="official"), tokens)


def test_many_outliers_are_no_error_outside_the_official_variant():
    a = torch.full((1, 36), 0.001)
    a[0, :8] += torch.arange(1, 9) / 100
    tokens = inputs(batch=1)
    object.__setattr__(tokens, "wide_attention", a)
    assert choose_own(PruMerge(True), tokens)[0].slots.tolist() == list(
        range(36)
    )  # spacing 1: all patches, no others
    a[0, :8] = a[0, 8]
    a[0, 3:5] = 0.1
    assert len(choose_own(PruMerge(True), tokens)[0].slots) == 9  # every sixth, two outliers, the others


def test_fewer_patches_than_neighbours():
    tokens = inputs(n=4, peaks=(1, 1))
    assert choose(PruMerge(), tokens, 3).features.isfinite().all()


@pytest.mark.parametrize(("extra", "least"), [("sum", 2), ("none", 1)])
def test_the_least_budget_is_named(extra, least):
    method = PruMerge(extra=extra)
    assert method.least(36) == least
    choose(method, inputs(), least)
    if least > 1:
        with pytest.raises(SpecError, match="keep at least 2"):
            choose(method, inputs(), 1)


def test_half_precision_counts_outliers_in_float32():
    tokens = inputs()
    half = {k: v.bfloat16() if k == "encoder_features" else v for k, v in vars(tokens).items()}
    made = VisualTokens(**{**half, "projector": lambda rows: rows.float() @ torch.ones(6, 5)})
    assert choose(PruMerge(), made, 9).features.dtype == torch.float32


def test_specs_with_and_without_a_budget():
    assert str(parse("prumerge")) == "prumerge" and parse("prumerge").prunes
    assert str(parse("prumerge(plus=True)@144")) == "prumerge(plus=True)@144"
    with pytest.raises(SpecError, match="prumerge may count by itself"):
        act_as(Dense(), PruMerge())


def test_select_fills_shorter_rows():
    tokens = inputs()
    given = {name: getattr(tokens, name) for name in ("features", "encoder_features")}
    given |= {name: getattr(tokens, name) for name in ("wide_attention", "wide_keys", "projector")}
    kept = select("prumerge", **given)
    counts = (kept >= 0).sum(1).tolist()
    assert counts[0] != counts[1] and kept.shape[1] == max(counts)
    assert all(row[:count].diff().gt(0).all() for row, count in zip(kept, counts, strict=True))


@pytest.mark.parametrize("spec", ["prumerge", "prumerge(plus=True)"])
def test_ragged_counts_in_a_model_equal_row_by_row(spec):
    model, images = tiny_model("llava"), (1, 2, 1)
    batch = tiny_inputs("llava", images=images, seed=3)
    options = {"max_new_tokens": 4, "do_sample": False}
    with prune(model, spec) as run:
        together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        counts = list(run.last.realised_tokens)
        alone = []
        for row in range(len(images)):
            one = tiny_row(batch, "llava", row, images)
            ids = model.generate(**one, **options)[0, one["input_ids"].shape[1] :]
            assert ids.tolist() == together[row].tolist()
            alone += run.last.realised_tokens
    assert counts == alone and len(set(counts)) > 1, counts
    assert min(counts) < run.last.dense_tokens[0] / 2
