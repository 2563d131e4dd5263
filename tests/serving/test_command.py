# SPDX-License-Identifier: Apache-2.0
"""``vlmprune serve``: the command that it runs."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.models import tiny
from vlmprune.models.tiny import BUNDLED


def shown(*options: str) -> list[str]:
    done = CliRunner().invoke(app, ["serve", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return shlex.split(done.output)


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_a_bundled_model_is_served_by_its_name(name):
    line = shown(name, "--prune", "fastervlm@36", "--show")
    assert line[0] == "VLMPRUNE=fastervlm@36"
    assert line[line.index("--model") + 1] == str(BUNDLED[name])
    assert line[line.index("--served-model-name") + 1] == name


def test_a_bundled_model_asks_for_little_memory_on_a_cpu(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert "VLLM_CPU_KVCACHE_SPACE=1" in shown("tiny", "--show")
    assert "VLLM_CPU_KVCACHE_SPACE" not in " ".join(shown("some/model", "--show"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert "VLLM_CPU_KVCACHE_SPACE" not in " ".join(shown("tiny", "--show"))


def test_another_name_is_given_to_vllm_as_it_is_and_options_follow():
    line = shown("some/model", "--per-request", "--show", "--", "--port", "8001")
    assert line[line.index("--model") + 1] == "some/model" and "--served-model-name" not in line
    assert line[line.index("--port") + 1] == "8001" and "--trust-request-mm-kwargs" in line
    assert line[0] == "VLMPRUNE=dense"


def test_a_shell_takes_the_line_that_is_shown():
    done = CliRunner().invoke(app, ["serve", "tiny", "--prune", "fastervlm(cls=mean)@36", "--show"])
    assert subprocess.run(["bash", "-n", "-c", done.output]).returncode == 0
    assert shlex.split(done.output)[0] == "VLMPRUNE=fastervlm(cls=mean)@36"


@pytest.mark.parametrize("option", [["--served-model-name", "mine"], ["--served-model-name=mine"]])
def test_a_name_of_ones_own_is_kept(option):
    assert "tiny" not in shown("tiny", "--show", "--", *option)


def test_a_damaged_bundled_model_is_not_served(monkeypatch, tmp_path):
    monkeypatch.setitem(tiny.BUNDLED, "tiny", tmp_path)
    done = CliRunner().invoke(app, ["serve", "tiny", "--show"])
    assert done.exit_code == 2 and "SHA256SUMS" in done.stderr
