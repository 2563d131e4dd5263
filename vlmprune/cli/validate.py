# SPDX-License-Identifier: Apache-2.0
"""``vlmprune validate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EvaluationError, VlmPruneError
from .screen import Json, complain, plain, print_json, stderr, stdout, table

if TYPE_CHECKING:
    from ..evaluation.leaderboard.config import Config


def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="YAML configs, as in configs/.")],
    as_json: Json = False,
) -> None:
    """Check configs: every key, every task, and every spec down to its options."""
    from ..evaluation.leaderboard.config import load

    found: dict[str, Config] = {}
    wrong: list[VlmPruneError] = []
    for file in files:
        try:
            config = load(file)
            _check_lmms_tasks(file, config)
            found[file] = config
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


def _check_lmms_tasks(file: str, config: Config) -> None:
    """Which tasks lmms-eval has is known only where it is installed; elsewhere that is said."""
    from ..evaluation.leaderboard.process import quiet
    from ..evaluation.tasks.lmms.loading import installed, read_config
    from ..evaluation.tasks.registry import LMMS

    names = [name.removeprefix(LMMS) for name in config.tasks if name.startswith(LMMS)]
    if names and not installed():
        text = f"{file}: not checked whether lmms-eval has {names}: it is not installed"
        stderr().print(plain(text), style="yellow", soft_wrap=True)
        return
    with quiet():
        for name in names:
            try:
                read_config(name)
            except VlmPruneError as error:
                raise EvaluationError(f"{file}: {error}") from error
