# SPDX-License-Identifier: Apache-2.0
"""``vlmprune leaderboard``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SpecError
from .screen import Json, plain, print_json, stderr, stdout
from .threads import Threads

if TYPE_CHECKING:
    from ..evaluation.leaderboard.config import Config
    from ..evaluation.leaderboard.engines import Engine


def leaderboard(
    config: Annotated[
        Path | None, typer.Argument(help="YAML, as in configs/; else the tiny model and its benchmark.")
    ] = None,
    specs: Annotated[
        str | None, typer.Option(help="Instead of the config's: 'fastervlm@32,holov@32'.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 400 questions; without a config one budget: a minute.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; the same again goes on where it was.")
    ] = None,
    swap: Annotated[
        bool, typer.Option("--replace", help="Let the table replace one of another config.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend the files of --out; asks no question.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions answered together.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Position ids: compact or original; else the method's.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    threads: Threads = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, or 'auto'; without it, one is started.")
    ] = None,
    task_cpus: Annotated[float, typer.Option(min=0, help="CPU cores of a Ray task.")] = 1,
    task_gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs of a Ray task; 1 on cuda unless given.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of a model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare methods: models x specs x tasks, with the baselines that belong in every table.

    Every table includes dense, blind (no picture), random under three seeds, uniform and pool, and downsample
    where the model reads pictures of any size. Under it stands how far it agrees with published tables.
    Kill it and run it again: nothing is lost.
    """
    if repair:
        _repair(config, out, as_json)
        return
    from ..evaluation.leaderboard.run import Settings

    wanted = _config(config, specs, quick, {"limit": limit, "batch_size": batch_size, "positions": positions})
    settings = Settings(
        device=device,
        engine=_engine(engine, address, device, task_cpus, task_gpus),
        trust_remote_code=trust_remote_code,
        command=_command(),
        replace=swap,
        threads=threads,
    )
    _compare(wanted, out or Path(wanted.out or _folder(config, quick)), settings, as_json)


def _compare(config: Config, folder: Path, settings: Any, as_json: bool) -> None:
    from ..evaluation.leaderboard import run
    from ..evaluation.leaderboard.process import Terminated, quiet, terminable
    from . import board
    from .progress import progress

    try:
        with terminable(), quiet(), progress() as shown:
            found = run.leaderboard(config, folder, settings, shown)
    except KeyboardInterrupt as stop:
        text = f"Stopped. All answers so far are in {folder}; the same command goes on from there."
        stderr().print(plain(text), soft_wrap=True)
        # 128 and the number of the signal, as shells have it
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
    if as_json:
        print_json(found)
    else:
        board.show(found, stdout())
        for text in (
            _beside(found["other_cells"]),
            f"Rows and samples: {folder}. As a page: vlmprune report {folder}",
        ):
            stdout().print(plain(text), soft_wrap=True, end="\n" if text else "")
    # last: the rows that are there have been shown
    if found["failed"]:
        raise typer.Exit(1)


def _beside(cells: list[dict[str, Any]]) -> str:
    """What else the folder holds, in one line; nothing where it holds nothing else."""
    if not cells:
        return ""
    names = sorted({cell["spec"] or "a cell without a recipe" for cell in cells})
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"Also in the folder, in no table: {len(cells)} cells of other configs or versions ({listed})."


def _repair(config: Path | None, out: Path | None, as_json: bool) -> None:
    if config is not None or out is None:
        given = "no folder" if out is None else f"the config {str(config)!r}"
        raise SpecError(
            f"--repair got {given}; it repairs a folder as it is: vlmprune leaderboard --repair --out RUN"
        )
    from ..evaluation.leaderboard.repair import repair

    done: list[str] = []
    answers = repair(out, done.append)
    if as_json:
        print_json({"repaired": done, "answers": answers})
        return
    for text in (
        *done,
        f"{out}: {answers} answers are sound" + ("" if done else "; there was nothing to repair"),
    ):
        stdout().print(plain(text), soft_wrap=True)


def _config(path: Path | None, specs: str | None, quick: bool, changes: dict[str, Any]) -> Config:
    from ..checks import one_of
    from ..evaluation.leaderboard.config import POSITIONS, Config, load
    from ..evaluation.leaderboard.plan import QUICK_QUESTIONS, default_config

    if changes.get("positions") is not None:
        one_of("--positions", changes["positions"], POSITIONS)

    config = default_config(quick) if path is None else load(path)
    # a config of the user keeps its specs and asks no more questions, unless --limit says how many
    if quick and changes.get("limit") is None:
        asked = QUICK_QUESTIONS if config.limit is None else min(config.limit, QUICK_QUESTIONS)
        changes = {**changes, "limit": asked}
    # read as a config to have the specs checked; its model is not used
    if specs is not None:
        config = replace(config, specs=Config.of({"models": ["tiny"], "specs": _listed(specs)}).specs)
    return replace(config, **{key: value for key, value in changes.items() if value is not None})


def _listed(specs: str) -> list[str]:
    """The specs of ``--specs``, which are separated by commas."""
    from ..spec import split

    texts = [text.strip() for text in split(specs, ",")]
    if not all(texts):
        meant = ",".join(filter(None, texts))
        hint = f"write --specs {shlex.quote(meant)}" if meant else "leave it out for the specs of the config"
        raise SpecError(
            f"--specs {specs!r} has an empty entry; expected specs with commas between them, as in "
            f"'fastervlm@32,holov@32': {hint}"
        )
    return texts


def _folder(config: Path | None, quick: bool) -> str:
    return f"runs/{'leaderboard' if config is None else config.stem}{'-quick' if quick else ''}"


def _engine(name: str, address: str | None, device: str, cpus: float, gpus: float | None) -> Engine:
    from ..checks import one_of
    from ..evaluation.leaderboard.engines import Local, Ray

    one_of("--engine", name, ("local", "ray"))
    if name == "ray":
        return Ray(address, cpus, float(device.startswith("cuda")) if gpus is None else gpus)
    if address is not None:
        raise SpecError(f"--address {address!r} is of a Ray cluster; add --engine ray")
    return Local()


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
