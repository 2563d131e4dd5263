# SPDX-License-Identifier: Apache-2.0
"""``vlmprune list`` and ``vlmprune show``."""

from __future__ import annotations

from dataclasses import MISSING, asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..errors import VlmPruneError
from .screen import Json, plain, print_json, stderr, stdout, table

if TYPE_CHECKING:
    from ..registry import MethodInfo, Option


def list_methods(
    families: Annotated[
        bool, typer.Option("--families", help="List the supported model families instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the methods, those of installed plug-ins included."""
    if families:
        _list_families(as_json)
        return
    from .. import registry

    infos, broken = [], []
    for name in registry.list_methods():
        try:
            infos.append(registry.method_info(name))
        except VlmPruneError as error:  # one broken plug-in shall not hide the other methods
            broken.append(error)
    if as_json:
        print_json([_as_dict(info) for info in infos])
    else:
        rows = _methods_table(infos, stdout())
        stdout().print(rows)
    for problem in (*broken, *registry.refused_plugins()):  # of other packages; what is listed works
        stderr().print(plain(f"skipped: {problem}"), style="yellow", soft_wrap=True)


DOES = "what it does"
# dropped in this order on narrow terminals; `show` and --json have all of it
_SPARE = ("options", "needs", "slot", "query", DOES)
_LEAST = {DOES: 30}  # characters; sentences in a narrower column are hard to read


def _methods_table(infos: list[MethodInfo], screen: Console) -> Table:
    """With the columns that fit: lists fold between words, and no word is ever cut."""
    rows = [_method_cells(info) for info in infos]  # column -> cell, for each method
    shown = [*rows[0]]
    for spare in (None, *_SPARE):  # first with all columns
        shown = [name for name in shown if name != spare]
        made = table()
        for name in shown:
            cells = (Text(name), *(row[name] for row in rows))
            whole = name == "method"  # the mark of a plug-in stays beside its name
            least = max(len(cell) if whole else max(map(len, cell.plain.split())) for cell in cells)
            made.add_column(name, min_width=max(least, _LEAST.get(name, 0)), overflow="fold")
        # as if on a wide screen: on the real one the minimum would be cut to its width
        if Measurement.get(screen, screen.options.update(width=1000), made).minimum <= screen.width:
            break
    for row in rows:
        made.add_row(*(row[name] for name in shown))
    if len(shown) < len(rows[0]):
        made.caption, made.caption_justify = "The rest of a method: vlmprune show METHOD", "left"
    return made


def _method_cells(info: MethodInfo) -> dict[str, Text]:
    plug_in = "" if _module(info).startswith("vlmprune.") else " (plug-in)"
    return {
        "method": Text(info.name, style="bold") + Text(plug_in, style="dim"),
        DOES: plain(info.doc.partition("\n")[0].replace("``", "") or "-"),
        "slot": Text(info.slot),
        "needs": Text(", ".join(dict.fromkeys(map(quantity, info.needs))) or "-"),
        "query": Text("yes" if info.query_aware else "no"),
        "options": Text(", ".join(option.name for option in info.options) or "-"),
        "paper": plain(info.paper or "-"),
    }


def quantity(need: str) -> str:
    """What a method reads, whatever the layer: ``show`` names that."""
    return need.partition("@")[0]


_WORDS_OF_CELLS = {"yes": "yes", "no": "no", "not measured": "?"}


def _list_families(as_json: bool) -> None:
    """What every family can do, as it was measured."""
    from ..capabilities import table as measured

    rows = measured()["families"]
    if as_json:
        print_json(rows)
        return
    count = max(len(row["methods"]) for row in rows.values())
    # capability -> "yes", "no: reason", or "not measured", of each family: a column where they differ
    able = {
        name: [_WORDS_OF_CELLS[row["capabilities"][name].partition(":")[0]] for row in rows.values()]
        for name in next(iter(rows.values()))["capabilities"]
    }
    differ = [name for name, cells in able.items() if len(set(cells)) > 1]
    # by words, so that a heading takes lines and not width
    headings = (name.replace(" ", "\n").replace("-", "-\n") for name in differ)
    shown = table("family", f"of {count}\nmethods", *headings)
    shown.columns[0].no_wrap = True  # a name that is broken cannot be searched for
    for number, (family, row) in enumerate(rows.items()):
        runs = sum(cells["runs"] == "yes" for cells in row["methods"].values())
        shown.add_row(Text(family, style="bold"), str(runs or "-"), *(able[name][number] for name in differ))
    stdout().print(shown)
    unknown = [name for name, cells in able.items() if set(cells) == {"?"}]
    nowhere = f" Not measured anywhere: {', '.join(unknown)}." if unknown else ""
    stdout().print(
        f"?: not measured. Without video, clips are images of one prompt.{nowhere} All else works: batches, "
        "beams, caches, training; --json has every method and the reasons.",
        style="dim",
    )


def show(
    method: Annotated[str, typer.Argument(help="Name of a method, as in `vlmprune list`.")],
    as_json: Json = False,
) -> None:
    """Show what a method does, needs and takes."""
    from ..registry import method_info

    info = method_info(method)
    if as_json:
        print_json(_as_dict(info))
        return
    screen = stdout()
    # only what the method does: its options are in the table below
    screen.print(plain(info.doc.split("\n\nArgs:")[0].split("\n\nExample:")[0]), style="bold")
    facts = table("", "", show_header=False)
    facts.columns[0].no_wrap = True
    for label, value in _facts(info).items():
        facts.add_row(Text(label, style="dim"), plain(value))
    screen.print(facts)
    if not info.options:
        screen.print("This method has no options.")
        return
    options = table("option", "type", "default", "meaning")
    for option in info.options:
        options.add_row(
            Text(option.name, style="bold"),
            plain(option.type),
            plain(_default(option)),
            plain(option.help or "-"),
        )
    screen.print(options)


def _facts(info: MethodInfo) -> dict[str, str]:
    # kind of a method, as Method.kind says it, -> what it does
    verbs = {
        "score": "scores every token, the highest are kept",
        "select": "chooses a set",
        "merge": "merges tokens",
        "shrink": "gives the processor a smaller picture",
        "region": "asks again about a part of the picture",
        "shorten": "drops or merges patches inside the vision tower",
        "reweight": "edits attention, chooses no tokens",
        "relogit": "edits logits of attention, chooses no tokens",
        "head_scales": "scales outputs of attention heads, chooses no tokens",
        "visible": "hides tokens from decode steps",
        "look": "hides from decode steps what they did not look at one layer before",
        "": "lets tokens leave by a schedule, whatever they are",
    }
    return {
        "example": example(info),
        "slot": info.slot,
        "acts on": "clips only" if info.clips else "pictures and clips",
        "needs": ", ".join(info.needs) or "nothing from the model",
        "how": verbs[info.kind],
        "query-aware": "yes, it reads the question" if info.query_aware else "no",
        "calibrated": "yes, it uses constants fitted on data" if info.calibrated else "no",
        "nested": "yes, more budget never removes a token" if info.nested else "no",
        "budget": _budget(info),
        "positions": f"{info.positions} (default)",
        "paper": info.paper or "none",
        "licence": f"{info.licence} (of the code that was read for facts)"
        if info.licence
        else "no other code was read",
        "defined in": _module(info),
    }


def _budget(info: MethodInfo) -> str:
    if info.counts == "own":
        return "takes none: the picture decides how many tokens stay"
    if info.counts == "both":
        return "as in @64 or @0.25; without it the picture decides how many tokens stay"
    if not info.budgeted:
        return "takes none"
    if info.slot == "inside_lm":
        return "as in @64 or @0.25; a method with a schedule of its own runs without"
    return "keep is required, as in @64 or @0.25"


# options with a default that says nothing by itself
_EXAMPLES = {"dyvte": "dyvte(exit=16)"}


def example(info: MethodInfo) -> str:
    """A spec that works on an image of any size; options without a default are left to fill in."""
    from ..registry import get

    if info.name in _EXAMPLES:
        return _EXAMPLES[info.name]
    required = ",".join(f"{option.name}=..." for option in info.options if option.default is MISSING)
    text = info.name + (f"({required})" if required else "")
    if get(info.name).wraps:
        return f"{text}+fastervlm@64"
    if not info.budgeted:
        return text
    if info.clips:
        return f"{text}@0.25"
    # schedules start late: few can meet 64 of 576 on average
    return f"{text}@0.5" if info.slot == "inside_lm" else f"{text}@64"


def spec_at(name: str, keep: int, tokens: int, depth: int) -> str:
    """A spec that keeps ``keep`` of so many tokens, or, where the schedule of a method cannot meet that in a
    language model of ``depth`` layers, a quarter or half of them.

    Methods that take no budget give their example, wrappers stand around fastervlm.
    """
    from ..core.budget import Budget
    from ..errors import SpecError
    from ..registry import get, method_info

    cls = get(name)
    # these need something that chooses tokens
    if cls.wraps or cls.slot == "attention":
        return f"{name}+fastervlm@{keep}"
    # these go by a schedule or by what the data say
    if not cls.budgeted:
        return f"dyvte(exit={depth // 2})" if name == "dyvte" else example(method_info(name))
    if cls.slot != "inside_lm":
        # the tower reads crop by crop
        return f"{name}@{keep}/crop" if cls.slot == "encoder" else f"{name}@{keep}"
    # only the schedule knows what it can meet, so budgets are tried in turn
    method, problem = cls(), None
    for budget in (Budget(keep), Budget(0.25), Budget(0.5)):
        try:
            method.cuts(depth, budget, tokens)
        except SpecError as error:
            problem = error
            continue
        return f"{name}@{budget}"
    raise SpecError(f"{name} can meet neither {keep} tokens nor half of {tokens}: {problem}")


def _default(option: Option) -> str:
    return "required" if option.default is MISSING else repr(option.default)


def _module(info: MethodInfo) -> str:
    from ..registry import get

    return get(info.name).__module__


def _as_dict(info: MethodInfo) -> dict[str, Any]:
    options = [
        {
            "name": option.name,
            "type": option.type,
            "required": option.default is MISSING,
            "help": option.help,
            # MISSING is nothing that JSON can hold
            "default": None if option.default is MISSING else option.default,
        }
        for option in info.options
    ]
    return {**asdict(info), "options": options, "example": example(info), "module": _module(info)}
