# SPDX-License-Identifier: Apache-2.0
"""The writing side of a run folder: the lock, the journals that only grow, and files that are replaced whole.

What is on disk is always either a whole line or a torn last one, which the next writer cuts off. Nothing is ever written twice:
a line goes to the journal only if its sample is not there.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...errors import EvaluationError
from ..rundir import FORMAT, Run, cell_id, read_object


class Journal:
    """The answers of one cell; open it only under the lock of its run."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        self.cell = cell_id(recipe)
        self.path = folder / "cells" / f"{self.cell}.jsonl"
        recipe_path = self.path.with_suffix(".json")
        if not recipe_path.is_file():
            replace_json(recipe_path, recipe)
        self._mend()
        self.ids = {line["id"] for line in Run(folder).journal(self.cell)}

    def _mend(self) -> None:
        """Cut off a last line that was torn by a kill."""
        with _told(self.path), self.path.open("a+b") as file:
            end = whole = file.seek(0, os.SEEK_END)
            while whole:
                start = max(0, whole - 4096)
                file.seek(start)
                at = file.read(whole - start).rfind(b"\n")
                if at >= 0:
                    whole = start + at + 1
                    break
                whole = start
            if whole < end:
                file.truncate(whole)

    def append(self, lines: Iterable[Mapping[str, Any]]) -> int:
        """Write the lines of samples that are not there yet, in one go; returns how many."""
        new = {line["id"]: line for line in lines if line["id"] not in self.ids}
        data = b"".join(json.dumps(line).encode() + b"\n" for line in new.values())
        if data:
            with _told(self.path), self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    _write(file, data)
                except BaseException:
                    file.truncate(before)  # a disk that is full still lets a file shrink
                    raise
            self.ids |= set(new)
        return len(new)


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]  # a full disk may take a part
    os.fsync(file.fileno())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run alone. The system frees the lock of a process that died; a second process is told who holds it."""
    with _told(folder):
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / ".lock"), folder / ".holder.json"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = read_object(holder) if holder.is_file() else {}
        raise EvaluationError(
            f"{folder} is in use by process {who.get('pid', '?')} on {who.get('host', '?')}; wait until it ends, stop it, or "
            "choose another folder with --out"
        ) from error
    try:
        for left in folder.glob("**/*.new"):  # of a writer that was killed
            left.unlink(missing_ok=True)
        replace_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        lock.release()


def refuse_other_format(folder: Path) -> None:
    """Raise where a folder holds a run of another format, or something else altogether."""
    path = folder / "run.json"
    if path.is_file():
        info = read_object(path)
        if info.get("format") != FORMAT:
            raise EvaluationError(
                f"{folder} holds a run of format {info.get('format')!r}, written by vlmprune {info.get('version', '?')}; "
                f"this version writes format {FORMAT}: go on with the version that began it, or choose another folder with --out"
            )
    elif folder.exists() and not folder.is_dir():
        raise EvaluationError(f"{folder} is a file; expected a folder for the run, or a new name, with --out")
    elif folder.is_dir() and not all(_is_ours(entry.name) for entry in folder.iterdir()):
        raise EvaluationError(f"{folder} is not empty and holds no run; choose a new folder with --out")


def _is_ours(name: str) -> bool:
    """What may be there before run.json is: a run that was killed at once, or a speed card."""
    return name in ("cells", ".lock", ".holder.json", "speed.json") or name.endswith(".new")


def replace_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, or leave the old one."""
    spare = path.with_name(f"{path.name}.{os.getpid()}.new")
    with _told(path):
        try:
            with spare.open("wb", buffering=0) as file:
                _write(file, (json.dumps(value, indent=1) + "\n").encode())
            os.replace(spare, path)
        except BaseException:
            spare.unlink(missing_ok=True)
            raise


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """One clear error for whatever a file system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            todo = "the disk is full; make room and run the same command again: nothing that was answered is lost"
        else:
            todo = "choose a folder that can be written, with --out"
        raise EvaluationError(f"{path} cannot be written ({error.strerror or error}): {todo}") from error
