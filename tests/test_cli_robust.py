# SPDX-License-Identifier: Apache-2.0
"""The command line where things go wrong: odd terminals, full disks, narrow screens, and what people type."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import cli
from typer.testing import CliRunner

import vlmprune
from vlmprune.cli import app, bench
from vlmprune.cli.catalogue import quantity
from vlmprune.cli.screen import of_system
from vlmprune.errors import SpecError
from vlmprune.testing.tiny import picture, tiny_bundle

ROOT = Path(__file__).parents[1]
FULL = Path("/dev/full")  # a device on which every write fails


def process(code, *words, stdout=subprocess.PIPE, **environment):
    """Run code, or the command where there is none, in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "COLUMNS": "100"} | environment
    command = [sys.executable, "-c", code or "from vlmprune.cli import main; main()", *map(str, words)]
    return subprocess.run(
        command, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, encoding="latin-1"
    )


# --- output that cannot be written ----------------------------------------------------------------


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["show", "fastervlm"], ["list", "--json"], ["--version"], ["--help"]])
def test_a_full_disk_is_one_message(words):
    with FULL.open("w", encoding="utf-8") as full:
        done = process(None, *words, stdout=full)
    assert done.returncode == 2
    assert done.stderr == (
        "error: output cannot be written: No space left on device; make room, or choose another place\n"
    )


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_debug_shows_where_writing_failed():
    with FULL.open("w", encoding="utf-8") as full:
        done = process(None, "show", "fastervlm", "--debug", stdout=full)
    assert done.returncode != 0 and "Traceback" in done.stderr and "No space left" in done.stderr


def test_a_reader_that_goes_away_is_no_error():
    """As in ``vlmprune list --json | head -1``."""
    command = [sys.executable, "-c", "from vlmprune.cli import main; main()", "list", "--json"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        running.stdout.close()
        assert running.stderr.read() == "" and running.wait() == 1


def test_a_refusal_by_the_system_names_the_file():
    assert str(of_system(OSError(errno.EROFS, "Read-only file system", "a.csv"))) == (
        "output 'a.csv' cannot be written: Read-only file system; make room, or choose another place"
    )
    denied = str(of_system(PermissionError(errno.EACCES, "Permission denied", "a.csv")))
    assert denied == "Permission denied: 'a.csv'; --debug shows what was tried"
    assert str(of_system(OSError("the network is down"))) == "the network is down"


# --- terminals that are not UTF-8 -----------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_character_stops_a_table(encoding):
    code = (
        "from vlmprune.cli.screen import speak_plainly, stdout, stderr, table\n"
        "speak_plainly()\n"
        "made = table('a', 'b'); made.add_row('1\\u2013\\u2212\\u2191\\u2026', '\\u6f22\\udcff')\n"
        "stdout().print(made); stderr().print('\\u2192 \\u6f22')\n"
    )
    done = process(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    if encoding == "ascii":
        assert "1--^..." in done.stdout and "??" in done.stdout and done.stderr == "-> ?\n"
        assert done.stdout.isascii()


COMMANDS = [["list"], ["show", "holov"], ["run", "\u2212.png"], ["--help"]]


@pytest.mark.parametrize(
    ("encoding", "words"),
    [("ascii", words) for words in COMMANDS] + [("latin-1", COMMANDS[-1]), ("cp1252", COMMANDS[-1])],
)
def test_commands_speak_to_any_terminal(encoding, words):
    done = process(None, *words, PYTHONIOENCODING=encoding, LC_ALL="C.UTF-8")
    assert done.returncode == (2 if words[0] == "run" else 0) and "Traceback" not in done.stderr
    if words[0] == "run":
        assert "no file at '-.png'" in done.stderr


def test_a_stream_that_is_no_file_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    app(["show", "dense"], standalone_mode=False)
    assert "keeps" in sys.stdout.getvalue().lower() or "dense" in sys.stdout.getvalue()


# --- --debug --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--debug", "show", "nope"], ["show", "--debug", "nope"], ["show", "nope", "--debug"]]
)
def test_debug_is_taken_in_any_place(words):
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, SpecError)


