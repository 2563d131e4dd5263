# SPDX-License-Identifier: Apache-2.0
"""The command line: parses, calls, prints. Nothing heavy is imported before a command runs.

Exit codes: 0 all is well, 1 a check failed, 2 the input was wrong.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import VlmPruneError
from . import (
    agreement,
    bench,
    calibrate,
    catalogue,
    demo,
    env,
    leaderboard,
    lmms,
    new,
    publish,
    report,
    run,
    serve,
    train,
    validate,
    verify,
)
from .screen import complain, of_system, speak_plainly

__all__ = ["app", "main"]


DEBUG = "--debug"


def _without_types(options: list[Any]) -> list[Any]:
    """Flags take no value, but Typer's help writes ``<bool>`` behind them."""
    for option in options:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    return options


class _Command(TyperCommand):
    """One command."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


class _Commands(TyperGroup):
    """Turns errors that a user can mend into one message and exit code 2; --debug shows the traceback."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        # behind it stand arguments, even --debug
        until = words.index("--") if "--" in words else len(words)
        debug = DEBUG in words[:until]  # before or after the name of the command
        words = [DEBUG] * debug + [word for word in words[:until] if word != DEBUG] + words[until:]
        try:
            speak_plainly()
            return super().main(words, *rest, **options)
        except OSError as error:  # a disk that is full, a folder that may not be written
            # standalone_mode=False is Click's word for a caller that wants exceptions
            if debug or options.get("standalone_mode") is False:
                raise
            complain(of_system(error))
            sys.exit(2)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VlmPruneError as error:
            # known once the words are parsed, hence here and not in main
            if ctx.params.get("debug"):
                raise
            complain(error)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="vlmprune",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"vlmprune {__version__}")
        raise typer.Exit()


def _log_to_stderr(ctx: typer.Context) -> None:
    """What the logger of the package says, until the command ends."""
    log, handler = logging.getLogger("vlmprune"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)

    def put_back() -> None:
        log.removeHandler(handler)
        log.setLevel(before)

    ctx.call_on_close(put_back)


@app.callback()
def _root(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the log, and the traceback of errors; in any place.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prune visual tokens inside unmodified Hugging Face vision-language models.

    Exit codes: 0 all is well, 1 a check failed, 2 the input was wrong.
    """
    if debug:
        _log_to_stderr(ctx)


app.command("list", cls=_Command)(catalogue.list_methods)
app.command("show", cls=_Command)(catalogue.show)
app.command("run", cls=_Command)(run.run)
app.command("leaderboard", cls=_Command)(leaderboard.leaderboard)
app.command("report", cls=_Command)(report.report)
app.command("agreement", cls=_Command)(agreement.agreement)
app.command("publish", cls=_Command)(publish.publish)
app.command("serve", cls=_Command)(serve.serve)
app.command("demo", cls=_Command)(demo.demo)
app.command("bench", cls=_Command)(bench.bench)
app.command("plan", cls=_Command)(bench.plan)
app.command("verify", cls=_Command)(verify.verify)
app.command("validate", cls=_Command)(validate.validate)
app.command("new", cls=_Command)(new.new)
app.command("train", cls=_Command)(train.train)
app.command("calibrate", cls=_Command)(calibrate.calibrate)
app.command("lmms-tasks", cls=_Command)(lmms.lmms_tasks)
app.command("env", cls=_Command)(env.env)


def main() -> None:
    """Entry of the console script."""
    speak_plainly()
    app(prog_name="vlmprune")
