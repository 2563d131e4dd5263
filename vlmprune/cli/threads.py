# SPDX-License-Identifier: Apache-2.0
"""The option ``--threads`` of commands that run a model."""

from __future__ import annotations

from typing import Annotated

import typer

Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of torch; else OMP_NUM_THREADS, and one for models of the package."),
]


def limit_threads(context: typer.Context, model: str, wanted: int | None) -> None:
    """Until the command ends."""
    from ..evaluation.leaderboard.process import threads

    context.with_resource(threads(model, wanted))