def test_after_two_dashes_debug_is_a_word_like_any_other():
    assert "method '--debug' is unknown" in cli("show", "--", "--debug", code=2).stderr


# --- what people type -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    picture(1, (190, 100)).save(path)
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["https://a.org/b.png", "What?"], "'https://a.org/b.png' is a URL, and none is read"),
        (["PHOTO", ""], "the question is empty"),
        (["PHOTO", " \n"], "the question is empty"),
        (["PHOTO", "<image> What?"], "the question holds '<image>'; leave it out"),
        (["PHOTO", "What?", "--device", "gpu"], "expected cpu, cuda (any NVIDIA or AMD GPU), cuda:1 or mps"),
        (["--draw", "kept.png", "--prune", "fastervlm@1.0"], "keeps every token"),
    ],
)
def test_a_slip_is_one_line(photo, words, message):
    result = cli("run", *(photo if word == "PHOTO" else word for word in words), code=2)
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith("Loading weights")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0] and result.stdout == ""


def test_a_hostile_chat_template_is_one_line(tmp_path, photo):
    model, processor = tiny_bundle()
    processor.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    result = cli("run", photo, "What?", "--model", tmp_path / "model", code=2)
    assert "error: the chat template of the model fails (SecurityError: " in result.stderr


@pytest.mark.parametrize("name", ["same", "soft link", "hard link", "other way to it"])
def test_a_drawing_does_not_replace_the_picture_it_is_of(tmp_path, photo, name):
    own = tmp_path / "own.png"
    own.write_bytes(before := photo.read_bytes())
    out = own if name == "same" else tmp_path / "link.png"
    if name == "soft link":
        out.symlink_to(own)
    elif name == "hard link":
        out.hardlink_to(own)
    elif name == "other way to it":
        out = tmp_path / ".." / tmp_path.name / "own.png"
    result = cli("run", own, "What?", "--draw", out, code=2)
    assert f"--draw '{out}' is the file '{own}' itself, which would be overwritten" in result.stderr
    assert own.read_bytes() == before


def test_a_schedule_of_its_own_can_be_drawn_for_all_the_check_knows():
    from vlmprune.cli.drawing import check_draw

    assert check_draw(Path("kept.png"), None, vlmprune.parse("pyramiddrop")) is None


# --- narrow screens -------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 60, 72, 80, 90, 100, 160])
def test_the_list_of_methods_cuts_no_word(columns):
    text = cli("list", columns=columns).stdout
    assert max(map(len, text.splitlines())) <= columns
    words = set(text.replace(",", " ").split())
    infos = [vlmprune.method_info(name) for name in vlmprune.list_methods()]
    assert {info.name for info in infos} <= words and {info.paper for info in infos if info.paper} <= words
    if columns >= 72:
        assert {
            word for info in infos for word in info.doc.partition("\n")[0].split() if word.isalpha()
        } <= words
    if columns >= 160:
        assert {quantity(need) for info in infos for need in info.needs} <= words
        assert {option.name for info in infos for option in info.options} <= words
    assert ("vlmprune show METHOD" in " ".join(text.split())) == (columns < 160)


@pytest.mark.parametrize(("commit", "said"), [("abc1234", "commit abc1234"), (None, "vlmprune 0.9")])
def test_a_measurement_names_its_commit_or_where_there_is_none_its_version(commit, said, capsys):
    machine = {"processor": "2 x CPU", "load_before": None, "date": "2026-01-01"}
    bench._show_card([], {**machine, "commit": commit, "versions": {"vlmprune": "0.9"}}, {})
    assert f"2 x CPU, load not known at the start, {said}, 2026-01-01" in " ".join(
        capsys.readouterr().out.split()
    )


# --- plan -----------------------------------------------------------------------------------------

FOUND = {
    "model": "tiny",
    "spec": "fastervlm@9",
    "advice": "prune",
    "gain": 0.25,
    "dense_s": 2.0,
    "pruned_s": 1.5,
    "worth": 0.05,
    "threshold": 0.05,
    "device": "cpu",
    "dtype": "float32",
    "attention": "sdpa",
    "note": "",
    "case": {"visual_tokens": 144, "text_tokens": 60, "batch": 1, "answer_tokens": 32},
    "costs": {"choose": 0.002, "encode": 0.01},
    "check": {"answer_tokens": 16, "gain_foreseen": 0.3, "gain": 0.28, "error": 0.02},
    "ranges": {
        "visual_tokens": {"from": 90, "to": 16384, "limit": 16384},
        "text_tokens": {"from": 1, "to": 700, "limit": 8192},
        "answer_tokens": {"from": 1, "to": 4096, "limit": 4096},
        "batch": None,
    },
}


