# SPDX-License-Identifier: Apache-2.0
"""benchmarks/tax.py: what it counts and prints, at a size where times mean nothing."""

from __future__ import annotations

import csv
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import tax
import tax_all

from vlmprune.spec import parse
from vlmprune.speed.memory import memory_profile

MIB = 2**20
TINY = ("--size", "tiny", "--repeats", "1", "--warmup", "1", "--threads", "1")


takes_encoded = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
needs_encoded = pytest.mark.skipif(not takes_encoded, reason="this transformers takes no mm_encoder_outputs")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    out = tmp_path_factory.mktemp("tax") / "rows.json"
    command = [
        sys.executable,
        tax.__file__,
        *TINY,
        "--prune",
        "fastervlm",
        "--keep",
        "4",
        "--json",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == [row]
    return row


@needs_encoded
def test_row_holds_every_number_with_its_conditions(row):
    figures = {name + end for name in ("tax", "speedup", "ideal_speedup") for end in ("", "_with_vision")}
    own = {"spec", "seconds", "spreads", "score_seconds", "capture_seconds", "peak_extra_bytes", "repeats"}
    conditions = {
        "device",
        "dtype",
        "threads",
        "clock",
        "versions",
        "shape",
        "processor",
        "load_before",
        "date",
        "commit",
    }
    assert figures | own | conditions <= row.keys()
    assert (row["spec"], row["device"], row["dtype"], row["threads"]) == ("fastervlm@4", "cpu", "float32", 1)
    assert set(row["versions"]) == {"torch", "transformers", "vlmprune", "python"}
    assert {"tokens": 16, "hidden": 64, "layers": 2, "text_tokens": 60}.items() <= row["shape"].items()
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert all(low <= high for low, high in row["spreads"].values())


@needs_encoded
def test_ratios_are_those_of_the_one_round(row):
    seconds = row["seconds"]
    for end in ("", "_with_vision"):
        dense, pruned, free = (seconds[side + end] for side in ("dense", "pruned", "free"))
        expected = {"tax": pruned / free, "speedup": dense / pruned, "ideal_speedup": dense / free}
        assert {name: row[name + end] for name in expected} == pytest.approx(expected)


@needs_encoded
def test_both_sides_compute_the_same_first_token(row):
    assert row["kept"] == 4
    assert row["logits_difference"] < 1e-5


@needs_encoded
@pytest.mark.parametrize("spec", ["pool@4", "dense"])
def test_merged_rows_and_no_budget_are_measured_too(spec, capsys):
    assert tax.main([*TINY, "--prune", spec, "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["kept"] == (16 if spec == "dense" else 4)


@needs_encoded
def test_a_newer_row_replaces_the_one_like_it(row, tmp_path):
    out = tmp_path / "rows.json"
    other = row | {"threads": 2}
    for each in (row, other, row | {"date": "later"}):
        tax.save(each, out)
    assert json.loads(out.read_text()) == [other, row | {"date": "later"}]


def test_unknown_method_is_told_with_the_nearest_name(capsys):
    assert tax.main([*TINY, "--prune", "fastervml@4"]) == 2
    assert "Did you mean 'fastervlm'" in capsys.readouterr().err


@pytest.mark.skipif(takes_encoded, reason="this transformers takes mm_encoder_outputs")
def test_a_transformers_that_is_too_old_is_told(capsys):
    assert tax.main([*TINY, "--prune", "fastervlm@4"]) == 2
    assert "5.20 or newer" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_told(capsys):
    assert tax.main([*TINY, "--prune", "fastervlm@4", "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.big, self.small = nn.Linear(1, MIB, bias=False), nn.Linear(MIB, 1, bias=False)

    def forward(self, x):
        return self.small(self.big(x))


def test_memory_is_exact_and_found_where_it_was_used():
    model, x = Layers(), torch.ones(1, 1)
    bare = memory_profile(lambda: model(x), model)
    assert max(bare) == 4 * MIB + 4  # the hidden row and the result
    assert bare[-1] == 4  # only the result is left
    kept = []

    def watch(module, args, output):
        torch.ones(3, MIB, dtype=torch.uint8).sum()  # used and gone
        kept.append(output[:, :MIB].clone())  # stays

    handle = model.big.register_forward_hook(watch)
    try:
        watched = memory_profile(lambda: model(x), model)
    finally:
        handle.remove()
    extra = [after - before for before, after in zip(bare, watched, strict=True)]
    assert max(extra) == extra[-1] == 4 * MIB
    assert extra[0] == 0


def test_a_hidden_peak_is_seen():
    model, x = Layers(), torch.ones(1, 1)
    bare = memory_profile(lambda: model(x), model)
    handle = model.big.register_forward_pre_hook(
        lambda module, args: torch.ones(2, MIB, dtype=torch.uint8).numel() and None
    )
    try:
        watched = memory_profile(lambda: model(x), model)
    finally:
        handle.remove()
    assert max(watched) - max(bare) <= 0  # the maxima hide it
    assert max(after - before for before, after in zip(bare, watched, strict=True)) == 2 * MIB


# --- all methods in one run -----------------------------------------------------------------------

SHORT = ("--all", "--size", "tiny", "--keep", "4", "--warmup", "1", "--threads", "1")


def table(path):
    return {row["spec"]: row for row in csv.DictReader(path.with_suffix(".csv").open())}


@needs_encoded
def test_all_methods_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tax_all, "every_method", lambda: ["fastervlm", "hiprune", "blind", "tome", "fastv"])
    out = tmp_path / "all.jsonl"
    assert tax.main([*SHORT, "--repeats", "1", "--out", str(out)]) == 0
    first = out.read_text()
    assert first.count("\n") == 1
    with out.open("a") as file:
        file.write('{"same": {"si')  # killed while it wrote
    assert tax.main([*SHORT, "--repeats", "2", "--out", str(out)]) == 0
    assert out.read_text().startswith(first) and out.read_text().count("\n") == 2
    rows = table(out)
    assert {spec: row["rounds"] for spec, row in rows.items()} == {
        "fastervlm@4": "2",
        "hiprune@4": "2",
        "blind": "2",
        "tome": "0",
        "fastv": "0",
    }
    assert (
        "inside the vision tower" in rows["tome"]["why_not"]
        and "choose a smaller one" in rows["fastv"]["why_not"]
    )
    # two blocks cannot be seen on a tower of one
    assert {spec: rows[spec]["tower"] for spec in ("fastervlm@4", "hiprune@4")} == {
        "fastervlm@4": "one block",
        "hiprune@4": "narrow",
    }
    assert [rows[spec]["kept"] for spec in ("fastervlm@4", "blind")] == ["4", "0"]
    assert "fastervlm@4: tax " in capsys.readouterr().out
    # nothing is measured where all rounds are there, and other conditions are another file
    assert tax.main([*SHORT, "--repeats", "2", "--out", str(out)]) == 0
    assert out.read_text().count("\n") == 2
    assert tax.main([*SHORT, "--repeats", "2", "--out", str(out), "--dtype", "bfloat16"]) == 2
    assert "round 1 was measured with {'dtype': 'float32'}" in capsys.readouterr().err


def test_a_row_has_the_median_of_ratios_within_rounds():
    parts = {"bare": 1.0, "watched": 1.5, "choose": 0.001, "kept": 4, "tower": "one block"}
    lost = {**parts, "tower": "narrow"}
    rounds = [
        {"dense": 8.0, "specs": {"a@4": {**parts, "pruned": 1.5, "free": 2.0}}},
        {"dense": 6.0, "specs": {"a@4": {**parts, "pruned": 2.5, "free": 2.0}}},
        {
            "dense": 6.0,
            "specs": {
                "a@4": {**parts, "pruned": 3.5, "free": 2.0},
                "b@4": {**lost, "pruned": 1.0, "free": 1.0},
            },
        },
    ]
    a, b, c = tax_all.rows(rounds, {"c": "cannot"})
    # capture adds half a second to 1.5, 2.5 and 3.5
    assert (a["spec"], a["tax"], a["ideal"], a["speedup"], a["capture_ms"], a["rounds"]) == (
        "a@4",
        1.5,
        3.0,
        2.0,
        500,
        3,
    )
    # on a narrow tower capture is lost in the noise
    assert (b["tax"], b["capture_ms"], b["rounds"]) == (1.0, 500, 1)
    assert (c["spec"], c["rounds"], c["tax"], c["why_not"]) == ("c", 0, "", "cannot")


def test_all_needs_a_file_and_excludes_a_spec(capsys):
    for words, told in (
        (["--all"], "--all needs --out"),
        (["--all", "--prune", "fastervlm@4"], "not allowed with"),
    ):
        with pytest.raises(SystemExit):
            tax.main(words)
        assert told in capsys.readouterr().err


@pytest.mark.slow
@needs_encoded
def test_every_method_has_a_line(tmp_path):
    out = tmp_path / "all.jsonl"
    assert tax.main([*SHORT, "--repeats", "1", "--out", str(out)]) == 0
    rows = table(out)
    assert {parse(spec).parts[0].name for spec in rows} == set(tax_all.every_method())
    assert all(float(row["tax"]) > 0 if int(row["rounds"]) else row["why_not"] for row in rows.values())
