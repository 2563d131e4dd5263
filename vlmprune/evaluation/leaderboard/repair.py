# SPDX-License-Identifier: Apache-2.0
"""Repair: what a run folder lost and can be worked out from the rest. Nothing is thrown away."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import EvaluationError, SpecError
from ...spec import parse
from .config import SEEDS
from .identity import trained
from .journal import cells_of, is_sound, locked, read_info, refuse_other_format, replace_file, replace_json
from .rundir import FORMAT, Run, cell_id, decode_lines, encode_line, read_object

Tell = Callable[[str], None]
_RANDOM = re.compile(r"random\(seed=([0-9]+)\)@.*")
# what all cells of a config share; a length of answers may be that of the task
_SHARED = ("batch_size", "positions", "dtype", "device", "trust_remote_code")


def repair(folder: str | Path, tell: Tell) -> int:
    """Repair a run folder and ``tell`` a sentence of each thing done; returns how many answers are sound.

    Lines of journals that fail validation are set aside, beside the journal. A lost recipe is worked out
    from the others: its hash, which names the cell, shows whether that is right. A lost run.json is written
    from the recipes of the cells, unless they are of several configs.
    """
    folder = Path(folder)
    refuse_other_format(folder)
    if not cells_of(folder):
        raise EvaluationError(
            f"{folder} holds no cells, so there is nothing to repair; expected the folder of a run"
        )
    with locked(folder):
        # journals first: a lost recipe is worked out from its answers
        answers = sum(_mend_journal(folder, cell, tell) for cell in cells_of(folder))
        for cell in cells_of(folder):
            _mend_recipe(folder, cell, tell)
        if read_info(folder) is None:
            _write_info(folder, tell)
        try:
            read_object(folder / "results.json")
        except EvaluationError:
            tell(
                f"{folder / 'results.json'} is missing or broken; the leaderboard command of this run writes "
                "it anew"
            )
    return answers


def _mend_journal(folder: Path, cell: str, tell: Tell) -> int:
    path = folder / "cells" / f"{cell}.jsonl"
    if not path.is_file():
        return 0
    data = path.read_bytes()
    samples, flaws = decode_lines(cell, data)
    if flaws:
        aside = _free_name(path)
        replace_file(aside, data)  # first the copy, then the change
        replace_file(path, b"".join(encode_line(cell, sample) for sample in samples))
        first = f"line {flaws[0].number} {flaws[0].reason}"
        count = f"{len(flaws)} of {len(flaws) + len(samples)} lines"
        tell(f"{path}: {count} are left out ({first}); the whole is kept as {aside.name}")
    return len(samples)


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    return aside


def _mend_recipe(folder: Path, cell: str, tell: Tell) -> None:
    if is_sound(folder, cell):
        return
    path = folder / "cells" / f"{cell}.json"
    for recipe in _candidates(folder, cell):
        if cell_id(recipe) == cell:
            replace_json(path, recipe)
            tell(f"{path} was missing or damaged; it is that of {recipe['spec']} and is written anew")
            return
    tell(
        f"{path} is missing or damaged, and no other cell shows what it was: the leaderboard command that "
        "made it writes it anew; until then its answers are in no table"
    )


def _candidates(folder: Path, cell: str) -> Iterator[dict[str, Any]]:
    """Recipes of the other cells with the spec of this one, which its answers name."""
    path = folder / "cells" / f"{cell}.jsonl"
    samples = Run(folder).journal(cell) if path.is_file() else []
    if not samples:
        return
    spec = samples[0]["spec"]
    try:
        parts, weights = parse(spec).parts, trained(spec)
    except SpecError:  # of a plug-in, or of weights, that are not here
        return
    seeds = [value for part in parts for key, value in part.args if key == "seed"]
    sound = [Run(folder).recipe(other) for other in cells_of(folder) if is_sound(folder, other)]
    plugins = {name: code for recipe in sound for name, code in (recipe.get("plugins") or {}).items()}
    mine = {name: code for name, code in plugins.items() if name in {part.name for part in parts}}
    own = {"spec": spec, "seeds": seeds, "plugins": mine, **weights}
    # recipes of one config differ in these; the hash tells whether the guess is right
    for recipe in sound:
        yield {name: value for name, value in recipe.items() if name != "trained"} | own


def _write_info(folder: Path, tell: Tell) -> None:
    cells = [cell for cell in cells_of(folder) if is_sound(folder, cell)]
    # as they were asked
    cells.sort(key=lambda cell: ((folder / "cells" / f"{cell}.json").stat().st_mtime_ns, cell))
    config = config_of([Run(folder).recipe(cell) for cell in cells], folder)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    info = {
        "format": FORMAT,
        "version": __version__,
        "created": now,
        "repaired": now,
        "command": "",
        "config": config,
    }
    replace_json(folder / "run.json", info)
    tell(
        f"{folder / 'run.json'} was missing or broken, and is written anew from {len(cells)} recipes of cells"
    )


def config_of(recipes: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The config that these cells answer; refused where they are of several."""
    shared = {key: _distinct([recipe[key] for recipe in recipes]) for key in ("split", "limit")}
    shared |= {key: _distinct([recipe["generation"][key] for recipe in recipes]) for key in _SHARED}
    several = [f"{key} {' and '.join(map(str, values))}" for key, values in shared.items() if len(values) > 1]
    if several:
        raise EvaluationError(
            f"{folder / 'run.json'} is missing or broken, and its cells are of several configs "
            f"({'; '.join(several)}): run the leaderboard command whose table you want with --out {folder}; "
            "it writes the file and keeps all cells"
        )
    # these two are no keys of a config
    config = {key: values[0] for key, values in shared.items() if key not in ("device", "trust_remote_code")}
    specs = _distinct([recipe["spec"] for recipe in recipes])
    seeds = sorted({int(match[1]) for spec in specs if (match := _RANDOM.fullmatch(spec))})
    lengths = _distinct([recipe["generation"]["max_new_tokens"] for recipe in recipes])
    return {
        "models": _distinct([recipe["model"] for recipe in recipes]),
        "specs": specs,
        "tasks": _distinct([recipe["task"] for recipe in recipes]),
        "seeds": seeds if len(seeds) >= len(SEEDS) else list(SEEDS),  # a config has three at least
        "out": None,
        **config,
        "max_new_tokens": lengths[0] if len(lengths) == 1 else None,
        "published": None,
    }


def _distinct(values: Sequence[Any]) -> list[Any]:
    # not a set: values of a recipe need not have a hash
    return [value for number, value in enumerate(values) if value not in values[:number]]
