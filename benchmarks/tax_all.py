# SPDX-License-Identifier: Apache-2.0
"""The pruning tax of all methods in one run, round after round, so that what disturbs a round hits all alike.

    python benchmarks/tax.py --all --repeats 15 --out benchmarks/results/tax_all.jsonl

A round times the dense model once and, of every method, the pruned side, the free side, and what capture adds
to the encoder, each pair after an uncounted run of the same model; what these are says tax.py. Capture is
watched on a tower of one block, or, where a method reads several blocks, on one of all blocks with narrow
feed-forward layers. There a run takes a second or more, and what capture adds is lost in its noise: it stands
in its column, and the tax leaves it out. A round is written to the file when it ends. The same command goes
on with the rounds that lack, also days later; each round knows under which conditions it was measured. The
table beside the file, ``tax_all.csv``, is made anew each time: its column "tax" is what a method's card
quotes where it exceeds 1.05. Methods that this model cannot run have a line with the reason.

The vision tower is left out; what shortens it has no tax in this sense: ``vlmprune bench`` times it whole.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from llava_shape import SIZES, Prompt, build
from tax import EncodeOnly

import vlmprune
from vlmprune.cli.catalogue import spec_at
from vlmprune.core.method import needs_of
from vlmprune.errors import SpecError, VlmPruneError
from vlmprune.registry import attachable_methods, get
from vlmprune.speed.conditions import conditions
from vlmprune.speed.timing import Entry, race, ratios, spread

KEEP = 64
SAME = ("size", "dtype", "device", "clock", "threads", "keep")  # what all rounds of a file share
COLUMNS = (
    "spec",
    "tax",
    "p20",
    "p80",
    "speedup",
    "ideal",
    "choose_ms",
    "capture_ms",
    "tower",
    "kept",
    "rounds",
    "why_not",
)


@dataclass(frozen=True)
class Contender:
    """A spec that is timed: on the whole model, and while another one only encodes.

    Args:
        session, prompt: on the whole model, and a prompt that was encoded while attached.
        kept: visual tokens that are left.
        watcher, encode: a session on a model with a lean tower, and a call of that tower.
        tower: which lean tower: "one block", or "narrow", where a method reads several blocks.
    """

    session: Any
    prompt: Prompt
    kept: int
    watcher: Any
    encode: Callable[[], Any]
    tower: str


def every_method() -> list[str]:
    """All built-in methods but the dense model, which is the measure."""
    names = [name for name in attachable_methods() if get(name).__module__.startswith("vlmprune.")]
    return [name for name in names if name != "dense"]


def contenders(
    methods: Sequence[str], keep: int, model: Any, lean: Mapping[str, Any], size: Any
) -> tuple[dict[str, Contender], dict[str, str]]:
    """What can be timed, by spec, and why the rest cannot, by method."""
    found, left_out = {}, {}
    for name in methods:
        try:
            spec = spec_at(name, keep, size.tokens, size.layers)
            session = vlmprune.prune(model, spec)
            if session.in_tower:
                left_out[name] = "acts inside the vision tower; time it with vlmprune bench"
                continue
            prompt, tower = Prompt(model, size), tower_for(session)
            prompt.prepare(session)
            kept = sum(session.last.realised_tokens)
            watcher, encode = vlmprune.prune(lean[tower], spec), Prompt(lean[tower], size).encode
            found[spec] = Contender(session, prompt, kept, watcher, encode, tower)
        except VlmPruneError as error:
            left_out[name] = str(error)
    return found, left_out


def tower_for(session: Any) -> str:
    """The leanest tower that shows all that a method captures, under a language model that it can cut."""
    needs = [need for slot in session.slots.values() for need in needs_of(slot.method)]
    plain = set(session.slots) == {"before_lm"} and len({need.layer for need in needs}) <= 1
    return "one block" if plain else "narrow"


def one_round(rivals: Mapping[str, Contender], number: int, clock: str, warmup: int) -> dict[str, Any]:
    """Seconds of everything, once; another one begins each round."""
    chosen: dict[str, float] = {}

    def pruned(spec: str, rival: Contender) -> None:
        rival.prompt.merged()
        chosen[spec] = rival.session.last.seconds

    entries: dict[str, Entry] = {"dense": (None, next(iter(rivals.values())).prompt.merged)}
    for spec, rival in rivals.items():
        # the first run of another model pays for memory that the ones behind it find: it is not counted
        entries[f"settle model {spec}"] = (None, rival.prompt.given)
        entries[f"pruned {spec}"] = (rival.session, lambda spec=spec, rival=rival: pruned(spec, rival))
        entries[f"free {spec}"] = (None, rival.prompt.given)
        entries[f"settle tower {spec}"] = (None, rival.encode)
        entries[f"bare {spec}"] = (None, rival.encode)
        entries[f"watched {spec}"] = (EncodeOnly(rival.watcher), rival.encode)
    names = list(entries)
    start = number * len(names) // 7 % len(names)  # a race of one round cannot rotate by itself
    turned = {name: entries[name] for name in names[start:] + names[:start]}
    seconds = {name: values[0] for name, values in race(turned, 1, warmup=warmup, clock=clock).items()}
    parts = ("pruned", "free", "bare", "watched")
    return {
        "dense": seconds["dense"],
        "specs": {
            spec: {part: seconds[f"{part} {spec}"] for part in parts}
            | {"choose": chosen[spec], "kept": rival.kept, "tower": rival.tower}
            for spec, rival in rivals.items()
        },
    }


def read(path: Path, same: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rounds of a file; what a kill left of its last line is dropped, and so is nothing else."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    rounds: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
    for number, one in enumerate(rounds, 1):
        other = {key: one["same"][key] for key in SAME if one["same"][key] != same[key]}
        if other:
            wanted = {key: same[key] for key in other}
            raise SpecError(
                f"{path}: round {number} was measured with {other}, not {wanted}; give another --out, or the "
                "same options"
            )
    return rounds


def rows(rounds: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row per spec: medians over its rounds, and of ratios the median of those within a round."""
    made = []
    for spec in dict.fromkeys(spec for one in rounds for spec in one["specs"]):
        mine = [(one["dense"], one["specs"][spec]) for one in rounds if spec in one["specs"]]
        dense, free = [first for first, _ in mine], [parts["free"] for _, parts in mine]
        capture = median(parts["watched"] - parts["bare"] for _, parts in mine)
        seen = mine[-1][1]["tower"] == "one block"
        pruned = [parts["pruned"] + (capture if seen else 0.0) for _, parts in mine]
        tax = ratios(pruned, free)
        low, high = spread(tax)
        made.append(
            {
                "spec": spec,
                "tax": round(median(tax), 3),
                "p20": round(low, 3),
                "p80": round(high, 3),
                "speedup": round(median(ratios(dense, pruned)), 2),
                "ideal": round(median(ratios(dense, free)), 2),
                "choose_ms": round(median(parts["choose"] for _, parts in mine) * 1e3, 2),
                "capture_ms": round(capture * 1e3, 2),
                "tower": mine[-1][1]["tower"],
                "kept": mine[-1][1]["kept"],
                "rounds": len(mine),
                "why_not": "",
            }
        )
    empty = dict.fromkeys(COLUMNS, "")
    return [*made, *(empty | {"spec": spec, "rounds": 0, "why_not": why} for spec, why in left_out.items())]


