# SPDX-License-Identifier: Apache-2.0
"""Journals and files of a run: every changed bit is found, what was written is on the disk."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from vlmprune.errors import EvaluationError
from vlmprune.evaluation.leaderboard import journal, rundir
from vlmprune.evaluation.leaderboard.journal import Journal, locked, refuse_other_format, replace_json
from vlmprune.evaluation.leaderboard.rundir import Run, cell_id, decode_lines, encode_line

RECIPE = {"model": "m", "spec": "pool@9", "task": "t"}
CELL = cell_id(RECIPE)


def line(number: int, **changes: object) -> dict[str, object]:
    sample = {"spec": "pool@9", "id": f"q-{number}", "cluster": "c", "family": "f", "group": "general"}
    tokens = {"dense_tokens": 36, "realised_tokens": 9, "layer_tokens": 9.0, "firings": 2, "on_object": None}
    rest = {
        "answer": "zwölf",
        "score": 1.0,
        "positions": "compact",
        "encoding": "shared",
        "seconds": {"total": 0.125},
    }
    return sample | tokens | rest | changes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cells").mkdir()
    return tmp_path


@pytest.fixture
def written(folder):
    """A journal of three lines."""
    made = Journal(folder, RECIPE)
    made.append([line(0), line(1), line(2)])
    return made.path


# --- what is read ---------------------------------------------------------------------------------


def test_lines_come_back_as_they_were_written(folder, written):
    assert Run(folder).journal(CELL) == [line(0), line(1), line(2)]
    for number, text in enumerate(written.read_text().splitlines()):
        assert json.loads(text).keys() == {*line(number), "sum"}  # any reader of JSON lines can read it


def test_every_flipped_bit_is_found(written):
    """No other sample comes of it: the line is refused, or it lost its end, is torn and is asked again."""
    data = written.read_bytes()
    whole = [line(0), line(1), line(2)]
    for position in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            samples, flaws = decode_lines(CELL, bytes(broken))
            torn = position == len(data) - 1 and samples == whole[:2]
            assert (flaws and all(sample in whole for sample in samples)) or torn, (position, bit)


def test_a_journal_under_the_name_of_another_cell_is_refused(folder, written):
    other = "0" * 16
    written.rename(folder / "cells" / f"{other}.jsonl")
    with pytest.raises(EvaluationError, match=r"line 1 does not match its checksum.*belongs to another cell"):
        Run(folder).journal(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"5", "has no checksum"),
        (b"null", "has no checksum"),
        (b"{}", "has no checksum"),
        (b'{"id": []}', "has no checksum"),
        (b"[" * 200_000, "has no checksum"),
        (b"\xff\xfe\x00", "has no checksum"),
        (b"", "has no checksum"),
        (json.dumps(line(7)).encode(), "changed, or written by a version that made none"),
        (encode_line("1" * 16, line(7))[:-1], "does not match its checksum"),
        (encode_line(CELL, line(7, id=[]))[:-1], r"is no sample: its id is \[\]"),
        (encode_line(CELL, {"id": "q"})[:-1], r"is no sample: it lacks \['spec', 'cluster'"),
        (encode_line(CELL, line(0, answer="eleven"))[:-1], "answers sample 'q-0' once more, and otherwise"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_line_that_is_no_sample_is_one_error_with_file_line_and_remedy(folder, written, text, message):
    written.write_bytes(written.read_bytes() + text + b"\n")
    with pytest.raises(EvaluationError, match=message) as caught:
        Journal(folder, RECIPE)
    said = str(caught.value)
    assert said.startswith(f"{written}: line 4 ") and f"--repair --out {folder}" in said
    assert "task" not in said and "\n" not in said and len(said) < 600


def test_nested_deeper_than_python_goes_is_an_error_too(folder):
    """No writer of ours makes such a line, but its checksum could be right."""
    text = b'{"id": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    whole = text[:-1] + f', "sum": "{rundir._checksum(CELL, text)}"}}\n'.encode()
    assert decode_lines(CELL, whole)[1][0].reason.startswith("is no JSON (RecursionError")


def test_a_torn_last_line_is_cut_off_and_asked_again(folder, written):
    data = written.read_bytes()
    last = data[: data[:-1].rfind(b"\n") + 1]
    for cut in range(len(last), len(data)):
        written.write_bytes(data[:cut])
        assert Journal(folder, RECIPE).ids == {"q-0", "q-1"}
        assert written.read_bytes() == last
    written.write_bytes(last + b"\0" * 5000)  # what a power cut can leave
    assert Journal(folder, RECIPE).ids == {"q-0", "q-1"} and written.read_bytes() == last


def test_line_ends_of_windows_and_a_line_that_stands_there_twice_are_read(folder, written):
    data = written.read_bytes()
    written.write_bytes(data.replace(b"\n", b"\r\n") + data)
    assert Journal(folder, RECIPE).ids == {"q-0", "q-1", "q-2"}


# --- what is on the disk --------------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch):
    """What was synced, in order: (path, its content or the names in it at that moment)."""
    seen = []

    def fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append((path, sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()))
        return original(handle)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to tell which file a handle is of")
    original = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def test_a_line_is_on_the_disk_before_anybody_is_told(folder, synced):
    made = Journal(folder, RECIPE)
    assert (
        folder / "cells",
        sorted(path.name for path in made.path.parent.iterdir()),
    ) in synced  # its name is
    synced.clear()
    assert made.append([line(0)]) == 1
    assert synced == [(made.path, encode_line(CELL, line(0)))]


def test_a_file_is_replaced_by_one_that_is_on_the_disk_and_so_is_its_name(folder, synced):
    replace_json(folder / "run.json", {"a": 1})
    (spare, data), (where, names) = synced
    assert spare.name == f"run.json.{os.getpid()}.new" and json.loads(data) == {"a": 1}
    assert where == folder and "run.json" in names and spare.name not in names


def test_a_new_run_folder_is_on_the_disk(tmp_path, synced):
    with locked(tmp_path / "run"):
        pass
    assert (tmp_path, ["run"]) in synced
    assert any(path == tmp_path / "run" and "cells" in names for path, names in synced)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_is_good_enough(folder, monkeypatch, code):
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    replace_json(folder / "run.json", {})
    assert (folder / "run.json").is_file()


def test_a_folder_that_fails_to_sync_is_told(folder, monkeypatch):
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(EvaluationError, match=r"cannot be written \(Input/output error\)"):
        replace_json(folder / "run.json", {})


# --- whose files ----------------------------------------------------------------------------------

FOREIGN = (
    "thesis.new",
    "run.json.new",
    "run.json.12.new.bak",
    "runs.json.12.new",
    "results.json.x.new",
    "12.new",
)


def test_only_temporary_files_of_the_run_are_deleted(folder):
    mine = ["run.json.12.new", "results.json.3.new", ".holder.json.4.new", f"cells/{CELL}.json.5.new"]
    mine.append(f"cells/{CELL}.jsonl.6.new")
    theirs = [
        *FOREIGN,
        "cells/thesis.new",
        "cells/run.json.12.new",
        f"{CELL}.json.5.new",
        "sub/run.json.12.new",
    ]
    (folder / "sub").mkdir()
    for name in (*mine, *theirs):
        (folder / name).write_text("precious")
    (folder / "run.json.77.new").mkdir()  # a folder of that name is nobody's temporary file
    with locked(folder):
        pass
    assert not [name for name in mine if (folder / name).exists()]
    assert (
        all((folder / name).read_text() == "precious" for name in theirs)
        and (folder / "run.json.77.new").is_dir()
    )


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_other_files_is_no_run(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(EvaluationError, match=f"is not empty and holds no run, but '{name}'"):
        refuse_other_format(tmp_path)


# --- what a file system refuses -------------------------------------------------------------------


def test_a_lock_that_cannot_be_had_is_one_line(tmp_path):
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # refused for every user, also for root
    message = r"run cannot be written \(.*\): choose a folder that can be written"
    with pytest.raises(EvaluationError, match=message) as caught, locked(tmp_path / "run"):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EROFS, "Read-only file system"), r"\(Read-only file system\): choose a folder"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; make room"),
        (NotImplementedError("FileSystem does not appear to support flock"), r"\(FileSystem does not appear"),
    ],
    ids=["read-only", "full", "no locks"],
)
def test_what_filelock_raises_is_one_line(folder, monkeypatch, error, message):
    def acquire(self, timeout):
        raise error

    monkeypatch.setattr(journal.FileLock, "acquire", acquire)
    with pytest.raises(EvaluationError, match=message), locked(folder):
        pass


def test_a_holder_that_cannot_be_read_does_not_hide_that_the_folder_is_in_use(folder):
    with locked(folder):
        (folder / ".holder.json").write_text("")
        with pytest.raises(EvaluationError, match="is in use by another process; wait"), locked(folder):
            pass
