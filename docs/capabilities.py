# SPDX-License-Identifier: Apache-2.0
"""Measure what every family can do and write it down, as data and as a table.

    python docs/capabilities.py                      all of it, a few minutes
    python docs/capabilities.py --family qwen3_vl    one family, the others as they were
    python docs/capabilities.py --slow               torch.compile as well

Writes vlmprune/assets/capabilities.json and docs/capabilities.md. A failing check stops it: a table must not hide one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers

from vlmprune.models import families
from vlmprune.testing.capabilities import ASSET, CAPABILITIES, SPEC, measure, method_names

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "vlmprune" / "assets" / ASSET, ROOT / "docs" / "capabilities.md"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what every family can do.")
    parser.add_argument("--family", action="append", choices=families(), help="only this one; may be repeated")
    parser.add_argument("--slow", action="store_true", help="measure what takes tens of seconds too, such as torch.compile")
    arguments = parser.parse_args()
    chosen = arguments.family or families()
    torch.set_num_threads(1)
    known = json.loads(DATA.read_text(encoding="utf-8"))["families"] if DATA.exists() else {}
    for family in chosen:
        known[family] = {
            "measured_with": {"transformers": transformers.__version__, "torch": torch.__version__, "device": "cpu"},
            "capabilities": {name: measure(family, capability=name, slow=arguments.slow) for name in CAPABILITIES},
            "methods": {name: measure(family, method=name) for name in method_names()},
        }
        write({name: known[name] for name in families() if name in known})
        print(family, "done", flush=True)


def write(rows: dict[str, dict]) -> None:
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps({"spec": SPEC, "families": rows}, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")


def page(rows: dict[str, dict]) -> str:
    """The tables in Markdown, with reasons below them."""
    notes: list[str] = []
    text = "# What every family can do\n\n"
    text += "Made by `docs/capabilities.py` from conformance checks on tiny random models; not edited by hand.\n"
    text += f"Capabilities are measured with `{SPEC}`, methods with `vlmprune verify METHOD` as their default spec.\n"
    for kind in ("capabilities", "methods"):
        names = list(next(iter(rows.values()))[kind])
        text += f"\n## {kind.capitalize()}\n\n| family | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}\n"
        for family, row in rows.items():
            text += f"| `{family}` | {' | '.join(mark(row[kind][name], notes) for name in names)} |\n"
    return text + "\n" + "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)) + "\n"


def mark(cell: str, notes: list[str]) -> str:
    if cell == "yes":
        return "yes"
    word, _, reason = cell.partition(", " if cell.startswith("yes") else ": ")
    if reason not in notes:
        notes.append(reason)
    return f"{'-' if word == 'not measured' else word} ({notes.index(reason) + 1})"


if __name__ == "__main__":
    main()
