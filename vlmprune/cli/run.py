# SPDX-License-Identifier: Apache-2.0
"""``vlmprune run``: one picture or clip, one question, with and without pruning."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import InvariantError, SpecError, UnsupportedError
from .drawing import check_draw, draw_kept
from .screen import Json, plain, print_json, stderr, stdout, table
from .threads import Threads, limit_threads

if TYPE_CHECKING:
    from ..core.report import Report
    from ..spec import Spec
    from ..videofile import Clip

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
        str | None, typer.Argument(help="Picture or clip (.mp4, .mkv, ...); without it, a drawn picture.")
    ] = None,
    question: Annotated[
        str, typer.Argument(help="What to ask; without a picture, the models of the package know some.")
    ] = QUESTION,
    model: Annotated[str, typer.Option(help="tiny, natural, video, a folder, or an HF id.")] = "tiny",
    prune: Annotated[str, typer.Option(help="Spec, as in fastervlm@64 or divprune@0.25.")] = "fastervlm@0.25",
    draw: Annotated[
        Path | None,
        typer.Option(help="Write the picture, or a strip of the frames, with the kept patches here."),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of a clip, evenly spread over it; 8 by default.")
    ] = None,
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
    """Answer a question about a picture or a clip with pruned visual tokens, beside the dense answer."""
    if not question.strip():
        raise SpecError(
            "the question is empty; expected text, such as 'What is in the picture?', or none for just that"
        )
    spec, expected = _spec(prune), None
    picture = _shown(image, frames, spec)
    if draw is not None:
        check_draw(draw, image, spec)

    from ..models.loading import BUNDLED, load

    limit_threads(context, model, threads)
    # nothing was asked: a question that this model can answer, and the right answer
    if image is None and model in BUNDLED:
        picture, question, expected = _example(model)
    with stderr().status(f"loading {model}"):
        loaded, processor = load(model, device, dtype, trust_remote_code)
    asked = _asked(loaded, processor, picture, question, spec)
    # where a first call is slow and a warm-up too dear, pruning goes first and pays for it
    warm = model in BUNDLED or loaded.device.type != "cpu"
    with stderr().status("generating"):
        pruned, whole, report = _answers(loaded, processor, asked, spec, max_new_tokens, dense, warm)
    if draw is not None:
        draw_kept(report, picture, draw, spec)
    # what is shown, as a table or as JSON
    found: dict[str, Any] = {"model": model, "prune": str(spec), "image": image, "question": question}
    found["clip"] = None if asked.clip is None else _of_clip(asked.clip, asked.frames, report)
    found |= {"answer": pruned.text, "dense_answer": whole and whole.text, "expected": expected}
    found |= _counts(report, pruned, whole)
    found |= {"measured": _measured(loaded, warm), "draw": draw and str(draw)}
    found["note"] = _note(model, loaded, report, expected)
    print_json(found) if as_json else _show(found)


def _example(model: str) -> tuple[Any, str, str]:
    """A picture or clip, a question and the answer, of the benchmark that a model of the package knows."""
    from ..evaluation.tasks.clips.example import example as clip
    from ..evaluation.tasks.scenes.example import example as scene
    from ..evaluation.tasks.shapes.example import example as shape

    if model == "video":
        return clip()
    return scene() if model == "natural" else shape()


@dataclass(frozen=True)
class Prepared:
    """One question as model inputs.

    Args:
        inputs: of generate.
        smaller: the same of a spec that shrinks the picture.
        whole: visual tokens that the picture has at its own size, of such a spec.
        clip: what the question is about, where that is a clip.
        frames: the frames of the clip are images to the model.
    """

    inputs: Any
    smaller: Any = None
    whole: int = 0
    clip: Clip | None = None
    frames: bool = False


def _asked(model: Any, processor: Any, picture: Any, question: str, spec: Spec) -> Prepared:
    from ..models import adapter_for
    from ..models.loading import encode, encode_clip
    from ..models.shrink import shrink_for, shrinks
    from ..videofile import Clip

    if isinstance(picture, Clip):
        inputs, apart = encode_clip(model, processor, picture.frames, question, picture.times)
        return Prepared(inputs, clip=picture, frames=apart)
    inputs = encode(model, processor, picture, question)
    if not shrinks(spec):
        return Prepared(inputs)
    (whole,) = shrink_for(adapter_for(model), processor, spec)([picture]).dense
    return Prepared(inputs, encode(model, processor, picture, question, spec), whole)


def _answers(
    model: Any, processor: Any, asked: Prepared, spec: Spec, max_new_tokens: int, dense: bool, warm: bool
) -> tuple[Answer, Answer | None, Report]:
    """The pruned answer, the dense one where it is wanted, and what was pruned."""
    from ..api import prune

    inputs, smaller = asked.inputs, asked.smaller
    # the smaller picture is all the pruning there is: the model reads the whole of it
    shown = inputs if smaller is None else smaller
    with prune(model, spec if smaller is None else "dense", frames=asked.frames) as session:
        if warm:
            ask(model, processor, shown, 2)
        pruned = ask(model, processor, shown, max_new_tokens)
    report = session.last
    if report is None:
        raise InvariantError(
            f"there is no report of {str(spec)!r}, so nothing shows what was pruned; expected one"
        )
    if smaller is not None:
        report = _of_smaller(report, spec, inputs["input_ids"].shape[1], asked.whole)
    if not dense:
        return pruned, None, report
    if warm:
        ask(model, processor, inputs, 2)
    return pruned, ask(model, processor, inputs, max_new_tokens), report


def _of_smaller(report: Report, spec: Spec, length: int, whole: int) -> Report:
    """The report of one smaller picture, beside a dense prompt of ``length`` tokens, ``whole`` of them visual
    and no newlines.
    """
    # sequence is (dense, pruned); all of a smaller picture is read, so both are its length
    read, _ = report.sequence
    # its tiles may be pictures to the model
    tokens = sum(report.realised_tokens)
    layers = [sum(layer) for layer in zip(*report.layer_tokens, strict=True)]
    return replace(
        report,
        method=str(spec),
        dense_tokens=[whole],
        encoded_tokens=[whole],
        realised_tokens=[tokens],
        layer_tokens=[layers],
        sequence=(length, read),
    )


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
    new = ids[0, inputs["input_ids"].shape[1] :]  # (T,)
    return Answer(processor.decode(new, skip_special_tokens=True).strip(), len(new), clock.first, clock.total)


def _spec(text: str) -> Spec:
    from ..spec import parse

    spec = parse(text)
    spec.build(require_budget=True)
    return spec


def _shown(path: str | None, frames: int | None, spec: Spec) -> Any:
    """The picture, or the Clip."""
    from ..videofile import ENDINGS, FRAMES, is_clip, read_clip

    if path is not None and is_clip(path):
        from ..models.shrink import shrinks

        if shrinks(spec):
            raise UnsupportedError(
                f"{str(spec)!r} shrinks pictures, not clips; show fewer frames by --frames, or use a method "
                "that chooses tokens, such as evs@0.25"
            )
        return read_clip(path, FRAMES if frames is None else frames)
    if frames is not None:
        raise SpecError(
            f"--frames is for clips, whose names end in one of {', '.join(ENDINGS)}; leave it out"
        )
    if path is None:
        from ..example_picture import picture

        return picture()
    # an address is left to open_picture, which says what to do with it
    if not Path(path).exists() and "://" not in path:
        raise SpecError(
            f"no file at {path!r}; expected a picture, then the question; without both, one is drawn"
        )
    from ..viz.overlay import open_picture

    return open_picture(path)


def _measured(loaded: Any, warm: bool) -> str:
    how = "after a warm-up" if warm else "without a warm-up, pruned first"
    return (
        f"generate() on {loaded.device}, {str(loaded.dtype).removeprefix('torch.')}, greedy, one run each "
        f"{how}; preparing the picture is not counted"
    )


def _of_clip(clip: Clip, apart: bool, report: Report) -> dict[str, Any]:
    """What was read of the clip, how it was shown, and the tokens that stay of each frame."""
    return {
        "sampling": clip.sampling,
        "seconds": clip.seconds,
        "times": clip.times,
        "shown_as": "images of one prompt" if apart else "a clip",
        "kept": [len(one) for one in report.keep],  # a map for each frame
    }


def _note(model: str, loaded: Any, report: Report, expected: str | None) -> str | None:
    from ..models.loading import BUNDLED, BUNDLED_NOTE

    if model in BUNDLED:
        return BUNDLED_NOTE.format(model) if expected is None else None
    most = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and report.sequence[0] > most:
        return (
            f"the dense sequence of {report.sequence[0]} tokens is longer than the {most} that the language "
            "model was made for, so its answer means little"
        )
    return None


def _show(found: dict[str, Any]) -> None:
    # sides of the table: dense only where it was run
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
    if found["clip"] is not None:
        per_frame = " ".join(map(str, found["clip"]["kept"]))
        row("of each frame", lambda side: per_frame if side == "pruned" else "all")
    row("sequence", lambda side: str(found["sequence"][side]))
    # dense reads all of them in every layer
    whole = [sum(found["visual_tokens"]["dense"])] * len(found["tokens_per_layer"])
    row("tokens per layer", lambda side: _layers(found["tokens_per_layer"] if side == "pruned" else whole))
    row("new tokens", lambda side: str(found["new_tokens"][side]))
    row("first token", lambda side: _seconds(found["seconds"][side]["first_token"]))
    row(
        "of it, choosing",
        lambda side: _seconds(found["seconds"][side]["choosing"]) if side == "pruned" else "-",
    )
    row("total", lambda side: _seconds(found["seconds"][side]["total"]))
    # above the table, and below it
    screen = stdout()
    screen.print(plain(f"{found['model']}: {found['question']}"), style="bold")
    if found["clip"] is not None:
        clip = found["clip"]
        screen.print(plain(f"Clip: {clip['sampling']}; shown to the model as {clip['shown_as']}."))
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
