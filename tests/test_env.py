# SPDX-License-Identifier: Apache-2.0
"""``vlmprune env``, the one logger, shell completion, and what other systems do not have."""

from __future__ import annotations

import ast
import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import cli

import vlmprune
from vlmprune.cli import env as env_module
from vlmprune.cli.env import attention, environment, extras
from vlmprune.registry import list_methods
from vlmprune.speed.conditions import system_load

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlmprune"


# --- vlmprune env ---------------------------------------------------------------------------------


def test_env_says_what_a_report_needs():
    found = json.loads(cli("env", "--json").stdout)
    assert found["vlmprune"]["version"] == vlmprune.__version__
    assert found["vlmprune"]["methods"] == len(list_methods())
    assert found["packages"]["torch"] and found["packages"]["transformers"]
    assert found["system"]["python"].startswith(platform.python_version())
    assert found["attention"].keys() == {"eager", "sdpa", "flash_attention_2", "flex_attention"}
    assert found["devices"]["cuda"] == "no" or torch.cuda.is_available()


def test_env_in_words_has_the_same_facts():
    text, found = cli("env").stdout, json.loads(cli("env", "--json").stdout)
    for topic, facts in found.items():
        assert topic in text
        for name in facts:
            assert name in text
    assert found["packages"]["torch"] in text


def test_env_names_no_path_user_or_host(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("VLMPRUNE", "fastervlm@64")
    text = json.dumps(environment())
    assert "fastervlm@64" in text and "secret" not in text
    assert str(tmp_path) not in text and str(ROOT) not in text and str(Path.home()) + "/" not in text
    assert socket.gethostname() not in text.replace(platform.platform(), "")


def metadata_of(monkeypatch, requires, installed):
    """The package as if it had these requirements, on a machine that has these distributions."""

    class Facts:
        def get_all(self, name):
            return sorted(set(re.findall(r'extra == "(\w+)"', "\n".join(requires))))

    monkeypatch.setattr(env_module.metadata, "requires", lambda name: requires)
    monkeypatch.setattr(env_module.metadata, "metadata", lambda name: Facts())
    monkeypatch.setattr(env_module, "version", installed.get)


def test_an_extra_is_installed_only_with_all_of_its_requirements(monkeypatch):
    requires = [
        "torch>=2.6",
        'ray; extra == "cluster"',
        'lmms-eval<0.8,>=0.7.3; extra == "eval"',
        'jinja2; extra == "eval"',
        'vlmprune[cluster,eval]; extra == "all"',
    ]
    metadata_of(monkeypatch, requires, {"ray": "2.0", "jinja2": "3.1", "lmms-eval": "0.8.1"})
    found = extras()
    assert found["cluster"] == "installed"
    assert found["eval"].startswith("not installed: lmms-eval") and "jinja2" not in found["eval"]
    assert "all" not in found and "torch" not in str(found)


def test_flash_attention_needs_its_package_and_a_device(monkeypatch):
    monkeypatch.setattr(env_module, "find_spec", lambda name: None if name == "flash_attn" else object())
    assert attention()["flash_attention_2"] == "no: flash-attn is not installed"
    monkeypatch.setattr(env_module, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention()["flash_attention_2"] == "no: there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention()["flash_attention_2"] == "yes"


def test_a_load_is_said_to_two_digits(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (5.662109375, 0.0, 0.0), raising=False)
    assert system_load() == 5.66


def test_a_system_that_counts_no_load_is_said_to(monkeypatch):
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert system_load() is None
    assert "not known" in cli("env").stdout


# --- the log --------------------------------------------------------------------------------------


def test_every_logger_is_below_that_of_the_package():
    names = [
        (path.name, ast.unparse(node.args[0]) if node.args else "")
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getLogger", "logging.getLogger")
    ]
    assert len(names) >= 3
    assert [name for name in names if name[1] not in ("__name__", "'vlmprune'")] == []


def test_the_log_says_what_is_made_ready(caplog):
    model, _ = vlmprune.load("tiny")
    with caplog.at_level(logging.DEBUG, logger="vlmprune"), vlmprune.prune(model, "uniform@9"):
        pass
    assert "'uniform@9' for LlavaForConditionalGeneration by the adapter of llava" in caplog.text


def test_debug_shows_the_log_and_puts_it_back():
    log = logging.getLogger("vlmprune")
    before = (log.level, list(log.handlers))
    words = ("run", "--prune", "uniform@9", "--no-dense")
    assert "by the adapter of llava" in cli("--debug", *words).stderr
    assert (log.level, list(log.handlers)) == before
    assert "by the adapter of llava" not in cli(*words).stderr


# --- shell completion, and other systems ----------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "offered"), [("vlmprune le", "leaderboard"), ("vlmprune env --js", "--json")]
)
def test_a_shell_completes_commands_and_options(typed, offered):
    words = typed.split()
    asked = {"_VLMPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"} | asked
    command = [sys.executable, "-c", "from vlmprune.cli import main; main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [offered], done.stderr


def guarded(source):
    """Lines that use what only some systems have, without asking first."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        text = ast.unparse(node)
        if "getloadavg()" in text and "hasattr(os, 'getloadavg')" not in text:
            yield node.name
        if re.search(r"'/proc/", text) and ".exists()" not in text:
            yield node.name


@pytest.mark.parametrize("folder", ["vlmprune", "benchmarks"])
def test_what_only_some_systems_have_is_asked_for_first(folder):
    found = [
        f"{path.name}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in guarded(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_use_without_asking_is_found():
    assert list(guarded("def f():\n    return os.getloadavg()\n")) == ["f"]
    assert list(guarded("def g():\n    return Path('/proc/cpuinfo').read_text()\n")) == ["g"]
    assert (
        list(guarded("def h():\n    return os.getloadavg() if hasattr(os, 'getloadavg') else None\n")) == []
    )
