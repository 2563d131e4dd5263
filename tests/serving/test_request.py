# SPDX-License-Identifier: Apache-2.0
"""What a server accepts, refuses and promises, without any engine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from vlmprune import register
from vlmprune.core.method import Method
from vlmprune.errors import SpecError, UnsupportedError, VlmPruneError
from vlmprune.registry import unregister
from vlmprune.serving import overrides
from vlmprune.serving.request import TowerFacts, check_tower, read, rehearse, wanted

CLIP = TowerFacts(cls=True, depth=24, loaded=23, layer=-2)
WINDOWED = TowerFacts(False, 32, 32, -1, projector=False, merges=4, full=(7, 15, 23, 31))
GRID = ((24, 24),)


@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "divprune@0.25",
        "fastervlm@64",
        "holov@64",
        "mmr+fastervlm@64",
        "pool@64",
        "random@3",
        "uniform@9",
        "visionzip@64",
        "zooprune@64",
        "textmonkey(weights=none)@64",
        "debias(trend=self)+fastervlm@64",
    ],
)
def test_what_can_be_served_passes_the_rehearsal(text):
    rehearse(read(text).text, CLIP, GRID)


def test_the_text_is_canonical_and_the_count_known_beforehand():
    request = read(" fastervlm( cls = mean )@64")
    assert request.text == "fastervlm(cls=mean)@64"
    assert (request.count(576), request.count(36)) == (64, 36)
    assert read("divprune@0.25").count(576) == 144 and read("dense").count(576) == 576


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nonsense@64", "unknown"),
        ("fastervlm", "no budget"),
        ("fastv(layer=2)@64", "slot 'inside_lm'"),
        ("tome@64", "slot 'encoder'"),
        ("var", "slot 'attention'"),
        ("prumerge", "counts by itself"),
        ("blind", "counts by itself"),
        ("fastervlm@64/total", "per total"),
        ("fastervlm@64/crop", "per crop"),
        ("cdpruner@64", "reads the question"),
        ("var+fastervlm@64", "combines 2 acting methods"),
        ("debias(trend='/etc/x.json')+fastervlm@64", "names a file"),
        ("visionselector(weights='/etc')@36", "names a file or a folder"),
        ("visionselector(weights = etc)@36", "names a file or a folder"),
        ("act(recipe='here.yaml')", "names a file or a folder"),
        ("mine(option='../here')@36", "names a file or a folder"),
        # other letters for the same name, a comment in front of "=", an escape for "."
        ("textmonkey(\uff57eights=etc)@36", "names a file or a folder"),
        ("textmonkey(weights#\n=etc)@36", "names a file or a folder"),
        ("debias(#()\ntrend#\n='/etc/x\\x2ejson')+fastervlm@64", "names a file or a folder"),
        ("mine(option=('a', 'b/c'))@36", "names a file or a folder"),
        ("random@" + "9" * 600, "characters"),
        ("gprune(iterations=1000000000)@36", "iterations=100 at most"),
        ("mmr(importance=rank)+zooprune(estimator=zo,m=100000)@36", "m=1024 at most"),
    ],
)
def test_what_no_server_can_do_is_refused_with_what_works(text, why):
    with pytest.raises(VlmPruneError, match=why) as caught:
        read(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "facts", "why"),
    [
        ("fastervlm(layer=-1)@64", CLIP, "first 23 of 24 blocks"),
        ("fastervlm@64", TowerFacts(cls=False, depth=27, loaded=26, layer=-2), "cls=mean"),
        ("fastervlm@64", TowerFacts(True, 24, 23, -2, tower=False), "divprune@64"),
        ("zooprune@64", TowerFacts(True, 24, 23, -2, projector=False), "projector"),
        ("visionzip@64", TowerFacts(True, 24, 24, -1, merges=4), "use cls=mean"),
        ("fastervlm(cls=mean, layer=1)@64", WINDOWED, r"layer=\[-25, -17, -9, -1\]"),
    ],
)
def test_what_a_tower_cannot_give_is_refused(text, facts, why):
    with pytest.raises(UnsupportedError, match=why):
        check_tower(read(text), facts)
    with pytest.raises(UnsupportedError, match=why):
        rehearse(text, facts, GRID)


@pytest.mark.parametrize("spec", ["vispruner(cls=mean)@0.5", "mmr+fastervlm(cls=mean)@0.5", "pool@3000"])
def test_a_large_picture_is_rehearsed_on_a_small_one_of_its_shape(monkeypatch, spec):
    """Other requests wait for a rehearsal, and of 4096 tokens vispruner@0.5 takes 12 seconds."""
    from vlmprune.serving import reduce

    seen = []
    monkeypatch.setattr(reduce, "reduce_one", spy(reduce.reduce_one, seen))
    rehearse.__wrapped__(spec, TowerFacts(False, 32, 32, -1), ((64, 64),))
    rehearse.__wrapped__(spec, TowerFacts(False, 32, 32, -1), ((8, 8),) + ((16, 5),) * 40)
    assert [picture.grids[-1] for picture, _, _ in seen] == [(32, 32), (8, 2)]
    # some stay and some go, as of the large one
    assert all(0 < request.count(picture.count) < picture.count for picture, request, _ in seen)


def test_a_method_says_of_the_large_picture_what_it_cannot_do():
    with pytest.raises(UnsupportedError, match=r"picture of 16384 tokens here.*divprune@64"):
        rehearse("vispruner(cls=mean)@0.5", TowerFacts(False, 32, 32, -1), ((128, 128),))


def spy(function, seen):
    def call(*given):
        seen.append(given)
        return function(*given)

    return call


def test_methods_for_clips_are_rehearsed_on_clips():
    clip = ((6, 6),) * 4
    rehearse("evs@0.5", WINDOWED, clip, True)
    rehearse("fastervlm(cls=mean)@9", WINDOWED, clip, True)
    with pytest.raises(VlmPruneError, match="clip"):
        rehearse("evs@0.5", WINDOWED, ((6, 6),))


@dataclass(frozen=True)
class Failing(Method):
    """Raises what nobody expects, or keeps too few rows."""

    needs: ClassVar = ("features",)
    nested: ClassVar[bool] = False

    def select(self, tokens, k):
        raise RuntimeError("a fault of\nsomebody else")


def test_a_method_that_fails_is_refused_before_the_engine_meets_it():
    register("failing")(Failing)
    try:
        with pytest.raises(UnsupportedError, match=r"failed on random tensors.*a fault of somebody else"):
            rehearse("failing@9", CLIP, GRID)
    finally:
        unregister("failing")
        read.cache_clear()


def test_the_nearest_setting_holds(monkeypatch):
    config = SimpleNamespace(vlmprune="uniform@9")
    monkeypatch.setenv("VLMPRUNE", "random@9")
    assert wanted({"vlmprune": "divprune@9"}, {"vlmprune": "pool@9"}, config).text == "divprune@9"
    assert wanted({"vlmprune": None}, {"vlmprune": "pool@9"}, config).text == "pool@9"
    assert wanted({}, None, config).text == "uniform@9"
    assert wanted({}, {}, SimpleNamespace()).text == "random@9"
    monkeypatch.delenv("VLMPRUNE")
    assert wanted({}, {}, SimpleNamespace()).text == "dense"
    with pytest.raises(SpecError, match="is a int"):
        wanted({"vlmprune": 64}, {}, config)
    with pytest.raises(SpecError, match="is a list") as caught:
        wanted({"vlmprune": ["x" * 10**6]}, {}, config)
    assert len(str(caught.value)) < 200


def test_a_wrong_default_is_refused_at_once():
    with pytest.raises(SpecError, match="unknown"):
        overrides("fastervlmm@64")


def test_the_entry_point_imports_nothing_heavy():
    code = (
        "import sys, vlmprune.serving, vlmprune.serving.vllm.plugin;"
        "print(sorted({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_counts_of_rehearsal_are_those_of_the_budget():
    """A rehearsal compares rows with the promise: a merging method that gives one row too few is refused."""

    @dataclass(frozen=True)
    class Short(Method):
        needs: ClassVar = ("features",)
        nested: ClassVar[bool] = False

        def select(self, tokens, k):
            return torch.arange(k - 1).expand(tokens.batch, -1)

    register("short")(Short)
    try:
        with pytest.raises(VlmPruneError, match=r"short: select returned"):
            rehearse("short@9", CLIP, GRID)
    finally:
        unregister("short")
        read.cache_clear()
