# SPDX-License-Identifier: Apache-2.0
"""The command line: what is printed, where to, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import cli, process
from PIL import Image
from typer.testing import CliRunner

import vlmprune
from vlmprune.cli import app
from vlmprune.errors import SpecError
from vlmprune.evaluation.tasks.shapes import shapes
from vlmprune.models import families
from vlmprune.testing import conformance, tiny
from vlmprune.testing.conformance import CheckResult

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "numpy", "yaml", "PIL", "triton")
NOTE = (
    "tiny was trained on the drawn pictures of this package alone: about other pictures its answers mean "
    "nothing"
)


# --- the command itself ---------------------------------------------------------------------------


def test_help_names_every_command_and_the_exit_codes():
    text = cli("--help").stdout
    for command in ("list", "show", "run", "verify", "validate", "new"):
        assert re.search(rf"\b{command}\b", text)
        assert cli(command, "-h").stdout
    assert "1 a check failed" in text and "2 the input was wrong" in text


@pytest.mark.parametrize("words", [(), ("run",), ("leaderboard",), ("serve",)])
def test_help_asks_for_no_value_behind_a_flag(words):
    text = cli(*words, "--help").stdout
    assert "--help" in text and not re.search("<bool>|BOOLEAN", text)


def test_help_and_import_load_nothing_heavy():
    code = f"import sys, vlmprune.cli as c; print(sorted(set(sys.modules) & set({HEAVY}))); c.app(['--help'])"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("[]\n")


def test_the_version_is_that_of_the_package():
    assert cli("--version").stdout == f"vlmprune {vlmprune.__version__}\n"


def test_a_misspelt_command_is_a_usage_error():
    assert "Did you mean 'list'" in cli("lst", code=2).stderr


def test_errors_go_to_stderr_without_a_traceback():
    done = process("show", "fasterlvm")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match("error: method 'fasterlvm' is unknown. Did you mean 'fastervlm'?", done.stderr)
    assert done.stderr.count("\n") == 1  # not wrapped


def test_debug_shows_the_traceback():
    done = process("--debug", "show", "fasterlvm")
    assert done.returncode != 0 and "Traceback" in done.stderr and "SpecError" in done.stderr
    result = CliRunner().invoke(app, ["--debug", "show", "fasterlvm"])
    assert isinstance(result.exception, SpecError)


# --- list and show --------------------------------------------------------------------------------


def test_list_shows_every_method():
    rows = {line.split()[0]: line for line in cli("list").stdout.splitlines() if line.strip()}
    assert set(vlmprune.list_methods()) <= set(rows)
    assert "arXiv:2412.01818v1" in rows["fastervlm"] and "Ranks patches by the" in rows["fastervlm"]


def test_list_as_json_is_json_only():
    found = {info["name"]: info for info in json.loads(cli("list", "--json").stdout)}
    assert sorted(found) == vlmprune.list_methods()
    assert found["fastervlm"]["needs"] == ["cls_attention"]
    assert [(option["name"], option["default"]) for option in found["random"]["options"]] == [("seed", 0)]


def test_list_families():
    assert all(family in cli("list", "--families").stdout for family in families())
    assert sorted(json.loads(cli("list", "--families", "--json").stdout)) == families()


@pytest.mark.parametrize("width", ["80", "120"])
def test_every_family_has_one_line(width):
    made = CliRunner().invoke(app, ["list", "--families"], env={"COLUMNS": width}).stdout
    lines = [line.split() for line in made.splitlines()]
    rows = {words[0]: words for words in lines if words and words[0] in families()}
    assert sorted(rows) == families() and {len(words) for words in rows.values()} == {6}
    table = json.loads(cli("list", "--families", "--json").stdout)
    for family, (_, methods, video, *_) in rows.items():
        runs = sum(cells["runs"] == "yes" for cells in table[family]["methods"].values())
        assert methods == str(runs or "-")
        assert video == ("yes" if table[family]["capabilities"]["video"] == "yes" else "no")


@pytest.mark.parametrize("method", vlmprune.list_methods())
def test_show_says_what_a_method_is_and_its_example_parses(method):
    text, info = cli("show", method).stdout, json.loads(cli("show", method, "--json").stdout)
    assert info["example"] in text and info["positions"] in text and info["module"] in text
    assert re.search(rf"^ *slot +{info['slot']} *$", text, re.MULTILINE)
    for option in info["options"]:
        assert option["name"] in text
    if "..." not in info["example"]:
        assert str(vlmprune.parse(info["example"])) == info["example"]


# --- run ------------------------------------------------------------------------------------------


def test_run_needs_no_arguments():
    text = cli("run", "--max-new-tokens", 3).stdout
    sign = shapes().sample("test", "text", 0)
    assert f"tiny: {sign.question}" in text and f"the right answer is {sign.answers[0]}" in text
    assert "36 (25.0% of 144)" in text and "36 in layers 0-7" in text and "144 in layers 0-7" in text
    assert "dense" in text and "fastervlm@0.25" in text and "after a warm-up" in text
    assert NOTE not in " ".join(text.split())  # the picture is one that it knows


def test_run_without_arguments_answers_right():
    found = json.loads(cli("run", "--json").stdout)
    assert found["answer"].replace(" ", "") == found["dense_answer"].replace(" ", "") == found["expected"]


def test_about_a_picture_of_yours_tiny_says_that_it_knows_nothing(tmp_path):
    tiny.picture(1, (190, 100)).save(tmp_path / "scene.png")
    found = json.loads(
        cli("run", tmp_path / "scene.png", "--json", "--no-dense", "--max-new-tokens", 1).stdout
    )
    assert (
        found["note"] == NOTE and found["expected"] is None and found["question"] == "What is in the picture?"
    )


def test_run_as_json_holds_counts_times_and_answers():
    found = json.loads(cli("run", "--json", "--max-new-tokens", 3, "--prune", "uniform@12").stdout)
    assert found["visual_tokens"] == {"dense": [144], "pruned": [12]}
    assert found["sequence"]["dense"] - found["sequence"]["pruned"] == 132
    assert found["tokens_per_layer"] == [12.0] * 8
    assert all(1 <= tokens <= 3 for tokens in found["new_tokens"].values())
    for side in ("dense", "pruned"):
        assert 0 < found["seconds"][side]["first_token"] <= found["seconds"][side]["total"]
    assert 0 < found["seconds"]["pruned"]["choosing"] < found["seconds"]["pruned"]["first_token"]


def test_keeping_all_answers_as_the_dense_model():
    found = json.loads(cli("run", "--json", "--max-new-tokens", 8, "--prune", "fastervlm@1.0").stdout)
    assert found["answer"] == found["dense_answer"]
    assert found["visual_tokens"] == {"dense": [144], "pruned": [144]}


def test_without_dense_there_is_one_column():
    found = json.loads(cli("run", "--json", "--no-dense", "--max-new-tokens", 2, "--prune", "dense").stdout)
    assert found["dense_answer"] is found["seconds"]["dense"] is None
    assert found["visual_tokens"]["pruned"] == [144]


def test_run_takes_a_picture_a_question_and_a_folder(tmp_path):
    model, processor = tiny.tiny_bundle("llava_next")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    tiny.picture(1, (190, 100)).save(tmp_path / "scene.png")
    text = cli(
        "run",
        tmp_path / "scene.png",
        "How many [b]balls[/b]?",
        "--model",
        tmp_path / "model",
        "--max-new-tokens",
        2,
        "--no-dense",
        columns=200,
    ).stdout
    assert "How many [b]balls[/b]?" in text  # no markup
    assert NOTE not in text and "without a warm-up" in text


def test_draw_writes_the_picture_with_the_kept_patches(tmp_path):
    out = tmp_path / "kept.png"
    assert f"Wrote {out}" in cli("run", "--draw", out, "--max-new-tokens", 1, "--no-dense").stdout
    drawn, picture = Image.open(out).convert("RGB"), shapes().sample("test", "text", 0).load_images()[0]
    assert drawn.size == picture.size
    same = (np.asarray(drawn) == np.asarray(picture)).all(-1).mean()
    assert 0.2 < same < 0.26  # a quarter is kept, less the outline


def test_an_answer_cannot_control_the_terminal():
    from vlmprune.cli.screen import plain

    assert (
        plain("\x1b[31mred\x07 [bold]\n").plain
        == "\N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER} [bold]\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png"], "no file at 'none.png'"),
        (["What is it?"], "expected a picture, then the question"),
        ([__file__], "cannot be read as a picture"),
        ([os.path.dirname(__file__)], "cannot be read as a picture"),
        (["--prune", "fastervlm"], "has no budget"),
        (["--prune", "fasterlvm@9"], "Did you mean 'fastervlm'"),
        (["--prune", "fastervlm@0"], "keep=0 is no budget"),
        (["--draw", "kept.xyz"], "expected a picture file"),
        (["--draw", "no/such/folder/kept.png"], "does not exist; make it first"),
        (["--draw", "kept.png", "--prune", "dense"], "keeps every token"),
        (["--model", "./nowhere"], "does not exist"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--dtype", "half"], "dtype='half' is unknown"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_wrong_input_to_run_is_one_message_and_code_2(words, message):
    result = cli("run", *words, code=2)
    assert message in result.stderr and result.stdout == ""


def test_an_empty_or_broken_picture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False
    )  # libraries of other tests switch it on for the process
    (tmp_path / "empty.png").write_bytes(b"")
    tiny.picture().save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:2000])
    for name in ("empty.png", "half.png"):
        assert "cannot be read as a picture" in cli("run", tmp_path / name, code=2).stderr


# --- verify ---------------------------------------------------------------------------------------


@pytest.fixture
def results(monkeypatch):
    """Replace the checks by their results; returns what was asked for."""
    asked = {}

    def install(*rows):
        def run_checks(spec, families, on_result):
            asked.update(spec=spec, families=families)
            made = [CheckResult(*row, 0.5) for row in rows]
            for result in made:
                on_result(result)
            return made

        monkeypatch.setattr(conformance, "run_checks", run_checks)
        return asked

    return install


PASS, FAIL = ("identity", "llava", "pass", ""), ("order", "llava", "fail", "kept [3, 1], expected [1, 3]")
NOT_HERE = ("identity", "llava_onevision", "unsupported", "no [CLS]: use cls='mean'")


def test_verify_shows_checks_by_family(results):
    asked = results(PASS, NOT_HERE)
    text = cli("verify", "fastervlm").stdout
    assert asked == {"spec": "fastervlm@0.25", "families": None}
    assert re.search(r"identity +pass +n/a +1\.0", text)
    assert "llava_onevision, identity: no [CLS]: use cls='mean'" in text
    assert text.endswith("1 passed, 0 failed, 1 unsupported\n")


def test_verify_fails_with_code_1_and_the_details(results):
    results(PASS, FAIL)
    text = cli("verify", "fastervlm@9", code=1).stdout
    assert re.search(r"order +FAIL", text) and "llava, order: kept [3, 1], expected [1, 3]" in text


def test_one_reason_for_many_checks_is_said_once(results):
    results(NOT_HERE, ("order", *NOT_HERE[1:]))
    assert "llava_onevision, 2 checks: no [CLS]: use cls='mean'" in cli("verify", "fastervlm").stdout


def test_verify_as_json_keeps_the_exit_code(results):
    results(PASS, FAIL)
    found = json.loads(cli("verify", "fastervlm", "--json", code=1).stdout)
    assert found["failed"] == 1 and found["spec"] == "fastervlm@0.25"
    assert found["results"][1] == dict(
        zip(("check", "family", "status", "detail", "seconds"), (*FAIL, 0.5), strict=True)
    )


def test_nothing_verified_is_no_success(results):
    results()
    assert "no check ran" in cli("verify", "fastervlm", code=2).stderr


def test_verify_runs_the_real_checks_of_the_families_asked_for():
    found = json.loads(cli("verify", "uniform@9", "--family", "vipllava", "--json").stdout)
    assert {result["family"] for result in found["results"]} == {"vipllava"}
    assert {result["check"] for result in found["results"]} == set(conformance.all_checks())


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nope"], "method 'nope' is unknown"), (["pool@9", "-f", "lava"], "Did you mean 'llava'")],
)
def test_wrong_input_to_verify_is_code_2(words, message):
    assert message in cli("verify", *words, code=2).stderr


# --- validate -------------------------------------------------------------------------------------


def test_validate_prints_what_it_found():
    text = cli("validate", ROOT / "configs" / "quick.yaml").stdout
    assert "quick.yaml: valid" in text and "fastervlm@0.25" in text and "0, 1, 2" in text


def test_validate_checks_every_file(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("models: [tiny]\nspecs: [pool@4]\n")
    bad.write_text("models: [tiny]\nspec: [pool@4]\n")
    result = cli("validate", bad, tmp_path / "none.yaml", good, code=2)
    assert "good.yaml: valid" in result.stdout
    assert "bad.yaml: unknown key 'spec'" in result.stderr and "none.yaml: cannot be read" in result.stderr
    assert json.loads(cli("validate", good, "--json").stdout)[str(good)]["specs"] == ["pool@4"]


def test_validate_says_which_tasks_it_cannot_check_without_lmms_eval(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmprune.evaluation.tasks.lmms.loading.installed", lambda: False)
    config = tmp_path / "config.yaml"
    config.write_text('models: [tiny]\nspecs: [pool@4]\ntasks: [shapes, "lmms:nosuchtask"]\n')
    result = cli("validate", config, columns=200)
    assert "config.yaml: valid" in result.stdout
    assert "not checked whether lmms-eval has ['nosuchtask']" in result.stderr
