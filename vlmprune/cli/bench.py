# SPDX-License-Identifier: Apache-2.0
"""``vlmprune bench`` and ``vlmprune plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SpecError, VlmPruneError
from .screen import Json, complain, plain, print_json, stderr, stdout, table

if TYPE_CHECKING:
    from ..benchmarks.speed.row import SpeedRow

PRUNE = ["random@0.125", "fastervlm@0.125", "divprune@0.125", "fastv(layer=2)@0.5"]
MODEL = "llava-1.5-7b"
Model = Annotated[
    str, typer.Option(help="A shape such as llava-1.5-7b (random weights, no download), 'tiny', a folder, or an HF id.")
]
Batch = Annotated[int, typer.Option(min=1, help="Equal prompts at once.")]
Answer = Annotated[int, typer.Option(min=2, help="New tokens of a whole answer.")]
TextTokens = Annotated[int, typer.Option("--text", min=2, help="Text tokens of the prompt of a shape.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians and 20/80 % are over them.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
Scale = Annotated[int | None, typer.Option(min=1, help="Divide width and depth of a shape; default 1 on CUDA, 4 elsewhere.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def bench(
    model: Annotated[list[str] | None, typer.Option(help="As in plan; may be repeated. Default llava-1.5-7b.")] = None,
    prune: Annotated[list[str] | None, typer.Option(help="Spec; may be repeated. Default: " + ", ".join(PRUNE) + ".")] = None,
    batch: Batch = 1,
    answer: Answer = 32,
    text: TextTokens = 60,
    rounds: Rounds = 9,
    answers: Annotated[int, typer.Option(min=1, help="Rounds of whole answers.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    scale: Scale = None,
    out: Annotated[Path | None, typer.Option(help="A run folder, whose report shows the card, or a .json file.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Time methods against the dense model and against tokens that cost nothing, on this machine."""
    specs = _specs(prune or PRUNE)
    if out is not None and not (out.is_dir() or (out.suffix == ".json" and out.absolute().parent.is_dir())):
        raise SpecError(f"--out {str(out)!r}; expected a folder that is there, or a .json file in one")

    from ..benchmarks.plain import plain as plain_values
    from ..benchmarks.speed.card import Effort, LeftOut, measure, save
    from ..benchmarks.speed.conditions import conditions
    from ..benchmarks.speed.shapes import unsupported
    from ..benchmarks.speed.workload import make_workload

    rows: list[SpeedRow] = []
    left_out: list[LeftOut] = []
    missing = unsupported()
    start, effort = conditions(), Effort(rounds, answers)
    with stderr().status("") as status:
        for name in model or [MODEL]:
            if name in missing and len(model or []) > 1:  # the others are still worth timing
                left_out.append(LeftOut(name, None, missing[name]))
                continue
            status.update(f"building {name}")
            options = {"batch": batch, "text": text, "device": device, "dtype": dtype, "scale": scale}
            workload = make_workload(name, **options, trust_remote_code=trust_remote_code)
            found, refused = measure(workload, specs, answer_tokens=answer, effort=effort, tell=status.update)
            rows, left_out = rows + found, left_out + refused
    if out is not None:
        save(rows, out)
    if as_json:
        listed = {"rows": plain_values(rows), "left_out": plain_values(left_out)}
        print_json({**listed, "unsupported": missing, "conditions": start})
    else:
        _show_card(rows, start, missing)
    for entry in left_out:
        named = " ".join(filter(None, (entry.model, entry.spec)))
        complain(VlmPruneError(f"{named}: {entry.reason}"))
    if left_out:
        raise typer.Exit(2)


