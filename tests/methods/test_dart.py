# SPDX-License-Identifier: Apache-2.0
"""DART against a literal transcription of its rule, and inside a model against the slow twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import vlmprune
import vlmprune.testing.tiny
from vlmprune.core.budget import Budget
from vlmprune.core.method import CutPoint
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, SpecError
from vlmprune.methods.dart import DART, official_keep
from vlmprune.testing.checks_inside import cut_equals_twin
from vlmprune.testing.checks_sequence import batch_row_equals_alone, cut_equals_hand_built
from vlmprune.testing.conformance import Subject

N, R, FIRST = 40, 9, 5


def tokens(seed=0, batch=2, mask=None):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    columns = torch.arange(FIRST + N + R).expand(batch, -1)
    return VisualTokens(
        lm_keys=normal(batch, N, 2, 8),
        lm_states=normal(batch, N, 16),
        text_keys=normal(batch, R, 2, 8),
        text_states=normal(batch, R, 16),
        query_mask=mask,
        positions=columns[:, FIRST : FIRST + N],
        query_positions=columns[:, FIRST + N :],
    )


def by_hand(given, row, k, p_v=4, p_t=4, order=None, power=1):
    """Kept tokens of one row, pivot after pivot."""
    real = np.ones(R, bool) if given.query_mask is None else given.query_mask[row].numpy()
    keys = np.concatenate([given.lm_keys[row], given.text_keys[row][real]]).reshape(N + real.sum(), -1)
    states = np.concatenate([given.lm_states[row], given.text_states[row][real]]).astype(np.float64)
    norm = (np.abs(keys.astype(np.float64)) ** power).sum(axis=1)
    if k <= p_v:
        return sorted(np.argsort(-norm[:N], kind="stable")[:k].tolist())
    visual = np.argsort(-norm[:N], kind="stable")[:p_v]
    text = N + np.argsort(-norm[N:], kind="stable")[:p_t]
    pivots = [*visual, *text]
    if order is not None:
        pivots = order(pivots)
    kept, base, rest = set(visual.tolist()), (k - p_v) // len(pivots), (k - p_v) % len(pivots)
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    for number, pivot in enumerate(pivots):
        left = [i for i in range(N) if i not in kept]
        left.sort(key=lambda i: (unit[i] @ unit[pivot], i))
        kept |= set(left[: base + (number < rest)])
    return sorted(kept)


@pytest.mark.parametrize("k", [1, 3, 4, 5, 12, 20, 31, 39])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_every_pivot_keeps_what_is_least_like_it(k, norm):
    given = tokens()
    want = [by_hand(given, row, k, power={"l1": 1, "l2": 2}[norm]) for row in range(2)]
    assert choose(DART(norm=norm), given, k).tolist() == want


def pivot_lists(given, row):
    """For each pivot of one row all other tokens, the least like it first; and the visual pivots."""
    real = np.ones(R, bool) if given.query_mask is None else given.query_mask[row].numpy()
    keys = np.concatenate([given.lm_keys[row], given.text_keys[row][real]]).reshape(N + real.sum(), -1)
    states = np.concatenate([given.lm_states[row], given.text_states[row][real]]).astype(np.float64)
    norm, unit = np.abs(keys).sum(axis=1), states / np.linalg.norm(states, axis=1, keepdims=True)
    visual = np.argsort(-norm[:N], kind="stable")[:4].tolist()
    text = (N + np.argsort(-norm[N:], kind="stable")[:4]).tolist()
    others = [i for i in range(N) if i not in visual]
    return [sorted(others, key=lambda i, p=p: (unit[i] @ unit[p], i)) for p in visual + text], visual


@pytest.mark.parametrize("words", [R, 2])
def test_a_union_is_that_of_sets_which_do_not_mind_each_other(words):
    given = tokens(mask=torch.arange(R).expand(2, -1) >= R - words)
    for row in range(2):
        lists, visual = pivot_lists(given, row)
        assert len(lists) == 4 + min(4, words)
        for m in (1, 2, 4):
            together = {*visual, *(i for one in lists for i in one[:m])}
            found = choose(DART(variant="union"), given, len(together))[row].tolist()
            assert found == sorted(together)
            if m > 1:
                assert len(together) < 4 + m * len(lists), "sets shall overlap"
        # of a step that is cut short, the earlier pivots are served
        step = [*dict.fromkeys(i for one in lists for i in one[:1])]
        assert choose(DART(variant="union"), given, 6)[row].tolist() == sorted({*visual, *step[:2]})
    assert choose(DART(variant="union"), given, 3).tolist() == choose(DART(), given, 3).tolist()


def test_the_official_order_is_that_of_a_python_set_of_positions():
    def order(pivots):
        return [position - FIRST for position in set(int(p) + FIRST for p in pivots)]

    differ = 0
    for seed in range(4):
        given = tokens(seed=seed)
        kept = choose(DART(variant="official"), given, 20)[0].tolist()
        assert kept == by_hand(given, 0, 20, order=order)
        differ += kept != choose(DART(), given, 20)[0].tolist()
    assert differ


def test_a_row_keeps_alone_what_it_keeps_in_a_batch_with_shorter_text():
    mask = torch.ones(2, R, dtype=torch.bool)
    mask[1, : R - 2] = False  # two tokens of text: two text pivots
    for variant in ("exact", "official"):
        given = tokens(seed=1, mask=mask)
        method = DART(variant=variant)
        short = replace(
            given,
            **{name: getattr(given, name)[1:] for name in ("lm_keys", "lm_states", "positions")},
            **{name: getattr(given, name)[1:, R - 2 :] for name in ("text_keys", "text_states")},
            query_positions=given.query_positions[1:, R - 2 :],
            query_mask=None,
        )
        assert choose(method, given, 17)[1].tolist() == choose(method, short, 17)[0].tolist()
    assert choose(DART(), given, 17)[1].tolist() == by_hand(given, 1, 17)


def test_ties_go_to_the_lower_index():
    same = VisualTokens(
        lm_keys=torch.ones(1, 12, 1, 4),
        lm_states=torch.ones(1, 12, 4),
        text_keys=torch.ones(1, 3, 1, 4),
        text_states=torch.ones(1, 3, 4),
    )
    assert choose(DART(), same, 9).tolist() == [list(range(9))]


def test_half_precision_is_read_in_float32():
    given = tokens(seed=5)
    half = {
        name: getattr(given, name).half() for name in ("lm_keys", "lm_states", "text_keys", "text_states")
    }
    full = {name: value.float() for name, value in half.items()}
    assert torch.equal(choose(DART(), replace(given, **half), 20), choose(DART(), replace(given, **full), 20))


@pytest.mark.parametrize(("keep", "want"), [(128, 132), (64, 68), (192, 196), (60, 60), (127, 124)])
def test_official_counts(keep, want):
    assert official_keep(576, keep) == want
    assert DART(variant="official").cuts(32, Budget(keep), 576) == (CutPoint(2, want, 1),)
    assert DART().cuts(32, Budget(keep), 576) == (CutPoint(2, keep, 1),)


def test_official_counts_of_small_pictures_stay_within_them():
    assert [official_keep(n, n - 1) for n in range(2, 12)] == [4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    assert DART(variant="official").cuts(32, Budget(1.0), 3) == (CutPoint(2, 3, 1),)


def test_what_is_missing_is_named():
    with pytest.raises(CaptureError, match="'lm_keys'"):
        choose(DART(), VisualTokens(features=torch.ones(1, 8, 2)), 5)
    for options in ({"layer": 0}, {"visual_pivots": 0}, {"norm": "l3"}, {"variant": "paper"}):
        with pytest.raises(SpecError):
            DART(**options)
    with pytest.raises(SpecError, match="dart needs a budget"):
        vlmprune.prune(vlmprune.testing.tiny.tiny_model("llava"), "dart")


@pytest.mark.parametrize(
    "spec", ["dart@14", "dart(layer=1,variant=official,visual_pivots=2,text_pivots=1)@9"]
)
def test_a_ragged_batch_equals_the_slow_twin(spec):
    cut_equals_twin(Subject(spec, "llava"))


def embedded(seed=0, batch=2, words=R):
    rng = np.random.default_rng(seed)
    x, t = (rng.normal(size=(batch, n, 16)).astype(np.float32) for n in (N, words))
    x, t = torch.from_numpy(x), torch.from_numpy(t)
    # the same tensors as a layer would give them: keys of one head, and states
    of_layer = VisualTokens(
        lm_keys=x[:, :, None], lm_states=x, text_keys=t[:, :, None], text_states=t, grids=((5, 8),)
    )
    return VisualTokens(features=x, text_embeds=t, grids=((5, 8),)), of_layer


@pytest.mark.parametrize("words", [0, 2, 9])
@pytest.mark.parametrize("options", [{}, {"norm": "l2"}, {"variant": "union"}, {"text_pivots": 0}], ids=str)
def test_before_the_language_model_the_rule_reads_embeddings(options, words):
    given, of_layer = embedded(words=words)
    for k in (2, 4, 11, 25, 39):
        found = choose(DART(at="input", **options), given, k)
        assert found.shape == (2, k)
        if words:
            assert torch.equal(found, choose(DART(**options), of_layer, k))
        if words == R and not options:
            assert found.tolist() == [by_hand(of_layer, row, k) for row in range(2)]
        # each row by itself
        one = choose(DART(at="input", **options), embedded_row(given, 1), k)
        assert torch.equal(one[0], found[1])


def embedded_row(given, row):
    return replace(
        given, features=given.features[row : row + 1], text_embeds=given.text_embeds[row : row + 1]
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_at_the_input_it_is_a_cut_like_any_other(family):
    subject = Subject("dart(at=input)@0.25", family)
    cut_equals_hand_built(subject)
    batch_row_equals_alone(subject)


def test_at_the_input_it_combines_with_cuts_further_on():
    model, inputs = vlmprune.testing.tiny.tiny_model(), vlmprune.testing.tiny.tiny_inputs(images=(1, 2))
    with torch.no_grad(), vlmprune.prune(model, "dart(at=input)@12+fastv(layer=2)@6") as run:
        model(**inputs)
        assert run.last.realised_tokens == [6, 6, 6]
        assert run.last.tokens_per_layer == [12, 12, 6, 6]
    with pytest.raises(SpecError, match="orders pivots as the authors do"):
        DART(at="input", variant="official")
    with pytest.raises(SpecError, match="layer=3 of dart with at='input'"):
        DART(at="input", layer=3)
    with pytest.raises(SpecError, match="at='middle'"):
        DART(at="middle")
