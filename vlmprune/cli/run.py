# SPDX-License-Identifier: Apache-2.0
"""``vlmprune run``: one picture, one question, with and without pruning."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import InvariantError, SpecError, UnsupportedError, VlmPruneError
from .screen import Json, plain, print_json, stderr, stdout, table
from .threads import Threads, limit_threads

if TYPE_CHECKING:
    from ..core.report import Report
    from ..spec import Spec

QUESTION = "What is in the picture?"


class Answer(NamedTuple):
    """What one call of generate said and how long it took."""

    text: str
    tokens: int
    first: float  # seconds to the first new token
    total: float


def run(
    context: typer.Context,
    image: Annotated[
        str | None, typer.Argument(help="Picture file; without it, one that the package draws.")
    ] = None,
    question: Annotated[
        str, typer.Argument(help="What to ask; without a picture, 'tiny' is asked what it can know.")
    ] = QUESTION,
    model: Annotated[str, typer.Option(help="'tiny', a folder, or an HF id.")] = "tiny",
    prune: Annotated[str, typer.Option(help="Spec, as in fastervlm@64 or divprune@0.25.")] = "fastervlm@0.25",
    draw: Annotated[Path | None, typer.Option(help="Write the picture with the kept patches here.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    dense: Annotated[bool, typer.Option(help="Also run without pruning, to compare.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    threads: Threads = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer a question about a picture with pruned visual tokens, beside the dense answer."""
    if not question.strip():
        raise SpecError(
            "the question is empty; expected text, such as 'What is in the picture?', or none for just that"
        )
    spec, picture, expected = _spec(prune), _picture(image), None
    if draw is not None:
        _check_draw(draw, spec)

    from ..evaluation.tasks.shapes.example import example
    from ..models.loading import TINY, TINY_NOTE, encode, load
    from ..models.shrink import shrinks

    limit_threads(context, model, threads)
    if image is None and model == TINY:
        picture, question, expected = example()
    with stderr().status(f"loading {model}"):
        loaded, processor = load(model, device, dtype, trust_remote_code)
    inputs = encode(loaded, processor, picture, question)
    smaller = encode(loaded, processor, picture, question, spec) if shrinks(spec) else None
    # where a first call is slow and a warm-up too dear, pruning goes first and pays for it
    warm = model == TINY or loaded.device.type != "cpu"
    with stderr().status("generating"):
        pruned, whole, report = _answers(
            loaded, processor, inputs, smaller, spec, max_new_tokens, dense, warm
        )
    if draw is not None:
        _draw(report, picture, draw)
    found: dict[str, Any] = {"model": model, "prune": str(spec), "image": image, "question": question}
    found |= {"answer": pruned.text, "dense_answer": whole and whole.text, "expected": expected}
    found |= _counts(report, pruned, whole)
    how = "after a warm-up" if warm else "without a warm-up, pruned first"
    found["measured"] = (
        f"generate() on {loaded.device}, {str(loaded.dtype).removeprefix('torch.')}, greedy, one run each "
        f"{how}; preparing the picture is not counted"
    )
    found |= {"draw": draw and str(draw), "note": TINY_NOTE if model == TINY and expected is None else None}
    print_json(found) if as_json else _show(found)


def _answers(
    model: Any,
    processor: Any,
    inputs: Any,
    smaller: Any,
    spec: Spec,
    max_new_tokens: int,
    dense: bool,
    warm: bool,
) -> tuple[Answer, Answer | None, Report]:
    """The pruned answer, the dense one where it is wanted, and what was pruned; ``smaller``: the inputs of a
    spec that shrinks the picture.
    """
    from ..api import prune

    shown = inputs if smaller is None else smaller
    with prune(model, spec if smaller is None else "dense") as session:
        if warm:
            ask(model, processor, shown, 2)
        pruned = ask(model, processor, shown, max_new_tokens)
    report = session.last
    if report is None:
        raise InvariantError(
            f"there is no report of {str(spec)!r}, so nothing shows what was pruned; expected one"
        )
    if smaller is not None:
        report = _of_smaller(report, spec, inputs["input_ids"].shape[1])
    if not dense:
        return pruned, None, report
    if warm:
        ask(model, processor, inputs, 2)
    return pruned, ask(model, processor, inputs, max_new_tokens), report


def _of_smaller(report: Report, spec: Spec, length: int) -> Report:
    """The report of one smaller picture, beside a dense prompt of ``length`` tokens."""
    read, _ = report.sequence
    dense = [sum(report.dense_tokens) + length - read]
    return replace(report, method=str(spec), dense_tokens=dense, sequence=(length, read))