def plan(
    spec: Annotated[str, typer.Argument(help="What to prune with, as in fastervlm@64.")] = "fastervlm@0.125",
    model: Model = MODEL,
    batch: Batch = 1,
    answer: Answer = 128,
    text: TextTokens = 60,
    worth: Annotated[float, typer.Option(min=0, max=1, help="Least share of the time that pruning must save.")] = 0.05,
    rounds: Rounds = 5,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    scale: Scale = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Say whether pruning pays here, and from which prompt, batch and answer length; or not to prune."""
    (spec,) = _specs([spec])

    from ..benchmarks.speed.card import Effort
    from ..benchmarks.speed.plan import plan as make_plan
    from ..benchmarks.speed.workload import make_workload

    with stderr().status(f"building {model}") as status:
        options = {"batch": batch, "text": text, "device": device, "dtype": dtype, "scale": scale}
        workload = make_workload(model, **options, trust_remote_code=trust_remote_code)
        found = make_plan(workload, spec, answer_tokens=answer, worth=worth, effort=Effort(rounds), tell=status.update)
    print_json(found) if as_json else _show_plan(found)


def _specs(texts: list[str]) -> list[str]:
    """Checked before any model is built."""
    from ..spec import parse

    specs = [parse(text) for text in texts]
    for spec in specs:
        spec.build(require_budget=True)
    return list(map(str, specs))


def _show_card(rows: list[SpeedRow], start: dict[str, Any], missing: dict[str, str]) -> None:
    from ..benchmarks.report.speed import EXPLAINED, SPEED_COLUMNS, speed_groups, speed_notes
    from .board import fitting, grid

    screen = stdout()
    for group in speed_groups(rows):
        screen.print(plain(group.title), style="bold")
        screen.print(grid(fitting(SPEED_COLUMNS, group.rows, screen), group.rows))
    for note in speed_notes(rows):
        screen.print(plain(note), style="yellow")
    screen.print(plain(EXPLAINED))
    for name, reason in missing.items():
        screen.print(plain(f"Not measured: {name}: {reason}."), style="dim")
    made = f"load {start['load_before']:.1f} at the start, commit {start['commit']}, {start['date']}"
    screen.print(plain(f"{start['processor']}, {made}"), style="dim")


def _show_plan(found: dict[str, Any]) -> None:
    screen, case, check = stdout(), found["case"], found["check"]
    prune = found["advice"] == "prune"
    what = (
        f"batch {case['batch']}, {case['visual_tokens']} visual and {case['text_tokens']} text tokens, "
        f"{case['answer_tokens']} answer tokens"
    )
    gain, least = found["gain"], found["threshold"]
    screen.print(
        plain(f"{'Prune with ' + found['spec'] if prune else 'Do not prune'}: {found['model']}, {what}"),
        style="bold green" if prune else "bold yellow",
    )
    change = f"{abs(gain):.1%} {'saved' if gain > 0 else 'lost'}"
    screen.print(
        plain(
            f"expected {found['pruned_s']:.3g} s instead of {found['dense_s']:.3g} s, {change}; "
            f"it pays from {least:.1%} on" + (", which is how wrong the cost model was" if least > found["worth"] else "")
        )
    )
    rows = table(f"{found['spec']} pays", "", "")
    names = {"visual_tokens": "visual tokens", "text_tokens": "text tokens", "answer_tokens": "answer tokens", "batch": "batch"}
    for axis, name in names.items():
        rows.add_row(name, _range(found["ranges"][axis], 2 if axis == "visual_tokens" else 1), f"here {case[axis]}")
    screen.print(rows)
    screen.print(
        plain("One length is changed at a time, the rest is as above; beyond the measured points this is extrapolated."),
        style="dim",
    )
    costs = found["costs"]
    screen.print(
        plain(
            f"Choosing costs {costs['choose'] * 1e3:.1f} ms per prompt, the vision tower {costs['encode'] * 1e3:.1f} ms. "
            f"Held against answers of {check['answer_tokens']} tokens: {check['gain_foreseen']:+.1%} foreseen, "
            f"{check['gain']:+.1%} measured. {found['device']}, {found['dtype']}, attention: {found['attention']}."
        ),
        style="dim",
    )
    if found["note"]:
        screen.print(plain(found["note"]), style="yellow")


def _range(pays: dict[str, int] | None, lowest: int) -> str:
    if pays is None:
        return "at no length"
    low, high = pays["from"] > lowest, pays["to"] < pays["limit"]
    if not low and not high:
        return f"everywhere, up to {pays['limit']}"
    return " ".join([f"from {pays['from']}"] * low + [f"up to {pays['to']}"] * high)
