# SPDX-License-Identifier: Apache-2.0
"""One leaderboard over all methods ends without an error; what the model cannot do says what to write."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vlmprune
from vlmprune.errors import UnsupportedError
from vlmprune.evaluation.answer.evaluate import entrant
from vlmprune.evaluation.leaderboard.config import Config, load
from vlmprune.evaluation.leaderboard.run import leaderboard
from vlmprune.registry import get, list_methods

ALL = Path(__file__).parents[2] / "configs" / "all-methods.yaml"
# what the tiny model cannot do, and what the refusal tells
REFUSED = {
    "var": "give them and a lower tau, as in var",
    "downsample": "compare with 'pool@64'",
    **{
        name: "takes images only; where the images"
        for name in ("dycoke", "evs", "fastvid", "holitom", "prunevid", "vidcom2")
    },
}
COMPARED_WITH = ("dense", "blind", "random", "uniform", "pool")  # join by themselves
SAMPLE = 6  # one spec in so many runs by default


def test_the_config_has_every_method_but_those_that_the_tiny_model_refuses() -> None:
    listed = {part.name for spec in load(ALL).specs for part in spec.parts}
    own = {name for name in list_methods() if get(name).__module__.startswith("vlmprune.")}
    assert listed | {*REFUSED, *COMPARED_WITH} == own
    assert not listed & {*REFUSED, *COMPARED_WITH}


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_cannot_run_is_refused_before_the_first_question(name: str) -> None:
    model, processor = vlmprune.load("tiny")
    spec = name if name == "var" else f"{name}@0.5"
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        entrant(model, processor, spec)


def run(config: Config, out: Path) -> dict[str, Any]:
    found = leaderboard(replace(config, limit=4, batch_size=4, max_new_tokens=2), out)
    assert found["failed"] == []
    rows = {row["spec"]: row for row in found["rows"]}
    assert {str(spec) for spec in config.specs} <= set(rows)
    for spec, row in rows.items():
        # a second look reads the picture three times, and the region beside it
        if spec != "dense" and "carve" not in spec:
            assert row["layer_tokens"] < 144, spec  # it did prune
    return found


def test_a_part_of_all_methods_gives_a_row_each(tmp_path: Path) -> None:
    config = load(ALL)
    part = tuple(spec for spec in config.specs if zlib.crc32(str(spec).encode()) % SAMPLE == 0)
    assert len(part) > 2
    run(replace(config, specs=part), tmp_path)


@pytest.mark.slow
def test_all_methods_give_a_row_each(tmp_path: Path) -> None:
    run(load(ALL), tmp_path)


def test_a_refusal_leaves_a_line_with_its_reason_and_the_others_their_rows(tmp_path: Path) -> None:
    config = Config.of({"models": ["tiny"], "specs": ["downsample", "blind"], "keep": [0.5], "limit": 2})
    found = leaderboard(config, tmp_path)
    assert {row["spec"] for row in found["rows"]} >= {"dense", "blind"}
    # no budget equals nothing: blind is read beside dense, and brings no baselines of its own
    blind = next(row for row in found["rows"] if row["spec"] == "blind")
    assert (blind["realised_tokens"], blind["layer_tokens"], blind["vs_random"]) == (0, 0, None)
    assert not any("@0.001" in row["spec"] for row in found["rows"])
    (failed,) = found["failed"]
    assert failed["spec"] == "downsample@0.5" and REFUSED["downsample"] in failed["error"]
