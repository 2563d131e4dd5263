# SPDX-License-Identifier: Apache-2.0
"""``vlmprune new``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .screen import Json, plain, print_json, stdout


def new(
    method: Annotated[str, typer.Argument(help="Name of the new method, in lower case.")],
    folder: Annotated[
        Path, typer.Option("--dir", help="A checkout of vlmprune, or a folder of your own.")
    ] = Path(),
    as_json: Json = False,
) -> None:
    """Write a method that works, with its test, card and ledger; nothing is overwritten."""
    from .scaffold import scaffold

    made = scaffold(method, folder)
    if as_json:
        print_json({"files": list(map(str, made.files)), "steps": list(made.steps)})
        return
    screen = stdout()
    for path in made.files:
        screen.print(plain(f"wrote {path}"), style="green", soft_wrap=True)
    screen.print("Next steps:", style="bold")
    for number, step in enumerate(made.steps, 1):
        first, *rest = step.rstrip().splitlines()
        screen.print(
            plain("\n".join([f"{number}. {first}", *(f"     {line}" for line in rest)])), soft_wrap=True
        )
