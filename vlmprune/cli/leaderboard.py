# SPDX-License-Identifier: Apache-2.0
"""``vlmprune leaderboard``."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SpecError
from .screen import Json, plain, print_json, stderr, stdout

if TYPE_CHECKING:
    from ..benchmarks.sweep.engines import Engine
    from ..config import Config


def leaderboard(
    config: Annotated[Path | None, typer.Argument(help="YAML, as in configs/; else the tiny model and its benchmark.")] = None,
    specs: Annotated[str | None, typer.Option(help="Specs instead of those of the config: 'fastervlm@32,holov@32'.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One budget and fewer questions: about a minute.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the same again goes on where it was.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions answered together.")] = None,
    positions: Annotated[str | None, typer.Option(help="Position ids: compact or original; else the method's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="Ray cluster, or 'auto'; without it, one is started.")] = None,
    task_cpus: Annotated[float, typer.Option(min=0, help="CPU cores of a Ray task.")] = 1,
    task_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of a Ray task; 1 on cuda unless given.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a model.")] = False,
    as_json: Json = False,
) -> None:
    """Compare methods: models x specs x tasks, with the baselines that belong in every table.

    Dense, random under three seeds, uniform and pool join at every budget. Kill it and run it again: nothing is lost.
    """
    from ..benchmarks.sweep import Settings
    from ..benchmarks.sweep import leaderboard as sweep
    from . import board

    wanted = _config(config, specs, quick, {"limit": limit, "batch_size": batch_size, "positions": positions})
    folder = out or Path(wanted.out or _folder(config, quick))
    settings = Settings(device, _engine(engine, address, device, task_cpus, task_gpus), trust_remote_code, _command())
    bars: Any = board.Bars() if not as_json or sys.stderr.isatty() else nullcontext()
    try:
        with bars as progress:
            found = sweep(wanted, folder, settings, progress)
    except KeyboardInterrupt:
        stderr().print(plain(f"Stopped. All answers so far are in {folder}; the same command goes on from there."))
        raise typer.Exit(130) from None
    if as_json:
        print_json(found)
    else:
        board.show(found, stdout())
        stdout().print(plain(f"Rows and samples: {folder}. As a page: vlmprune report {folder}"), soft_wrap=True)
    if found["failed"]:
        raise typer.Exit(1)


def _config(path: Path | None, specs: str | None, quick: bool, changes: dict[str, Any]) -> Config:
    from ..benchmarks.sweep.plan import QUICK_QUESTIONS, default_config
    from ..config import POSITIONS, Config, load
    from ..core.base import one_of
    from ..spec import split

    if changes.get("positions") is not None:
        one_of("--positions", changes["positions"], POSITIONS)

    config = default_config(quick) if path is None else load(path)
    if path is not None and quick:
        changes = {"limit": QUICK_QUESTIONS} | {key: value for key, value in changes.items() if value}
    if specs is not None:
        texts = [text.strip() for text in split(specs, ",")]
        config = replace(config, specs=Config.of({"models": ["tiny"], "specs": texts}).specs)
    return replace(config, **{key: value for key, value in changes.items() if value is not None})


def _folder(config: Path | None, quick: bool) -> str:
    return f"runs/{'leaderboard' if config is None else config.stem}{'-quick' if quick else ''}"


def _engine(name: str, address: str | None, device: str, cpus: float, gpus: float | None) -> Engine:
    from ..benchmarks.sweep.engines import Local, Ray
    from ..core.base import one_of

    one_of("--engine", name, ("local", "ray"))
    if name == "ray":
        return Ray(address, cpus, float(device.startswith("cuda")) if gpus is None else gpus)
    if address is not None:
        raise SpecError(f"--address {address!r} is of a Ray cluster; add --engine ray")
    return Local()


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
