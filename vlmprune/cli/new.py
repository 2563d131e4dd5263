# SPDX-License-Identifier: Apache-2.0
"""``vlmprune new``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .screen import Json, plain, print_json, stdout


def new(
    name: Annotated[
        str, typer.Argument(help="Name of the new method, in lower case; with --family its model type.")
    ],
    folder: Annotated[
        Path, typer.Option("--dir", help="A checkout of vlmprune, or a folder of your own; it is made.")
    ] = Path(),  # the folder that one is in
    family: Annotated[
        bool, typer.Option("--family", help="Write an adapter for a family of models instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a method that works, with its test, card and ledger; nothing is overwritten.

    In a checkout it also joins the list of built-in methods. With --family it is a plug-in for a family: an
    adapter, a small model and a test.
    """
    # here, since they read the registry and the families, and a command line must start fast
    from .scaffold import scaffold
    from .scaffold_family import scaffold_family

    made = scaffold_family(name, folder) if family else scaffold(name, folder)
    if as_json:
        # paths as text, which JSON can hold
        texts = {"files": made.files, "changed": made.changed, "steps": made.steps}
        print_json({key: list(map(str, values)) for key, values in texts.items()})
        return
    screen = stdout()
    # soft_wrap: rich must not break a path, or nobody can copy it
    for path in made.files:
        screen.print(plain(f"wrote {path}"), style="green", soft_wrap=True)
    for path in made.changed:
        screen.print(plain(f"added a line to {path}"), style="green", soft_wrap=True)
    screen.print("Next steps:", style="bold")
    # lines behind the first, such as those of a pyproject.toml, stand under it
    for number, step in enumerate(made.steps, 1):
        first, *rest = step.rstrip().splitlines()
        screen.print(
            plain("\n".join([f"{number}. {first}", *(f"     {line}" for line in rest)])), soft_wrap=True
        )
