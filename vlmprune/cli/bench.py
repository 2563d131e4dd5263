# SPDX-License-Identifier: Apache-2.0
"""``vlmprune bench`` and ``vlmprune plan``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SpecError, VlmPruneError
from .screen import Json, complain, plain, print_json, stderr, stdout, table

if TYPE_CHECKING:
    from ..speed.card import LeftOut
    from ..speed.row import SpeedRow

PRUNE = ["random@0.125", "fastervlm@0.125", "divprune@0.125", "fastv(layer=2)@0.5"]
# as in vlmprune/speed/shapes.py, which is slow to import
SHAPES = ("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b")
MODEL = SHAPES[0]
MODEL_HELP = f"A shape ({', '.join(SHAPES)}: random weights, no download), 'tiny', a folder, or an HF id."
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
PLANNED = "fastervlm@0.125"
Batch = Annotated[int, typer.Option(min=1, help="Equal prompts at once.")]
Answer = Annotated[int, typer.Option(min=2, help="New tokens of a whole answer.")]
TextTokens = Annotated[
    int | None, typer.Option("--text", min=2, help="Text tokens of the prompt of a shape; default 60.")
]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians and 20/80 % are over them.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
Scale = Annotated[
    int | None, typer.Option(min=1, help="Divide width and depth of a shape; default 1 on CUDA, 4 elsewhere.")
]
COUNT_HELP = "Count what methods ask of a device instead, on tiny models; needs none."
Count = Annotated[bool, typer.Option("--count", help=COUNT_HELP)]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def bench(
    context: typer.Context,
    model: Annotated[
        list[str] | None, typer.Option(help=f"{MODEL_HELP} May be repeated; default {MODEL}.")
    ] = None,
    prune: Annotated[
        list[str] | None, typer.Option(help="Spec; may be repeated. Default: " + ", ".join(PRUNE) + ".")
    ] = None,
    batch: Batch = 1,
    answer: Answer = 32,
    text: TextTokens = None,
    rounds: Rounds = 9,
    answers: Annotated[int, typer.Option(min=1, help="Rounds of whole answers.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    scale: Scale = None,
    out: Annotated[
        Path | None, typer.Option(help="A run folder, whose report shows the card, or a .json file.")
    ] = None,
    count: Count = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Time methods against the dense model and against tokens that cost nothing, on this machine."""
    if count:
        return _count(context, prune, model, out, as_json)
    specs = _specs(prune or PRUNE)
    _check_out(out)  # now, and not after minutes of timing

    from ..plain import plain as plain_values
    from ..speed.card import Effort, LeftOut, measure, save
    from ..speed.conditions import conditions
    from ..speed.shapes import unsupported
    from ..speed.workload import check_of_shapes, make_workload

    check_of_shapes(model or [MODEL], text, scale)
    rows: list[SpeedRow] = []
    left_out: list[LeftOut] = []
    missing = unsupported()
    start, effort = conditions(), Effort(rounds, answers)  # before this command adds a load of its own
    build = partial(make_workload, batch=batch, text=text, device=device, dtype=dtype, scale=scale)
    with stderr().status("") as status:
        for name in model or [MODEL]:
            if name in missing and len(model or []) > 1:  # the others are still worth timing
                left_out.append(LeftOut(name, None, missing[name]))
                continue
            status.update(f"building {name}")
            workload = build(name, trust_remote_code=trust_remote_code)
            found, refused = measure(workload, specs, answer_tokens=answer, effort=effort, tell=status.update)
            rows, left_out = rows + found, left_out + refused
    if out is not None:
        save(rows, out, start)
    listed = {"rows": plain_values(rows), "left_out": plain_values(left_out)}
    if as_json:
        print_json({**listed, "unsupported": missing, "conditions": start})
    else:
        _show_card(rows, start, missing)
    _complain_of(left_out)


