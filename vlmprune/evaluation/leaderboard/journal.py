# SPDX-License-Identifier: Apache-2.0
"""The writing side of a run folder: whose it is, its lock, journals that only grow, files replaced whole.

Only the last line on disk can be incomplete, and the next writer truncates it. Nothing is
ever written twice: a line goes to the journal only if its sample is not there. What was written is on the
disk, its name included, before anybody is told so. Only files are deleted that a writer of this module left
half-way.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...errors import EvaluationError
from .rundir import FORMAT, Run, cell_id, encode_line, read_object

# ``<file of a run>.<process>.new``, in the folder and among its cells: what replace_file writes and renames
_SPARE = re.compile(r"(?:run|results|\.holder)\.json\.[0-9]+\.new")
_CELL_SPARE = re.compile(r"[0-9a-f]{16}\.jsonl?\.[0-9]+\.new")


_CELL = re.compile(r"[0-9a-f]{16}")  # as cell_id makes it
# what may lie in a run folder beside run.json
_REPORTS = tuple(f"report.{ending}" for ending in ("html", "csv", "json", "md", "tex"))
_OURS = ("cells", ".lock", ".holder.json", "results.json", "speed.json", *_REPORTS)


class Journal:
    """The answers of one cell; open it only under the lock of its run."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        self.cell = cell_id(recipe)
        self.path = folder / "cells" / f"{self.cell}.jsonl"
        self.mended = self._write_recipe(folder, recipe)
        self._mend()
        self.ids = {line["id"] for line in Run(folder).journal(self.cell)}

    def _write_recipe(self, folder: Path, recipe: Mapping[str, Any]) -> bool:
        """Write the recipe unless it stands there; returns whether another text had its place."""
        path = self.path.with_suffix(".json")
        there = path.is_file()
        if there and is_sound(folder, self.cell):
            return False
        replace_json(path, recipe)
        return there

    def _mend(self) -> None:
        """Truncate an incomplete last line that an interrupted run left."""
        new = not self.path.exists()
        # "a" makes the file where it is missing and never empties it
        with told(self.path), self.path.open("a+b") as file:
            end = whole = file.seek(0, os.SEEK_END)
            while whole:
                # from the end, block by block: a journal is long, its last line is short
                start = max(0, whole - 4096)
                file.seek(start)
                at = file.read(whole - start).rfind(b"\n")
                if at >= 0:
                    whole = start + at + 1
                    break
                whole = start
            if whole < end:
                file.truncate(whole)
        if new:
            sync_folder(self.path.parent)

    def append(self, lines: Iterable[Mapping[str, Any]]) -> int:
        """Write the lines of samples that are not there yet, in one go; returns how many."""
        # by id: of a sample that comes twice one line is written
        new = {line["id"]: line for line in lines if line["id"] not in self.ids}
        data = b"".join(encode_line(self.cell, line) for line in new.values())
        if data:
            # unbuffered: a killed process leaves whole lines, and at most one broken one
            with told(self.path), self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    _write(file, data)
                except BaseException:
                    file.truncate(before)  # a disk that is full still lets a file shrink
                    raise
            self.ids |= set(new)
        return len(new)


def refuse_other_format(folder: Path) -> None:
    """Raise where a folder holds a run of another format, or something else altogether."""
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"{folder} is a file; expected a folder for the run, or a new name, with --out")
    if not folder.is_dir():
        return
    info = read_info(folder)
    if info is not None:
        if info["format"] != FORMAT:
            raise EvaluationError(
                f"{folder} holds a run of format {info['format']}, written by vlmprune "
                f"{info.get('version', '?')}; this version writes format {FORMAT}: go on with the version "
                "that began it, or choose another folder with --out"
            )
        return
    if any(is_sound(folder, cell) for cell in cells_of(folder)):
        return  # run.json is gone or broken; the cells say that this is a run, and what was asked of each
    if (folder / "run.json").exists() and not (folder / "cells").is_dir():
        raise EvaluationError(
            f"{folder / 'run.json'} is not that of a run, and no cells lie beside it; choose another folder "
            "with --out"
        )
    spare = {path.name for path in left_behind(folder)}
    strange = [path.name for path in folder.iterdir() if path.name not in (*_OURS, "run.json", *spare)]
    if strange:
        raise EvaluationError(
            f"{folder} is not empty and holds no run, but {min(strange)!r}; choose a new folder with --out"
        )


