# SPDX-License-Identifier: Apache-2.0
"""The folder of a leaderboard run, as it is read: what was asked, a journal per cell, and the results.

run.json           what the run is: format, version, command, config
cells/ID.json      recipe of one cell: everything that can change an answer; ID is its hash
cells/ID.jsonl     journal of the cell, one sample per line, append-only; each line ends with a checksum
results.json       rows computed from the journals, and the config that they answer
speed.json         what ``vlmprune bench --out`` measured; optional
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from ...errors import EvaluationError
from ..answer.record import Record

FORMAT = 2  # 1 had no checksums
# the end of {"id": "a", ..., "sum": "0123456789abcdef"}
_TAIL = re.compile(rb', "sum": "([0-9a-f]{16})"\}')
_TAIL_LENGTH = 28  # of what _TAIL matches
_SAME = "run the same leaderboard command again, which writes it anew"
# what to do about a file that is broken; a recipe is mended as results are
_REMEDIES = {
    "run.json": _SAME + ", or `vlmprune leaderboard --repair --out {folder}`",
    "speed.json": "measure it again with `vlmprune bench --out {folder}`, or delete it",
}
# what a sample must have: fields of a Record without a default
_FIELDS = [f.name for f in fields(Record) if f.default is MISSING and f.default_factory is MISSING]


def cell_id(recipe: Mapping[str, Any]) -> str:
    """16 hex digits of everything that can change an answer of the cell."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # names of files can hold bytes that are no UTF-8
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def encode_line(cell: str, values: Mapping[str, Any]) -> bytes:
    """One line of the journal of ``cell``: values as JSON, and a checksum of their text and the cell."""
    text = json.dumps(values).encode()
    # the checksum becomes the last key of the object
    return text[:-1] + f', "sum": "{_checksum(cell, text)}"}}\n'.encode()


def _checksum(cell: str, text: bytes) -> str:
    # with the cell, so that a journal under the name of another cell is found as well
    return hashlib.sha256(cell.encode() + b"\n" + text).hexdigest()[:16]


@dataclass(frozen=True)
class Flaw:
    """A journal line that fails validation, counted from 1, and why."""

    number: int
    reason: str


def decode_lines(cell: str, data: bytes) -> tuple[list[dict[str, Any]], list[Flaw]]:
    """Samples and flaws of a journal. An incomplete last line of an interrupted run is not a flaw."""
    flaws: list[Flaw] = []
    known: dict[str, dict[str, Any]] = {}  # by id, in the order of the lines
    # behind the last line end there is nothing, or an incomplete line
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        # "\r" of an editor that writes line ends as Windows does
        found = _decode_line(cell, line.removesuffix(b"\r"))
        if isinstance(found, str):
            flaws.append(Flaw(number, found))
        elif found["id"] not in known:
            known[found["id"]] = found
        # the very same answer again is no flaw, and is one answer; another one is
        elif known[found["id"]] != found:
            what = f"answers sample {found['id']!r} once more, and otherwise than a line before it"
            flaws.append(Flaw(number, what))
    return list(known.values()), flaws


def _decode_line(cell: str, line: bytes) -> dict[str, Any] | str:
    """The sample of a line, or why there is none. The bytes are compared: no change of them is overlooked."""
    tail = _TAIL.fullmatch(line, max(0, len(line) - _TAIL_LENGTH))
    if tail is None:
        return "has no checksum: it was changed, or written by a version that made none"
    # the bytes that were summed: JSON that is read and written again need not be the same ones
    text = line[: tail.start()] + b"}"
    if tail[1].decode() != _checksum(cell, text):
        return "does not match its checksum: it was changed after it was written, or belongs to another cell"
    try:
        sample = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({type(error).__name__}: {error})"
    missing = [name for name in _FIELDS if name not in sample]
    if missing or not isinstance(sample["id"], str):
        return f"is no sample: it lacks {missing}" if missing else f"is no sample: its id is {sample['id']!r}"
    return sample


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
            todo = "expected a run folder, as `vlmprune leaderboard --out DIR` writes"
            if any(path.glob("cells/*.json*")):
                todo = f"its cells are there: {_REMEDIES['run.json'].format(folder=path)}"
            raise EvaluationError(f"{str(folder)!r} {state}; {todo}")
        run = cls(path)
        for name, content in (("run.json", run.info), ("results.json", run.results)):
            found = content.get("format")
            if not isinstance(found, int):
                todo = _REMEDIES.get(name, _SAME).format(folder=path)
                raise EvaluationError(f"{path / name} has the format {found!r}, and so is damaged; {todo}")
            if found != FORMAT:
                made = run.info.get("version", "an unknown version")
                raise EvaluationError(
                    f"{path / name} has format {found!r}, written by vlmprune {made}; this version reads "
                    f"format {FORMAT}: use the version that wrote it, or run the leaderboard again into a "
                    "new folder"
                )
        return run

    def files(self) -> list[Path]:
        """Those that are there of the run itself; reports of it are not among them."""
        named = [self.folder / name for name in ("run.json", "results.json", "speed.json")]
        cells = [
            path for ending in ("*.json", "*.jsonl") for path in sorted((self.folder / "cells").glob(ending))
        ]
        return [path for path in named if path.is_file()] + cells

    @cached_property
    def info(self) -> dict[str, Any]:
        return read_object(self.folder / "run.json")

    @cached_property
    def results(self) -> dict[str, Any]:
        return read_object(self.folder / "results.json")

    def recipe(self, cell: str) -> dict[str, Any]:
        """What was asked of a cell; one without the hash by which the cell is called is refused."""
        path = self.folder / "cells" / f"{cell}.json"
        recipe = read_object(path)
        if cell_id(recipe) != cell:
            raise EvaluationError(
                f"{path} has the fingerprint {cell_id(recipe)}: it was edited, or is damaged; {_SAME}"
            )
        return recipe

    def journal(self, cell: str) -> list[dict[str, Any]]:
        """Samples of one cell. An incomplete last line of an interrupted run is skipped."""
        path = self.folder / "cells" / f"{cell}.jsonl"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise EvaluationError(f"{path} cannot be read ({error}); {_SAME}") from error
        samples, flaws = decode_lines(cell, data)
        if flaws:
            more = f" (and {len(flaws) - 1} more lines)" if len(flaws) > 1 else ""
            raise EvaluationError(
                f"{path}: line {flaws[0].number} {flaws[0].reason}{more}; `vlmprune leaderboard --repair "
                f"--out {self.folder}` sets it aside, and the next run asks again"
            )
        return samples


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a run; errors name the file."""
    todo = _REMEDIES.get(path.name, _SAME).format(folder=path.parent)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); {todo}") from error
    if not isinstance(value, dict):
        raise EvaluationError(f"{path} holds a {type(value).__name__}; expected an object; {todo}")
    return value
