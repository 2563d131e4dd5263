# SPDX-License-Identifier: Apache-2.0
"""``vlmprune validate``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import VlmPruneError
from .screen import Json, complain, plain, print_json, stdout, table


def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="YAML configs, as in configs/.")],
    as_json: Json = False,
) -> None:
    """Check configs: every key, and every spec down to its options."""
    from ..evaluation.leaderboard.config import load

    found, wrong = {}, []
    for file in files:
        try:
            found[file] = load(file)
        except VlmPruneError as error:  # the other files are still worth checking
            wrong.append(error)
    if as_json:
        print_json({file: config.plain() for file, config in found.items()})
    for file, config in {} if as_json else found.items():
        stdout().print(plain(f"{file}: valid"), style="green", soft_wrap=True)
        rows = table("", "", show_header=False)
        rows.add_row("specs", plain("\n".join(map(str, config.specs))))
        for key in ("models", "tasks", "seeds"):
            rows.add_row(key, plain(", ".join(map(str, getattr(config, key))) or "-"))
        rows.add_row("out", plain(config.out or "-"))
        stdout().print(rows)
    for problem in wrong:
        complain(problem)
    if wrong:
        raise typer.Exit(2)
