# SPDX-License-Identifier: Apache-2.0
"""Rows that an engine is given: those that prune leaves in a model, and a fallback instead of an error."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vlmprune
from vlmprune import register
from vlmprune.core.method import Method
from vlmprune.hooks.vision.encode import run_encoder
from vlmprune.hooks.vision.pictures import Picture
from vlmprune.models import adapter_for
from vlmprune.registry import unregister
from vlmprune.serving.names import FALLBACKS_VARIABLE
from vlmprune.serving.reduce import KeptRows, in_turns, promised, reduce_pictures, with_breaks
from vlmprune.serving.request import read
from vlmprune.serving.tally import OTHERS, SpecCounts, Tally, published
from vlmprune.testing.tiny import tiny_inputs, tiny_model

TEXT = 5


def served(model, inputs, request):
    """What a server would give the language model for every picture."""
    adapter = adapter_for(model)
    capture = adapter.capture(request.needs)
    _, (pictures,) = run_encoder(adapter, adapter.modalities[0], inputs, [capture])
    return reduce_pictures(pictures, request, adapter.projector), pictures


def entering(model, inputs, spec):
    """(L, D) what enters the first decoder layer with vlmprune.prune, of the only prompt."""
    seen = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad(), vlmprune.prune(model, spec):
            model(**inputs)
    finally:
        hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("spec", ["fastervlm@9", "visionzip@9", "pool@0.25", "dense"])
def test_rows_are_those_of_prune(family, spec):
    """With newlines between the patches too, where merged rows take the places of their tokens."""
    model, inputs = tiny_model(family), tiny_inputs(family, images=(1,), text_len=TEXT)
    request = read(spec)
    kept, pictures = served(model, inputs, request)
    whole = entering(model, inputs, spec)
    torch.testing.assert_close(kept[0].rows, whole[1 + TEXT : -TEXT], rtol=1e-5, atol=1e-5)
    assert kept[0].rows.shape[0] == promised(pictures[0], request)
    assert kept[0].slots.equal(kept[0].slots.sort().values) and kept[0].fallback is None


def picture(n=12, seed=0):
    features = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return Picture(features, ((3, n // 3),))


def test_a_broken_picture_alone_falls_back_to_uniform(caplog):
    good, broken = picture(seed=1), picture(seed=2)
    broken.features[3, 0] = torch.nan
    request = read("divprune@4")
    with caplog.at_level(logging.ERROR):
        kept = reduce_pictures([good, broken, good], request, None)
    expected = vlmprune.select("divprune@4", features=good.features[None])[0]
    assert kept[0].slots.equal(expected) and kept[2].slots.equal(expected)
    assert kept[0].fallback is None and "not finite" in kept[1].fallback
    assert kept[1].slots.equal(vlmprune.select("uniform@4", grid=(3, 4), features=good.features[None])[0])
    assert "divprune@4" in caplog.text and "uniform" in caplog.text


@dataclass(frozen=True)
class Overflowing(Method):
    """Gives scores that are not finite for some pictures."""

    needs: ClassVar = ("features",)

    def score(self, tokens):
        x = tokens.need("features")[..., 0]
        return torch.where(x.amax(dim=1, keepdim=True) > 50, torch.nan, x)


def test_a_broken_picture_whose_tokens_have_no_places_keeps_evenly_spaced_ones():
    features = torch.full((36, 8), torch.nan)
    (kept,) = reduce_pictures([Picture(features, ())], read("divprune@9"), None)
    assert kept.fallback is not None and kept.slots.diff().unique().tolist() == [4]


def test_a_method_that_fails_on_one_picture_falls_back_for_it_alone():
    register("overflowing")(Overflowing)
    try:
        good, broken = picture(seed=1), picture(seed=2)
        broken.features[5, 0] = 99.0
        kept = reduce_pictures([good, broken], read("overflowing@4"), None)
    finally:
        unregister("overflowing")
        read.cache_clear()
    best = good.features[:, 0].topk(4).indices.sort().values
    assert kept[0].slots.equal(best) and kept[0].fallback is None
    assert "not finite" in kept[1].fallback and kept[1].rows.shape == (4, 4)


@dataclass(frozen=True)
class Exhausting(Method):
    """Needs more memory than there is for some pictures."""

    needs: ClassVar = ("features",)

    def score(self, tokens):
        x = tokens.need("features")[..., 0]
        if x.max() > 50:
            raise torch.OutOfMemoryError("a device is out of memory")
        return x


def test_an_error_that_is_not_ours_falls_back_too(caplog):
    register("exhausting")(Exhausting)
    try:
        good, large = picture(seed=1), picture(seed=2)
        large.features[5, 0] = 99.0
        with caplog.at_level(logging.ERROR):
            kept = reduce_pictures([good, large], read("exhausting@4"), None)
    finally:
        unregister("exhausting")
        read.cache_clear()
    assert kept[0].fallback is None and kept[1].rows.shape == (4, 4)
    assert "out of memory" in kept[1].fallback and "out of memory" in caplog.text


def test_merged_rows_stand_where_their_tokens_stood_if_asked():
    """Models whose positions depend on slots read them there; others in the order of the method."""
    one = picture()
    request = read("pool@3")
    kept = reduce_pictures([one], request, None, in_place=True)[0]
    left = vlmprune.reduce("pool@3", grid=(3, 4), features=one.features[None])
    slots, order = left.keep_idx[0].sort()
    assert kept.slots.equal(slots) and kept.rows.equal(left.rows[0][order])


@pytest.mark.parametrize("slots", [list(range(12)), [1, 2, 9], [], [0, 3, 4, 11]])
def test_breaks_between_lines_stay_where_they_stood(slots):
    """Against the whole picture with its breaks, from which the other tokens are taken out."""
    one, row = picture(), torch.full((1, 4), 7.0)
    lines = [part for line in one.features.split(4) for part in (line, row)][:-1]
    stay = [part for at in range(12) for part in ([at in slots] + [True] * (at in (3, 7)))]
    kept = KeptRows(one.features[slots], torch.tensor(slots, dtype=torch.int64))
    assert with_breaks(kept, one.grids, row).equal(torch.cat(lines)[torch.tensor(stay)])


def test_pictures_of_different_shape_are_reduced_together():
    kept = reduce_pictures([picture(12), picture(6), picture(12, seed=3)], read("divprune@7"), None)
    assert [one.rows.shape[0] for one in kept] == [7, 6, 7]


def test_turns_are_of_one_spec_and_bounded_by_what_the_tower_computes():
    specs = ["pool@3"] * 4 + ["dense"] * 2 + ["pool@3"]
    sizes, turns = [4, 4, 3, 20, 4, 4, 4], []

    def one_turn(start, end, request):
        turns.append((start, end, request.text))
        return [torch.full((1,), number) for number in range(start, end)]

    rows = in_turns(specs, sizes, 8, one_turn)
    assert [int(row) for row in rows] == list(range(7))
    expected = [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]  # one item may be more than that alone
    assert turns == [(start, end, specs[start]) for start, end in expected]


def test_the_tally_counts_and_speaks_with_every_digit(caplog):
    tally = Tally()
    with caplog.at_level(logging.INFO, logger="vlmprune.serving.tally"):
        for number in range(12):
            tally.add("fastervlm@64", 576, 64, fallback=number == 3)
    assert tally.by_spec["fastervlm@64"] == SpecCounts(12, 12 * 576, 12 * 64, 1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "vlmprune: fastervlm@64: 1 picture, 576 -> 64 tokens each, 0 cut by uniform instead",
        "vlmprune: fastervlm@64: 10 pictures, 576 -> 64 tokens each, 1 cut by uniform instead",
    ]
    for number in range(100):  # clients choose specs: the number of counters is bounded
        tally.add(f"random(seed={number})@9", 9, 9, fallback=False)
    assert len(tally.by_spec) == 65 and tally.by_spec[OTHERS].pictures == 100 - 63


def test_a_full_disk_does_not_end_a_server(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv(FALLBACKS_VARIABLE, str(blocked / "counts"))
    tally = Tally()
    tally.add("divprune@9", 36, 9, fallback=True)
    with caplog.at_level(logging.ERROR):
        tally.publish()
    assert "cannot be written" in caplog.text and tally.by_spec["divprune@9"].fallbacks == 1


def test_fallbacks_of_all_processes_of_a_server_are_added_up(tmp_path, monkeypatch):
    folder = tmp_path / "counts"
    monkeypatch.setenv(FALLBACKS_VARIABLE, str(folder))
    assert published() == {}
    for pid, spec in ((1, "divprune@9"), (2, "divprune@9"), (3, "pool@9")):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        tally = Tally()
        tally.add("uniform@9", 36, 9, fallback=False)
        for _ in range(pid):
            tally.add(spec, 36, 9, fallback=True)
            tally.publish()
    assert published() == {"divprune@9": 1 + 2, "pool@9": 3}
    monkeypatch.delenv(FALLBACKS_VARIABLE)
    Tally().publish()
    assert published() == {}