def _check_out(out: Path | None) -> None:
    if out is None:
        return
    if not (out.is_dir() or (out.suffix == ".json" and out.absolute().parent.is_dir())):
        raise SpecError(f"--out {str(out)!r}; expected a folder that is there, or a .json file in one")
    from ..speed.card import check_place

    check_place(out)


def _refuse_timing(context: typer.Context) -> None:
    """Refuse options that say how to take times beside --count, which takes none."""
    known = {"model", "prune", "out", "count", "as_json"}
    beside = []
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if option.name not in known and source is not None and source.name == "COMMANDLINE":
            beside.append(option.opts[0])
    if beside:
        raise SpecError(
            f"{', '.join(beside)} given beside --count, which runs tiny models once and takes no times; "
            "expected --prune, --model, --out or --json; leave the others out"
        )


def _complain_of(left_out: list[LeftOut]) -> None:
    for entry in left_out:
        named = " ".join(filter(None, (entry.model, entry.spec)))
        complain(VlmPruneError(f"{named}: {entry.reason}"))
    # only now: what could be timed is shown and saved
    if left_out:
        raise typer.Exit(2)


def _count(
    context: typer.Context,
    prune: list[str] | None,
    families: list[str] | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Launches, waits and uploads that pruning adds to a prefill and to a decode step."""
    _refuse_timing(context)
    if out is not None and (out.suffix != ".csv" or not out.absolute().parent.is_dir()):
        raise SpecError(f"--out {str(out)!r}; expected a .csv file in a folder that is there")

    from ..plain import plain as plain_values
    from ..registry import attachable_methods, get
    from ..testing.device_counts import FAMILIES, CountRow, count_rows, write

    # what is counted is a prompt with pictures
    of_pictures = [name for name in attachable_methods() if name != "dense" and not get(name).clips]
    specs = _specs(prune) if prune else of_pictures
    rows: list[CountRow] = []
    with stderr().status("") as status:
        for row in count_rows(specs, families or FAMILIES):
            status.update(f"{row.family} {row.spec}")
            rows.append(row)
    if out is not None:
        write(rows, out)
    if as_json:
        return print_json({"rows": plain_values(rows)})
    shown = table("family", "spec", "batch", "phase", "launches", "waits", "uploads")
    for row in rows:
        numbers = (row.launches, row.waits, row.uploads)  # more than dense asks for, so with a sign
        shown.add_row(
            *map(plain, (row.family, row.spec, row.batch, row.phase)), *(f"{n:+d}" for n in numbers)
        )
    stdout().print(shown)


def plan(
    spec: Annotated[
        str | None, typer.Argument(help=f"What to prune with, as in fastervlm@64; {PLANNED} without.")
    ] = None,
    prune: Annotated[str | None, typer.Option(help="The same as an option, as in run and bench.")] = None,
    model: Model = MODEL,
    batch: Batch = 1,
    answer: Answer = 128,
    text: TextTokens = None,
    worth: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of the time that pruning must save.")
    ] = 0.05,
    rounds: Rounds = 5,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    scale: Scale = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Say whether pruning pays on this machine, and from how long a prompt, batch and answer on."""
    if spec is not None and prune is not None:
        raise SpecError(f"{spec!r} and --prune {prune!r} were given; plan takes one spec: leave one out")

    from ..speed.card import Effort
    from ..speed.plan import plan as make_plan
    from ..speed.plan import plannable
    from ..speed.workload import make_workload

    # the default last: only where neither the argument nor the option was given
    wanted = plannable(next(given for given in (spec, prune, PLANNED) if given is not None))
    build = partial(make_workload, batch=batch, text=text, device=device, dtype=dtype, scale=scale)
    with stderr().status(f"building {model}") as status:
        workload = build(model, trust_remote_code=trust_remote_code)
        found = make_plan(
            workload, wanted, answer_tokens=answer, worth=worth, effort=Effort(rounds), tell=status.update
        )
    print_json(found) if as_json else _show_plan(found)


def _specs(texts: list[str]) -> list[str]:
    """Checked before any model is built."""
    from ..spec import parse

    specs = [parse(text) for text in texts]
    for spec in specs:
        spec.build(require_budget=True)
    return list(map(str, specs))


def _show_card(rows: list[SpeedRow], start: dict[str, Any], missing: dict[str, str]) -> None:
    from ..evaluation.report.speed import EXPLAINED, SPEED_COLUMNS, speed_groups, speed_notes
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
    load = "not known" if start["load_before"] is None else f"{start['load_before']:.1f}"
    # a wheel comes from no checkout, but has its version
    code = f"commit {start['commit']}" if start["commit"] else f"vlmprune {start['versions']['vlmprune']}"
    made = f"load {load} at the start, {code}, {start['date']}"
    screen.print(plain(f"{start['processor']}, {made}"), style="dim")


def _show_plan(found: dict[str, Any]) -> None:
    # the advice, and what it is worth here
    screen, case = stdout(), found["case"]
    prune = found["advice"] == "prune"
    what = (
        f"batch {case['batch']}, {case['visual_tokens']} visual and {case['text_tokens']} text tokens, "
        f"{case['answer_tokens']} answer tokens"
    )
    screen.print(
        plain(f"{'Prune with ' + found['spec'] if prune else 'Do not prune'}: {found['model']}, {what}"),
        style="bold green" if prune else "bold yellow",
    )
    screen.print(plain(_expected(found)))
    # how far each number of the case may change
    rows = table("number of", f"{found['spec']} pays", "here")
    names = {"visual_tokens": "visual tokens", "text_tokens": "text tokens", "answer_tokens": "answer tokens"}
    for axis, name in (names | {"batch": "prompts at once"}).items():
        # where speed/plan.py begins to look
        low = 2 if axis == "visual_tokens" else 1
        rows.add_row(name, _range(found["ranges"][axis], low), str(case[axis]))
    screen.print(rows)
    screen.print(
        plain(
            "Each line changes one number and leaves the others as above. Beyond what was measured it is an "
            "estimate."
        ),
        style="dim",
    )
    # what it rests on
    costs = found["costs"]
    screen.print(
        plain(
            f"Choosing tokens takes {costs['choose'] * 1e3:.1f} ms per prompt, the vision tower "
            f"{costs['encode'] * 1e3:.1f} ms. {found['device']}, {found['dtype']}, attention: "
            f"{found['attention']}."
        ),
        style="dim",
    )
    if found["note"]:
        screen.print(plain(found["note"]), style="yellow")


def _expected(found: dict[str, Any]) -> str:
    """What is predicted, how far off predictions were, and how much must be saved for an advice to prune."""
    gain, least, check = found["gain"], found["threshold"], found["check"]
    said = f"Predicted: {found['pruned_s']:.3g} s instead of {found['dense_s']:.3g} s, {abs(gain):.1%} "
    said += (
        f"{'saved' if gain > 0 else 'lost'}. Prediction error: {check['error']:.1%} of the time (for answers "
        "of "
    )
    said += (
        f"{check['answer_tokens']} tokens {check['gain_foreseen']:+.1%} were predicted and "
        f"{check['gain']:+.1%} measured). "
    )
    if least > found["worth"]:
        return said + f"Pruning is advised where more than that is saved, here {least:.1%}."
    return said + f"Pruning is advised where more than {least:.1%} is saved (--worth)."


def _range(pays: dict[str, int] | None, lowest: int) -> str:
    """``from 300 on``."""
    if pays is None:
        return "never"
    low, high = pays["from"] > lowest, pays["to"] < pays["limit"]
    if low and high:
        return f"from {pays['from']} to {pays['to']}"
    if low:
        return f"from {pays['from']} on"
    return f"up to {pays['to']}" if high else f"always (1 to {pays['limit']} looked at)"
