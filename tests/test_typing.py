# SPDX-License-Identifier: Apache-2.0
"""A strict type checker accepts the README's blocks and a new method, and finds mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlmprune.cli.scaffold import scaffold

pytest.importorskip("mypy", reason="needs mypy, of the extra 'test'")
pytestmark = pytest.mark.slow  # all of torch is read, which takes minutes
ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
MISTAKES = "import vlmprune\n\nvlmprune.prun\nvlmprune.parse(1)\n"


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """What ``mypy --strict`` says of files that import the package as an editable install has it."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "path").mkdir()
    (folder / "path" / "vlmprune").symlink_to(ROOT / "vlmprune", target_is_directory=True)
    files = {f"block_{number}.py": block for number, block in enumerate(BLOCKS)} | {"mistakes.py": MISTAKES}
    scaffold("fresh", folder)
    files["vlmprune_fresh.py"] = (folder / "vlmprune_fresh.py").read_text(encoding="utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--no-error-summary",
        *files,
    ]
    environment = os.environ | {"MYPYPATH": str(folder / "path"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_the_blocks_of_the_readme_are_typed(complaints):
    # that functions of transformers are not typed is not ours
    of_blocks = [line for line in complaints if line.startswith("block_") and "[no-untyped-call]" not in line]
    assert of_blocks == []


def test_the_file_of_a_new_method_is_typed(complaints):
    assert [line for line in complaints if line.startswith("vlmprune_fresh")] == []


def test_a_mistake_of_a_user_is_found(complaints):
    found = [line for line in complaints if line.startswith("mistakes.py")]
    assert any('has no attribute "prun"' in line for line in found) and any(
        "arg-type" in line for line in found
    )