def read_info(folder: Path) -> dict[str, Any] | None:
    """What run.json says; None where it is missing or fails validation."""
    try:
        info = read_object(folder / "run.json")
    except EvaluationError:
        return None
    return info if type(info.get("format")) is int else None  # True is no format


def cells_of(folder: Path) -> list[str]:
    """Names of all cells of which a recipe or a journal is there."""
    return sorted({path.stem for path in folder.glob("cells/*.json*") if _is_cell_file(path)})


def _is_cell_file(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl") and _CELL.fullmatch(path.stem) is not None and path.is_file()


def is_sound(folder: Path, cell: str) -> bool:
    """Whether the recipe of a cell is there and is the one that gave the cell its name."""
    try:
        Run(folder).recipe(cell)
    except EvaluationError:
        return False
    return True


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]  # a full disk may take a part
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """See that the names in a folder, and not only the contents of its files, outlive a power cut."""
    if os.name == "nt":  # Windows opens no folders
        return
    with told(folder):
        try:
            handle = os.open(folder, os.O_RDONLY)
        except PermissionError:  # a parent that may be passed through and not read
            return
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
                raise
        finally:
            os.close(handle)


class RunLock(FileLock):
    """A lock that excludes other threads of its process as well.

    lmms-eval, once it has evaluated something, has filelock's own class give out one lock per path for the
    whole process. Others of its classes are left alone.
    """


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """An exclusive lock on the run folder; the error names the owner, and a process that dies loses it."""
    cells = folder / "cells"
    if not cells.is_dir():
        with told(folder):
            cells.mkdir(parents=True, exist_ok=True)
        # the names of both folders have to outlive a power cut, too
        sync_folder(folder)
        sync_folder(folder.parent)
    lock, holder = RunLock(folder / ".lock"), folder / ".holder.json"
    with told(folder):
        try:
            lock.acquire(timeout=0)  # asks once, does not wait
        except Timeout as error:
            raise EvaluationError(
                f"{folder} is in use by {_holder(holder)}; wait until it ends, stop it, or choose another "
                "folder with --out"
            ) from error
    try:
        # under the lock nobody else writes, so these are of a process that is gone
        for left in left_behind(folder):
            with told(left):
                left.unlink()
        # only for the messages of others: the lock is what counts
        replace_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        lock.release()


def left_behind(folder: Path) -> list[Path]:
    """Temporary files of a writer of this run that was killed; nobody else's, whatever they are called."""
    mine = [path for path in folder.glob("*.new") if _SPARE.fullmatch(path.name)]
    mine += [path for path in folder.glob("cells/*.new") if _CELL_SPARE.fullmatch(path.name)]
    return [path for path in mine if path.is_file()]


def _holder(path: Path) -> str:
    try:
        who = read_object(path)
    except EvaluationError:  # it may be just being written; that the folder is in use is what counts
        return "another process"
    return f"process {who.get('pid', '?')} on {who.get('host', '?')}"


def replace_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, or leave the old one."""
    replace_file(path, (json.dumps(value, indent=1) + "\n").encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole, or leave the old one."""
    spare = path.with_name(f"{path.name}.{os.getpid()}.new")
    with told(path):
        try:
            with spare.open("wb", buffering=0) as file:
                _write(file, data)
            os.replace(spare, path)  # in one step: a reader finds the old file or the new one
        except BaseException:
            # Ctrl-C, too
            spare.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """One clear error for whatever a file system refuses."""
    try:
        yield
    # filelock raises the latter where a file system has no locks
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            todo = "the disk is full; make room and run the same command again: no answer is lost"
        else:
            todo = "choose a folder that can be written, with --out"
        raise EvaluationError(f"{path} cannot be written ({reason}): {todo}") from error
