# SPDX-License-Identifier: Apache-2.0
"""Where the commands write: results to stdout, errors and progress to stderr."""

from __future__ import annotations

import codecs
import io
import json
import sys
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# what a stream in ASCII, Latin-1 or a code page of Windows gets instead; as wide, where it stands in a table
_PLAIN = {
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{MINUS SIGN}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{UPWARDS ARROW}": "^",
    "\N{DOWNWARDS ARROW}": "v",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{BULLET}": "*",
    "\N{BOX DRAWINGS HEAVY HORIZONTAL}": "=",
}

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]


def speak_plainly() -> None:
    """Let stdout and stderr take any text: letters that their encoding lacks are replaced, never an error."""
    codecs.register_error("vlmprune", _plain_character)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a caller put something else in its place
            stream.reconfigure(errors="vlmprune")


def _plain_character(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in lacking), error.end


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