def write(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The table as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


@torch.inference_mode()
def main(options: argparse.Namespace) -> int:
    """Measure the rounds that lack, and write the table."""
    size, dtype, keep = SIZES[options.size], getattr(torch, options.dtype), int(options.keep or KEEP)
    same = {key: getattr(options, key) for key in SAME} | {"keep": keep}
    rounds = read(options.out, same)
    model = build(size, options.device, dtype)
    lean = {
        "one block": build(size, options.device, dtype, shallow=True),
        "narrow": build(replace(size, vision_intermediate=64), options.device, dtype),
    }
    rivals, left_out = contenders(every_method(), keep, model, lean, size)
    first = len(rounds)
    for number in range(first, options.repeats):
        start = conditions()
        # once per process, while everything is new
        warmup = options.warmup if number == first else 0
        made = {"same": same, **start, **one_round(rivals, number, options.clock, warmup)}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(made) + "\n")
        print(f"round {number + 1} of {options.repeats}", flush=True)
        rounds.append(made)
    table = rows(rounds, left_out)
    write(table, options.out.with_suffix(".csv"))
    for row in table:
        print(
            f"{row['spec']}: " + (row["why_not"] or f"tax {row['tax']} (p20 {row['p20']}, p80 {row['p80']})")
        )
    return 0
