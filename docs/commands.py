# SPDX-License-Identifier: Apache-2.0
"""The commands with their arguments and options, as the page docs/commands.md shows them on the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def page() -> str:
    """Every command, by name."""
    import typer

    from vlmprune.cli import app

    root = typer.main.get_command(app)
    return "\n\n".join(section(name, command) for name, command in sorted(root.commands.items()))


def section(name: str, command: Any) -> str:
    """What a command does, how it is called, and its table."""
    about = " ".join((command.help or "").split())
    arguments = [word(one) for one in command.params if is_argument(one)]
    # what follows a bare -- comes last
    called = " ".join([f"vlmprune {name}", *sorted([*arguments, "[OPTIONS]"], key=is_passed_on)])
    rows = ["| argument or option | default | meaning |", "|---|---|---|", *map(line, command.params)]
    return f"## `vlmprune {name}`\n\n{about}\n\n    {called}\n\n" + "\n".join(rows)


def is_argument(one: Any) -> bool:
    return bool(one.param_type_name == "argument")


def is_passed_on(text: str) -> bool:
    return text.startswith("[-- ")


def word(one: Any) -> str:
    """An argument as it stands in a call: in brackets, where it may be left out."""
    name = str(one.metavar or one.name.upper()) + "..." * (one.nargs == -1)  # any number of them
    return name if one.required else f"[{name}]"


def line(one: Any) -> str:
    """One argument or option as a line of the table."""
    names = word(one).strip("[]") if is_argument(one) else "`, `".join([*one.opts, *one.secondary_opts])
    meaning = " ".join((one.help or "").split()).replace("|", "\\|")
    return f"| `{names}` | {default(one)} | {meaning} |"


def default(one: Any) -> str:
    """What holds where nothing is given; empty where the meaning says it, or nothing does."""
    if one.required:
        return "must be given"
    if one.default is True:
        return "on"
    plain = isinstance(one.default, (str, int, float, Path)) and one.default is not False
    return f"`{one.default}`" if plain else ""
