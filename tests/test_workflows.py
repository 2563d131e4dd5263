# SPDX-License-Identifier: Apache-2.0
"""What a code host reads, and nobody can run here: workflows, forms, the citation."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"


def check(schema: str, *files: Path) -> Result:
    """Files by a schema that the tool brings: nothing is downloaded."""
    main = pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed").main
    return CliRunner().invoke(main, ["--builtin-schema", f"vendor.{schema}", *map(str, files)])


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", [FORMS / "bug.yml", FORMS / "method.yml"]),
        ("github-issue-config", [FORMS / "config.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_are_what_their_readers_expect(schema: str, files: list[Path]) -> None:
    found = check(schema, *files)
    assert files and found.exit_code == 0, found.output


def test_a_slip_in_a_workflow_is_found(tmp_path: Path) -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "runs-on:" in text
    (tmp_path / "ci.yml").write_text(text.replace("runs-on:", "run-on:"), encoding="utf-8")
    assert check("github-workflows", tmp_path / "ci.yml").exit_code == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_only_what_is_there(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"], "without it every step may write to the repository"
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 180, f"{name} could hang for six hours"
        before = [job["needs"]] if "needs" in job else []
        assert set(before) <= set(workflow["jobs"])
        commands = [step["run"] for step in job["steps"] if "run" in step]
        for script in re.findall(r"(?<![\w/])(?:\.ci/|docs/)\w+(?:\.py)?", "\n".join(commands)):
            assert (ROOT / script).is_file(), f"{name} runs {script}"
            assert script.startswith("docs/") or os.access(ROOT / script, os.X_OK), f"{script} cannot be run"
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.search(r"@(release/)?v\d+$", action) for action in actions), actions
        given = [artifact(step) for one in before for step in workflow["jobs"][one]["steps"]]
        wanted = [artifact(step) for step in job["steps"] if "download-artifact" in step.get("uses", "")]
        assert set(wanted) <= set(given)


def deploy(venv: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``.ci/site`` with tools that only say how they were called."""
    (venv / "bin").mkdir(exist_ok=True)
    for name, line in {
        "python": "true",
        "mkdocs": "true",
        "mike": 'echo "mike $*"; command -v mkdocs',
    }.items():
        (venv / "bin" / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (venv / "bin" / name).chmod(0o755)
    environment = os.environ | {"SITE_VENV": str(venv)}
    return subprocess.run(
        [ROOT / ".ci" / "site", *words], capture_output=True, text=True, check=False, env=environment
    )


def test_a_site_is_deployed_by_a_tool_that_finds_the_other_one(tmp_path: Path) -> None:
    of_tag = deploy(tmp_path, "deploy", "0.1.0", "latest")
    found = f"{tmp_path}/bin/mkdocs"  # mike starts it by its name
    said = [
        "mike deploy --push --update-aliases 0.1.0 latest",
        found,
        "mike set-default --push latest",
        found,
    ]
    assert of_tag.returncode == 0 and of_tag.stdout.splitlines()[1:] == said
    of_main = deploy(tmp_path, "deploy", "dev")
    assert of_main.stdout.splitlines()[1:] == ["mike deploy --push --update-aliases dev", found]
    assert deploy(tmp_path, "deploy").returncode == 2 and deploy(tmp_path, "publish", "dev").returncode == 2


def artifact(step: Any) -> str | None:
    """The name of what a step hands on or takes over."""
    return step["with"]["name"] if "artifact@" in step.get("uses", "") else None
