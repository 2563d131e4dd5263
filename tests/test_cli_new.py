# SPDX-License-Identifier: Apache-2.0
"""``vlmprune new``: what it writes works as it is, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.cli.scaffold import scaffold
from vlmprune.cli.scaffold_family import scaffold_family

ROOT = Path(__file__).parents[1]


def cli(*words, code=0, columns=100):
    """Run a command in this process; plain text, as in a pipe."""
    result = CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1"}).invoke(
        app, [str(word) for word in words]
    )
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def process(*words, cwd=None, path=()):
    """Run a command in a process of its own."""
    places = os.pathsep.join(map(str, (*path, ROOT)))
    env = os.environ | {"PYTHONPATH": places, "PYTHONSAFEPATH": "1", "COLUMNS": "100"}
    command = [sys.executable, "-c", "from vlmprune.cli import main; main()", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def installed(folder, name, group="vlmprune.methods"):
    """What pip would add for the plug-in: its entry point."""
    project = (folder / "pyproject.toml").read_text()
    target = re.search(rf'\[project.entry-points."{group}"\]\n{name} = "(.+)"', project)[1]
    info = folder / f"vlmprune_{name}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vlmprune-{name}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")


@pytest.mark.slow
def test_a_new_plug_in_is_found_listed_and_verified(tmp_path):
    text = cli("new", "fresh", "--dir", tmp_path, columns=200).stdout
    assert "pip install" in text and "vlmprune verify fresh" in text
    installed(tmp_path, "fresh")
    listed = process("list", cwd=tmp_path, path=[tmp_path])
    assert "fresh (plug-in)" in listed.stdout
    verified = process("verify", "fresh", "-f", "llava", "--json", cwd=tmp_path, path=[tmp_path])
    assert verified.returncode == 0, verified.stdout + verified.stderr
    found = json.loads(verified.stdout)  # some versions of transformers cannot do all that is checked
    assert found["failed"] == 0 and "pass" in {result["status"] for result in found["results"]}


@pytest.mark.slow
def test_the_test_of_a_new_plug_in_passes(tmp_path):
    scaffold("fresh", tmp_path)
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "test_fresh.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


def test_a_plug_in_that_does_not_load_is_named_and_hides_nothing(tmp_path):
    scaffold("fresh", tmp_path)
    installed(tmp_path, "fresh")
    (tmp_path / "vlmprune_fresh.py").write_text("import no_such_module\n")
    listed = process("list", cwd=tmp_path, path=[tmp_path])
    assert listed.returncode == 0 and "fastervlm" in listed.stdout
    assert "its entry point 'vlmprune_fresh:Fresh' does not load" in listed.stderr


def checkout(folder):
    """As much of one as ``vlmprune new`` looks at."""
    (folder / "vlmprune" / "methods").mkdir(parents=True)
    shutil.copy(ROOT / "vlmprune" / "registry.py", folder / "vlmprune")
    return folder


def test_a_new_built_in_method_goes_where_the_others_are_and_is_listed(tmp_path):
    made = scaffold("two_words", checkout(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in made.files] == [
        "vlmprune/methods/two_words.py",
        "tests/methods/test_two_words.py",
        "methods/two_words.md",
        "methods/two_words.yaml",
    ]
    assert made.changed == (tmp_path / "vlmprune" / "registry.py",)
    # what other tests of the repository ask of a new method
    commands = [step.partition("  (")[0] for step in made.steps]
    assert "python docs/readme_tables.py" in commands
    assert "python docs/capabilities.py --method two_words" in commands
    assert "vlmprune bench --count --out kernels/device_counts.csv" in commands
    before = (ROOT / "vlmprune" / "registry.py").read_text().splitlines()
    after = made.changed[0].read_text().splitlines()
    line = '    "two_words": "vlmprune.methods.two_words:TwoWords",'
    at = after.index(line)
    assert after[:at] + after[at + 1 :] == before
    assert after[at - 1].startswith('    "') and after[at + 1] == "}"


def test_a_checkout_without_its_list_of_methods_is_refused_and_left_alone(tmp_path):
    registry = checkout(tmp_path) / "vlmprune" / "registry.py"
    registry.write_text("METHODS = []\n")
    assert "no table _BUILTIN" in cli("new", "fresh", "--dir", tmp_path, code=2, columns=300).stderr
    assert registry.read_text() == "METHODS = []\n" and not any((tmp_path / "vlmprune/methods").iterdir())


@pytest.mark.slow
def test_a_new_built_in_method_is_verified_at_once(tmp_path):
    shutil.copytree(ROOT / "vlmprune", tmp_path / "vlmprune", ignore=shutil.ignore_patterns("__pycache__"))
    scaffold("two_words", tmp_path)
    done = process("verify", "two_words", "-f", "llava", "--json", cwd=tmp_path, path=[tmp_path])
    assert done.returncode == 0 and json.loads(done.stdout)["failed"] == 0, done.stderr


@pytest.mark.parametrize("inside", [True, False])
def test_new_files_keep_the_rules_of_style(tmp_path, inside):
    ruff = pytest.importorskip("ruff", reason="ruff is not installed").find_ruff_bin()
    if inside:  # what is imported must be there to be sorted as ours
        checkout(tmp_path)
        for name in ("vlmprune/methods/__init__.py", "vlmprune/testing/conformance.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    scaffold("two_words", tmp_path)
    command = [ruff, "check", "--no-cache", "--config", ROOT / "pyproject.toml", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_project_that_is_there_keeps_its_file_and_gets_a_snippet(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    text = cli("new", "fresh", "--dir", tmp_path).stdout
    assert '[project.entry-points."vlmprune.methods"]' in text and 'fresh = "vlmprune_fresh:Fresh"' in text
    assert (tmp_path / "pyproject.toml").read_text() == "[project]\n"


def test_new_overwrites_nothing_and_then_writes_nothing(tmp_path):
    (tmp_path / "fresh.md").write_text("precious")
    assert "exist already" in cli("new", "fresh", "--dir", tmp_path, code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["fresh.md"] and (
        tmp_path / "fresh.md"
    ).read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Fresh", "no name for a method"),
        ("my-method", "no name"),
        ("9th", "no name"),
        ("", "no name"),
        ("pool", "exists already"),
        ("class", "would make a class"),
        ("none", "would make a class"),
        ("visual_tokens", "would make a class"),
    ],
)
def test_new_refuses_bad_names(name, message, tmp_path):
    assert message in cli("new", "--dir", tmp_path, "--", name, code=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_new_needs_a_folder(tmp_path):
    assert "no folder at" in cli("new", "fresh", "--dir", tmp_path / "none" / "in it", code=2).stderr
    (tmp_path / "text").write_text("")
    assert "is a file" in cli("new", "fresh", "--dir", tmp_path / "text", code=2).stderr


# --- families -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_family_passes_its_test_and_verify_also_where_it_is_installed(tmp_path):
    text = cli("new", "fresh_vlm", "--family", "--dir", tmp_path, columns=200).stdout
    steps = [line.partition(". ")[2] for line in text.splitlines() if re.match(r"\d\. ", line)]
    assert steps[0] == f"pip install pytest -e {tmp_path}"
    assert steps[3] == f"pytest {tmp_path / 'test_fresh_vlm.py'}"
    installed(tmp_path, "fresh_vlm", "vlmprune.models")
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "test_fresh_vlm.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    words = steps[4].split()[1:]
    verified = process(*words, "--json", cwd=tmp_path, path=[tmp_path])
    assert verified.returncode == 0, verified.stdout + verified.stderr
    found = json.loads(verified.stdout)
    assert {one["family"] for one in found["results"]} == {"fresh_vlm"} and found["failed"] == 0


def test_a_new_family_is_a_plug_in_that_offers_its_adapter(tmp_path):
    made = scaffold_family("fresh_vlm", tmp_path)
    assert [path.name for path in made.files] == [
        "vlmprune_fresh_vlm.py",
        "vlmprune_fresh_vlm_tiny.py",
        "test_fresh_vlm.py",
        "pyproject.toml",
    ]
    project = made.files[-1].read_text()
    assert 'fresh_vlm = "vlmprune_fresh_vlm:Adapter"' in project
    assert 'py-modules = ["vlmprune_fresh_vlm", "vlmprune_fresh_vlm_tiny"]' in project
    assert "exist already" in cli("new", "fresh_vlm", "--family", "--dir", tmp_path, code=2).stderr


@pytest.mark.parametrize(
    ("name", "message"), [("My-VLM", "no model type for a plug-in"), ("llava", "has an adapter already")]
)
def test_a_new_family_needs_a_model_type_that_nobody_has(name, message, tmp_path):
    assert message in cli("new", name, "--family", "--dir", tmp_path, code=2, columns=300).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_family_in_a_checkout_is_written_by_hand(tmp_path):
    (tmp_path / "vlmprune" / "models").mkdir(parents=True)
    stderr = cli("new", "fresh_vlm", "--family", "--dir", tmp_path, code=2, columns=300).stderr
    assert "is a checkout of vlmprune" in stderr and not (tmp_path / "pyproject.toml").exists()


def test_new_files_of_a_family_keep_the_rules_of_style(tmp_path):
    ruff = pytest.importorskip("ruff", reason="ruff is not installed").find_ruff_bin()
    scaffold_family("two_words", tmp_path)
    command = [ruff, "check", "--no-cache", "--config", ROOT / "pyproject.toml", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("words", [[], ["--family"]])
def test_a_folder_that_is_not_there_is_made(words, tmp_path):
    folder = tmp_path / "my plugin"
    said = cli("new", "fresh", *words, "--dir", folder).stdout
    assert (folder / "pyproject.toml").is_file()
    # as they can be typed where the command was
    assert f"pip install pytest -e '{folder}'" in said and f"pytest '{folder / 'test_fresh.py'}'" in said
