# SPDX-License-Identifier: Apache-2.0
"""``vlmprune lmms-tasks``: a folder of tasks for lmms-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .screen import stdout


def lmms_tasks(
    folder: Annotated[
        Path, typer.Argument(help="Made where it is missing; give it to lmms-eval as --include_path.")
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples of the synthetic benchmark; all of them by default.")
    ] = None,
) -> None:
    """Write our tasks for lmms-eval, and the data of the synthetic benchmark, without a network."""
    from ..evaluation.tasks.lmms.loading import write_tasks

    names = write_tasks(folder, limit)
    stdout().print(f"{len(names)} tasks in {folder}: {', '.join(names)}", highlight=False, soft_wrap=True)
