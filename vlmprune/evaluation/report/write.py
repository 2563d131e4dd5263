# SPDX-License-Identifier: Apache-2.0
"""From a run folder to files."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike, fspath, sep
from pathlib import Path

from ...checks import check_apart, one_of
from ...errors import EvaluationError, SpecError
from ...textfile import replace_text
from ..leaderboard.rundir import Run
from .check import check
from .export import Options, as_csv, as_json, as_markdown
from .latex import as_latex
from .load import Results
from .page import page
from .pivot import pivots

FORMATS: dict[str, Callable[[Run, Results, Options], str]] = {
    "html": page,
    "csv": as_csv,
    "json": as_json,
    "md": as_markdown,
    "tex": as_latex,
}
TABLES = ("rows", "tasks")


def write_report(
    folder: str | PathLike[str],
    form: str | None = None,
    out: str | PathLike[str] | None = None,
    options: Options | None = None,
) -> Path:
    """Check a run and write it; returns the path.

    Args:
        form: one of ``FORMATS``; default as the suffix of ``out`` says, else html.
        out: a file, or a folder, which is made where it is missing; default: the run folder. A name without a
            suffix, or with a slash at its end, is a folder.

    Raises:
        EvaluationError: a row fails validation, all that do are named; or the file system refuses.
    """
    name, path = _target(form, out, Path(folder))
    options = options or Options()
    _check_options(name, options)
    run = Run.open(folder)
    check_apart("--out", path, run.files())
    results = check(run)
    if options.table == "tasks" and not pivots(results.rows):
        tasks = sorted({row.task for row in results.rows})
        raise EvaluationError(f"--table tasks compares several tasks of a model; this run has {tasks}")
    text = FORMATS[name](run, results, options)
    # last, so that a run that is refused leaves no empty folder
    _make_folder(path.parent, made=out is not None and is_folder(out))
    replace_text(path, text)
    return path


def _target(form: str | None, out: str | PathLike[str] | None, folder: Path) -> tuple[str, Path]:
    """The format and the file."""
    if form is not None:
        one_of("format", form, tuple(FORMATS))
    # the suffix of a folder says nothing
    if out is None or is_folder(out):
        name = form or "html"
        return name, (folder if out is None else Path(out)) / f"report.{name}"
    path = Path(out)
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        known = ", ".join(f".{name}" for name in FORMATS)
        raise SpecError(
            f"--out {str(out)!r} ends in {path.suffix!r}; expected {known}, or a folder with a slash"
        )
    if form not in (None, suffix):
        raise SpecError(f"--out {str(out)!r} and the format {form!r} differ; give one of them")
    return suffix, path


def is_folder(out: str | PathLike[str]) -> bool:
    """Whether a target is a folder, which may still have to be made, and no file."""
    text = fspath(out)
    return text.endswith(("/", sep)) or Path(text).is_dir() or not Path(text).suffix


def _check_options(form: str, options: Options) -> None:
    # html and json hold everything
    if options.table is not None:
        one_of("--table", options.table, TABLES)
        if form not in ("csv", "md", "tex"):
            raise SpecError(f"--table {options.table} is for csv, md and tex; {form} holds both tables")
    if options.intervals and form not in ("csv", "md", "tex"):
        raise SpecError(f"--intervals is for csv, md and tex; {form} has all intervals")


def _make_folder(folder: Path, made: bool) -> None:
    """``made``: the folder was asked for, so it may be new; that of a file must be there."""
    if made:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise EvaluationError(
                f"{folder} cannot be made ({reason}); choose another place with --out"
            ) from error
    elif not folder.is_dir():
        raise EvaluationError(
            f"{folder} is no folder that is there; make it first, or choose another with --out"
        )
