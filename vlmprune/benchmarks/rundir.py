# SPDX-License-Identifier: Apache-2.0
"""The folder of a leaderboard run, as it is read: what was asked for, one journal per cell, and the results computed from them.

run.json           what the run is: format, version, command, config
cells/ID.json      recipe of one cell: everything that can change an answer; ID is its hash
cells/ID.jsonl     journal of the cell, one sample per line, append-only
results.json       rows computed from the journals
speed.json         what ``vlmprune bench --out`` measured; optional
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import EvaluationError

FORMAT = 1


def cell_id(recipe: Mapping[str, Any]) -> str:
    """16 hex digits of everything that can change an answer of the cell."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """A run folder; files are read when they are first asked for."""

    folder: Path

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> Run:
        """A run of this format; anything else is refused."""
        path = Path(folder)
        if not (path / "run.json").is_file():
            state = "holds no run.json" if path.is_dir() else "is no folder"
            raise EvaluationError(f"{str(folder)!r} {state}; expected a run folder, as `vlmprune leaderboard --out DIR` writes")
        run = cls(path)
        for name, content in (("run.json", run.info), ("results.json", run.results)):
            found = content.get("format")
            if found != FORMAT:
                made = run.info.get("version", "an unknown version")
                raise EvaluationError(
                    f"{path / name} has format {found!r}, written by vlmprune {made}; this version reads format {FORMAT}: "
                    "use the version that wrote it, or run the leaderboard again into a new folder"
                )
        return run

    @cached_property
    def info(self) -> dict[str, Any]:
        return read_object(self.folder / "run.json")

    @cached_property
    def results(self) -> dict[str, Any]:
        return read_object(self.folder / "results.json")

    def recipe(self, cell: str) -> dict[str, Any]:
        return read_object(self.folder / "cells" / f"{cell}.json")

    def journal(self, cell: str) -> list[dict[str, Any]]:
        """Samples of one cell; a last line that was torn by a kill is passed over, any other broken line is an error."""
        path = self.folder / "cells" / f"{cell}.jsonl"
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise EvaluationError(f"{path} cannot be read ({error}); run the leaderboard again, it resumes") from error
        samples = []
        for number, line in enumerate(lines[:-1], 1):  # what follows the last line end is torn, or nothing
            try:
                samples.append(json.loads(line))
            except ValueError as error:
                raise EvaluationError(f"{path}: line {number} is no JSON ({error}); restore the file or delete it") from error
        return samples


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; errors name the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); run the leaderboard again, it resumes") from error
    if not isinstance(value, dict):
        raise EvaluationError(f"{path} holds a {type(value).__name__}; expected an object")
    return value
