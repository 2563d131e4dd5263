# SPDX-License-Identifier: Apache-2.0
"""benchmarks/inside.py: what it counts and prints, at a size where times mean nothing."""

from __future__ import annotations

import inspect as python_inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import inside

TINY = ("--size", "tiny", "--repeats", "1", "--warmup", "1", "--threads", "1", "--json")
EVERY_HEAD = "var(dims=[7,21],tau=2.0,max_sink_portion=0.9,min_visual_mass=0.0,first_layer=0)"
CONDITIONS = {
    "device",
    "dtype",
    "threads",
    "clock",
    "repeats",
    "versions",
    "shape",
    "processor",
    "load_before",
    "date",
    "commit",
}

takes_encoded = (
    "mm_encoder_outputs" in python_inspect.signature(LlavaForConditionalGeneration.forward).parameters
)
needs_encoded = pytest.mark.skipif(not takes_encoded, reason="this transformers takes no mm_encoder_outputs")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row_of(spec, capsys):
    assert inside.main([*TINY, "--spec", spec]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@needs_encoded
@pytest.mark.parametrize("spec", ["fastv(layer=1)@4", "pyramiddrop(layers=[1],shares=[.25])"])
def test_the_free_side_reads_the_very_rows_that_the_method_keeps(spec, capsys):
    row = row_of(spec, capsys)
    assert row["tokens_per_layer"] == [16, 4]
    assert row["logits_difference"] < 1e-5
    dense, attached, ideal = (row["seconds"][side] for side in ("dense", "attached", "ideal"))
    expected = {"tax": attached / ideal, "speedup": dense / attached, "ideal_speedup": dense / ideal}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row.keys() >= CONDITIONS


@needs_encoded
def test_an_overhead_comes_with_the_share_of_what_was_edited(capsys):
    row = row_of(EVERY_HEAD, capsys)
    assert row["overhead"] == pytest.approx(row["seconds"]["attached"] / row["seconds"]["dense"] - 1)
    assert row["edited_share"] == 1
    assert row["logits_change"] > 0
    assert row.keys() >= CONDITIONS


@needs_encoded
def test_without_sinks_nothing_is_edited(capsys):
    row = row_of(EVERY_HEAD.replace("tau=2.0", "tau=7.9"), capsys)
    assert (row["edited_share"], row["logits_change"]) == (0, 0)


@needs_encoded
@pytest.mark.parametrize("spec", ["fastervlm@4", "dense"])
def test_methods_that_act_elsewhere_are_sent_to_the_other_script(spec, capsys):
    assert inside.main([*TINY, "--spec", spec]) == 2
    assert "tax.py measures the others" in capsys.readouterr().err


def test_unknown_method_is_told_with_the_nearest_name(capsys):
    assert inside.main([*TINY, "--spec", "fastw@4"]) == 2
    assert "Did you mean 'fastv'" in capsys.readouterr().err