def _counts(report: Report, pruned: Answer, whole: Answer | None) -> dict[str, Any]:
    """Tokens and seconds of both answers."""
    return {
        "visual_tokens": {"dense": report.dense_tokens, "pruned": report.realised_tokens},
        "sequence": dict(zip(("dense", "pruned"), report.sequence, strict=True)),
        "tokens_per_layer": report.tokens_per_layer,
        "new_tokens": {"dense": whole and whole.tokens, "pruned": pruned.tokens},
        "seconds": {
            "dense": whole and {"first_token": whole.first, "total": whole.total},
            "pruned": {"first_token": pruned.first, "total": pruned.total, "choosing": report.seconds},
        },
    }


def ask(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> Answer:
    """One greedy call of generate, with its clock."""
    from ..evaluation.answer.generation import Clock

    clock = Clock(model.device)
    clock.start()
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=[clock])
    clock.stop()
    new = ids[0, inputs["input_ids"].shape[1] :]
    return Answer(processor.decode(new, skip_special_tokens=True).strip(), len(new), clock.first, clock.total)


def _spec(text: str) -> Spec:
    from ..spec import parse

    spec = parse(text)
    spec.build(require_budget=True)
    return spec


def _picture(path: str | None) -> Any:
    if path is None:
        from ..example_picture import picture

        return picture()
    if not Path(path).exists() and "://" not in path:
        raise SpecError(
            f"no file at {path!r}; expected a picture, then the question; without both, one is drawn"
        )
    from ..viz.overlay import open_picture

    return open_picture(path)


def _check_draw(path: Path, spec: Spec) -> None:
    from PIL import Image

    known = sorted(ending for ending, form in Image.registered_extensions().items() if form in Image.SAVE)
    if path.suffix.lower() not in known:
        raise SpecError(
            f"--draw {str(path)!r} ends in {path.suffix!r}; expected a picture file such as kept.png"
        )
    if not path.absolute().parent.is_dir():
        raise SpecError(
            f"--draw {str(path)!r}: the folder {str(path.parent)!r} does not exist; make it first"
        )
    from ..models.shrink import shrinks

    if not spec.prunes or shrinks(spec):
        why = "shrinks the picture and chooses no tokens" if spec.prunes else "keeps every token"
        raise SpecError(
            f"--draw has nothing to show: {str(spec)!r} {why}; give a budget, as in fastervlm@0.25"
        )


def _draw(report: Report, picture: Any, path: Path) -> None:
    if not report.keep:
        raise UnsupportedError(
            f"--draw: {report.method!r} recorded no kept tokens; expected a method before the language model"
        )
    try:
        report.keep[0].draw(picture).save(path)
    except OSError as error:
        raise VlmPruneError(
            f"--draw {str(path)!r} cannot be written ({error}); choose another place"
        ) from error


def _show(found: dict[str, Any]) -> None:
    sides = ["pruned"] if found["dense_answer"] is None else ["dense", "pruned"]
    names = {"dense": "dense", "pruned": found["prune"]}
    rows = table("", *(names[side] for side in sides))
    rows.columns[0].no_wrap = True

    def row(label: str, cell: Any) -> None:
        rows.add_row(label, *(plain(cell(side)) for side in sides))

    row("answer", lambda side: found["answer" if side == "pruned" else "dense_answer"] or "(empty)")
    row(
        "visual tokens",
        lambda side: _count(sum(found["visual_tokens"][side]), sum(found["visual_tokens"]["dense"])),
    )
    row("sequence", lambda side: str(found["sequence"][side]))
    whole = [sum(found["visual_tokens"]["dense"])] * len(found["tokens_per_layer"])
    row("tokens per layer", lambda side: _layers(found["tokens_per_layer"] if side == "pruned" else whole))
    row("new tokens", lambda side: str(found["new_tokens"][side]))
    row("first token", lambda side: _seconds(found["seconds"][side]["first_token"]))
    row(
        "of it, choosing",
        lambda side: _seconds(found["seconds"][side]["choosing"]) if side == "pruned" else "-",
    )
    row("total", lambda side: _seconds(found["seconds"][side]["total"]))
    screen = stdout()
    screen.print(plain(f"{found['model']}: {found['question']}"), style="bold")
    if found["expected"] is not None:
        screen.print(
            plain(f"A question of the synthetic benchmark; the right answer is {found['expected']}.")
        )
    screen.print(rows)
    screen.print(plain(f"Times: {found['measured']}."), style="dim")
    if found["note"]:
        screen.print(plain(f"Note: {found['note']}."), style="yellow")
    if found["draw"]:
        screen.print(plain(f"Wrote {found['draw']}"), soft_wrap=True)


def _count(tokens: int, of: int) -> str:
    return str(tokens) if tokens == of else f"{tokens} ({tokens / of:.1%} of {of})"


def _layers(tokens: list[float]) -> str:
    """Runs of equal numbers: ``9 in layers 0-3``."""
    runs, start = [], 0
    for value, group in itertools.groupby(tokens):
        end = start + len(list(group)) - 1
        runs.append(f"{value:g} in layers {start}-{end}" if end > start else f"{value:g} in layer {start}")
        start = end + 1
    return ", ".join(runs)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
