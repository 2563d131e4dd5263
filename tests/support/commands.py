# SPDX-License-Identifier: Apache-2.0
"""The command line as users have it, in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner, Result

from vlmprune.cli import app

ROOT = Path(__file__).parents[2]


def cli(*words: object, code: int = 0, columns: int = 100) -> Result:
    """Run a command in this process; plain text, as in a pipe."""
    result = CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1"}).invoke(
        app, [str(word) for word in words]
    )
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def process(
    *words: object, cwd: Path | None = None, path: Sequence[object] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, which also finds what lies in the folders of ``path``."""
    places = os.pathsep.join(map(str, (*path, ROOT)))
    env = os.environ | {"PYTHONPATH": places, "PYTHONSAFEPATH": "1", "COLUMNS": "100"}
    command = [sys.executable, "-c", "from vlmprune.cli import main; main()", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
