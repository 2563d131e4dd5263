# SPDX-License-Identifier: Apache-2.0
"""Measure what every family can do and write it down, as data and as a table.

    python docs/capabilities.py                      all of it, half an hour of one core
    python docs/capabilities.py --jobs 4             the same with four families at a time
    python docs/capabilities.py --family qwen3_vl    one family, the others as they were
    python docs/capabilities.py --method mine        one method in every family, the others as they were,
                                                     or not measured in a family that is new
    python docs/capabilities.py --quick              without torch.compile and device_map, which take longest
    python docs/capabilities.py --least              of methods only whether they run, else as --quick

Writes vlmprune/assets/capabilities.json and docs/capabilities.md. A failing check stops it: a table must not
hide one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

from vlmprune.capabilities import ASSET
from vlmprune.models import families
from vlmprune.testing.capabilities import (
    CAPABILITIES,
    OF_FEATURES,
    OF_METHODS,
    OPTIONS,
    SLOW,
    SPEC,
    measure,
    method_names,
    or_not,
    spec_for,
)
from vlmprune.testing.conformance import default_spec

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "vlmprune" / "assets" / ASSET, ROOT / "docs" / "capabilities.md"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what every family can do.")
    parser.add_argument(
        "--family", action="append", choices=families(), help="only this one; may be repeated"
    )
    parser.add_argument(
        "--method", action="append", choices=method_names(), help="only this one; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="without what takes longest")
    parser.add_argument("--least", action="store_true", help="of methods only whether they run")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    arguments = parser.parse_args()
    known = json.loads(DATA.read_text(encoding="utf-8"))["families"] if DATA.exists() else {}
    chosen = arguments.family or families()
    rows = [known.get(family, {}) if arguments.method else {} for family in chosen]
    methods = [arguments.method or method_names()] * len(chosen)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        left_out = (SLOW if arguments.quick or arguments.least else (), OF_METHODS if arguments.least else ())
        made = pool.map(measured, chosen, methods, rows, [left_out] * len(chosen))
        for family, row in zip(chosen, made, strict=True):
            known[family] = row
            write({name: known[name] for name in families() if name in known})
            print(family, "done", flush=True)


def measured(
    family: str,
    methods: Sequence[str],
    known: Mapping[str, Any],
    left_out: tuple[Sequence[str], Sequence[str]],
) -> dict[str, Any]:
    """Some methods of one family; the rest as ``known``, or not measured where nothing is known of them.

    Args:
        left_out: what is not measured, of the family and of its methods.
    """
    of_family, of_methods = left_out[0], (*left_out[0], *left_out[1])
    torch.set_num_threads(1)
    here = {"transformers": transformers.__version__, "torch": torch.__version__, "device": "cpu"}
    if known and known["measured_with"] != here:
        old = known["measured_with"]
        raise SystemExit(
            f"{family} was measured with {old}, here is {here}; measure it whole: leave --method out"
        )
    found = {name: measure(family, name, of_methods) for name in methods}
    rest = {name: left_alone(name) for name in method_names()}
    rest |= {name: row for name, row in known.get("methods", {}).items() if name in rest}
    return {
        "measured_with": here,
        "capabilities": known.get("capabilities")
        or {name: or_not(family, spec_for(family), name, of_family) for name in CAPABILITIES},
        "methods": {name: found.get(name) or rest[name] for name in method_names()},
    }


def left_alone(method: str) -> dict[str, str]:
    """What is said of a method that was never measured on a family."""
    return {"spec": default_spec(method), "runs": f"not measured: {method} was left out"}


def write(rows: dict[str, dict]) -> None:
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps({"spec": SPEC, "families": rows}, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")


def page(rows: dict[str, dict]) -> str:
    """The tables in Markdown, with reasons below them."""
    notes: list[str] = []
    text = "# What every family can do\n\n"
    text += (
        "Made by `docs/capabilities.py` from conformance checks on tiny random models; not edited by hand.\n"
    )
    text += f"\n## Families\n\nMeasured with `{SPEC}`, or with `{OF_FEATURES}` where nothing is read of the "
    text += "tower.\n\n"
    text += grid(rows, lambda row: {name: mark(one, notes) for name, one in row["capabilities"].items()})
    text += (
        "\n## Methods\n\nEach with its default options and a quarter of the tokens, or the least "
        "that its schedule allows. "
    )
    text += f"A yes covers {', '.join(OF_METHODS)} as far as the family has them;\nexceptions are noted. "
    text += "`vlmprune list --families --json` has every cell of families x methods x capabilities.\n\n"
    text += grid(rows, lambda row: {name: method_mark(name, row, notes) for name in row["methods"]})
    return text + "\n" + "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)) + "\n"


def grid(rows: dict[str, dict], cells: Callable[[dict], dict[str, str]]) -> str:
    names = list(cells(next(iter(rows.values()))))
    text = f"| family | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}\n"
    return text + "".join(
        f"| `{family}` | {' | '.join(cells(row).values())} |\n" for family, row in rows.items()
    )


def mark(found: str, notes: list[str]) -> str:
    if found == "yes":
        return "yes"
    word, _, reason = found.partition(": ")
    return f"{'-' if word == 'not measured' else word} ({noted(reason, notes)})"


def noted(note: str, notes: list[str]) -> int:
    """The number of a note, which is added where it is new."""
    if note not in notes:
        notes.append(note)
    return notes.index(note) + 1


def method_mark(name: str, row: dict, notes: list[str]) -> str:
    """A method on a family: whether it runs, as what, and where it can do less than the family."""
    found = row["methods"][name]
    if found["runs"] != "yes":
        return mark(found["runs"], notes)
    option = found["spec"].rpartition("@")[0]
    named = any(one in option for one in OPTIONS.values())
    numbers = [noted(f"as {option}", notes)] if named else []
    less = {
        one: found[one]
        for one in OF_METHODS
        if found[one].split(":")[0] not in ("not measured", row["capabilities"][one].split(":")[0])
    }
    numbers += [noted(f"{one}: {reason}", notes) for one, reason in less.items()]
    return f"yes ({', '.join(map(str, numbers))})" if numbers else "yes"


if __name__ == "__main__":
    main()
