# SPDX-License-Identifier: Apache-2.0
"""Where the commands write: results to stdout, errors and progress to stderr."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import sys
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# what a terminal or a log that is not UTF-8 gets instead
_PLAIN = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{BOX DRAWINGS LIGHT HORIZONTAL}": "-",
    "\N{BOX DRAWINGS HEAVY HORIZONTAL}": "=",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{UPWARDS ARROW}": "^",
    "\N{DOWNWARDS ARROW}": "v",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{BULLET}": "*",
}
# full disk or quota, file too large, read-only, broken device
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]


def speak_plainly() -> None:
    """From now on a character that stdout or stderr cannot write becomes a plain one."""
    codecs.register_error("vlmprune", _plain_character)
    for stream in (sys.stdout, sys.stderr):
        # notebooks put objects of their own here
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vlmprune")


def _plain_character(error: UnicodeError) -> tuple[str, int]:
    # a handler is also asked where text is decoded
    if not isinstance(error, UnicodeEncodeError):
        raise error
    given = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in given), error.end


def of_system(error: OSError) -> OSError:
    """A refusal by the system in words; what could not be printed is dropped, or Python's exit would fail."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes stdout once more as it ends, and must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    where = f" {error.filename!r}" if error.filename else ""
    if error.errno in _NOT_WRITTEN:
        return OSError(
            f"output{where} cannot be written: {error.strerror}; make room, or choose another place"
        )
    return OSError(
        f"{error.strerror or error}:{where}; --debug shows what was tried" if where else f"{error}"
    )


def stdout() -> Console:
    return Console(highlight=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def complain(error: Exception) -> None:
    """One error in red, never wrapped, so that names in it can be searched and copied."""
    stderr().print(Text(f"error: {error}", style="red"), soft_wrap=True)


def table(*columns: str, **options: Any) -> Table:
    """An empty table whose cells fold: nothing is ever cut off."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", **options)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def plain(text: str) -> Text:
    """Text of a model or a user: no markup is read in it, and no control character reaches the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