@pytest.fixture
def planned(monkeypatch):
    """Replace the measurements by a result; returns the specs that were asked for."""
    asked = []

    def install(**changes):
        def plan(workload, spec, **options):
            asked.append(spec)
            return FOUND | changes

        monkeypatch.setattr("vlmprune.speed.plan.plan", plan)
        monkeypatch.setattr("vlmprune.speed.workload.make_workload", lambda *args, **options: None)
        return asked

    return install


def test_a_plan_is_told_in_words(planned):
    planned()
    text = " ".join(cli("plan", "fastervlm@9", columns=80).stdout.split())
    assert "Prune with fastervlm@9: tiny, batch 1, 144 visual and 60 text tokens, 32 answer tokens" in text
    assert "Predicted: 1.5 s instead of 2 s, 25.0% saved. Prediction error: 2.0%" in text
    assert "Pruning is advised where more than 5.0% is saved (--worth)." in text
    assert "visual tokens from 90 on 144 text tokens up to 700 60" in text
    assert "answer tokens always (1 to 4096 looked at) 32 prompts at once never 1" in text


def test_a_plan_that_was_far_off_says_what_follows(planned):
    planned(advice="do not prune", gain=-0.1, threshold=0.4, check=FOUND["check"] | {"error": 0.4})
    text = " ".join(cli("plan", columns=80).stdout.split())
    assert "Do not prune: tiny" in text and "10.0% lost. Prediction error: 40.0%" in text
    assert "Pruning is advised where more than that is saved, here 40.0%." in text


@pytest.mark.parametrize(
    ("words", "spec"), [([], "fastervlm@0.125"), (["pool@9"], "pool@9"), (["--prune", "holov@9"], "holov@9")]
)
def test_plan_takes_the_spec_either_way(planned, words, spec):
    asked = planned()
    assert json.loads(cli("plan", *words, "--json").stdout)["spec"] == "fastervlm@9"
    assert asked == [spec]


@pytest.mark.parametrize("spec", ["dense", "var", "fastervlm@1.0", "var+pool@1.0"])
def test_there_is_no_plan_for_what_removes_nothing(spec):
    assert f"error: '{spec}' removes no token, so nothing could pay" in cli("plan", spec, code=2).stderr


def test_no_plan_is_made_for_what_removes_nothing():
    from vlmprune.speed.plan import plan

    with pytest.raises(SpecError, match="removes no token"):
        plan(None, "dense")


@pytest.mark.parametrize("words", [["pool@9", "--prune", "pool@4"], ["", "--prune", "pool@4"]])
def test_plan_takes_one_spec(words):
    assert "plan takes one spec" in cli("plan", *words, code=2).stderr


def test_the_shapes_of_the_help_are_those_that_there_are():
    from vlmprune.speed.shapes import SHAPES

    assert bench.SHAPES == tuple(SHAPES)
    for command in ("bench", "plan"):
        text = cli(command, "-h", columns=200).stdout
        assert all(shape in text for shape in SHAPES)


@pytest.mark.parametrize("command", ["plan", "bench"])
@pytest.mark.parametrize(
    ("words", "given"),
    [(["--text", 500], "--text 500"), (["--text", 9, "--scale", 4], "--text 9 and --scale 4")],
)
def test_options_of_shapes_are_refused_for_other_models(command, words, given):
    error = cli(command, "--model", "tiny", *words, code=2).stderr
    assert f"error: {given} for 'tiny': only shapes have these" in error and "llava-1.5-7b" in error


def test_counting_refuses_options_about_times():
    words = ("--prune", "random@9", "--scale", 4, "--rounds", 9)
    error = cli("bench", "--count", *words, code=2).stderr
    assert "error: --rounds, --scale given beside --count" in error
