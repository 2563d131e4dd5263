# SPDX-License-Identifier: Apache-2.0
"""Draw the README's picture: one question of the benchmark, the whole picture, and what four methods leave of
it; or what all methods leave of it.

    python docs/gallery.py docs/gallery.png
    python docs/gallery.py docs/gallery_all.png --all
    python docs/gallery.py needle.png --sample needle-7 --keep 9 --methods random pool fastervlm fastv

Without --sample the question is chosen by a rule and not by hand: the first test question about one picture
that the whole picture answers right, the first method wrong, and most of the others right. Model and
questions ship with the package. Methods inside the language model are drawn after their last cut. With --all
the question is the same, and every method is there that chooses tokens by a budget. Those whose schedule
cannot meet it get a quarter or half of the tokens, as their panel says.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlmprune.cli.catalogue import spec_at
from vlmprune.evaluation.answer.evaluate import evaluate
from vlmprune.evaluation.answer.record import Record
from vlmprune.evaluation.tasks.registry import get_task
from vlmprune.models.loading import load
from vlmprune.registry import attachable_methods, get

METHODS = ("random", "divprune", "fastervlm", "fastv")
SIZE = 432  # three pixels for each one of the benchmark, so that patches stay sharp
GAP = 14
HEAD, FOOT = 58, 56  # pixels of text above and below a panel
TEXT = 34  # size of its letters
COLUMNS = 6  # of a gallery of all methods
LOOKED_AT = 500  # questions; beyond them the rule finds nothing


def answers(bundle: tuple[Any, Any], sample: Any, specs: Sequence[str]) -> list[Record]:
    """What the dense model and each spec answer to one question."""
    return list(evaluate(*bundle, [sample], ["dense", *specs], get_task("shapes")))


def telling(records: list[Record]) -> bool:
    """Right with all tokens, wrong with those of the first spec, right with most of the other specs."""
    dense, first, *others = (record.score == 1 for record in records)
    return dense and not first and sum(others) > len(others) / 2


def choose(bundle: tuple[Any, Any], specs: Sequence[str]) -> tuple[Any, list[Record]]:
    """The first telling question, with its answers."""
    for sample in get_task("shapes").samples("test", LOOKED_AT):
        if len(sample.images) == 1 and telling(found := answers(bundle, sample, specs)):
            return sample, found
    raise SystemExit(
        f"none of {LOOKED_AT} questions is answered right by most of {specs[1:]} and wrong by {specs[0]}"
    )


def titled(text: str) -> Image.Image:
    """A panel with nothing but what stands above the picture."""
    sheet = Image.new("RGB", (SIZE, HEAD + SIZE + FOOT), "white")
    ImageDraw.Draw(sheet).text((2, 8), text, fill="black", font=ImageFont.load_default(TEXT))
    return sheet


def panel(image: Image.Image, record: Record) -> Image.Image:
    """The picture with its kept patches, the spec above and the answer below."""
    large = image.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    kept, total = record.realised_tokens, record.dense_tokens
    sheet = titled(record.spec if kept < total else f"all {total} tokens")
    sheet.paste(record.keep[0].draw(large) if kept < total else large, (0, HEAD))
    right = record.score == 1
    text = f"{record.answer or 'no answer'} ({'right' if right else 'wrong'})"
    pen, colour = ImageDraw.Draw(sheet), "#007050" if right else "#B03000"
    pen.text((2, HEAD + SIZE + 6), text, fill=colour, font=ImageFont.load_default(TEXT))
    return sheet


def gallery(sample: Any, records: list[Record], columns: int | None = None) -> Image.Image:
    """One panel per answer under the question, in rows of ``columns``."""
    panels = [panel(sample.load_images()[0], record) for record in records]
    across, tall = columns or len(panels), panels[0].height
    rows = -(-len(panels) // across)
    sheet = Image.new("RGB", (across * (SIZE + GAP) - GAP, HEAD + rows * (tall + GAP) - GAP), "white")
    ImageDraw.Draw(sheet).text((2, 6), sample.question, fill="black", font=ImageFont.load_default(38))
    for number, one in enumerate(panels):
        down, right = divmod(number, across)
        sheet.paste(one, (right * (SIZE + GAP), HEAD + down * (tall + GAP)))
    return sheet


def every_spec(keep: int, tokens: int, depth: int) -> list[str]:
    """All built-in methods that choose tokens of a picture by a budget, without trained weights."""
    classes = {
        name: get(name)
        for name in attachable_methods()
        if name not in ("visionselector", "rcp") and not get(name).clips
    }
    return [
        spec_at(name, keep, tokens, depth)
        for name, cls in classes.items()
        if cls.__module__.startswith("vlmprune.") and (cls.budgeted or cls.wraps) and cls.slot != "attention"
    ]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--sample", help="family-number in the test split, as in needle-0; else by the rule")
    parser.add_argument("--keep", type=int, default=18)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--all", action="store_true", help="all methods, about the question of --methods")
    options = parser.parse_args(words)
    bundle, specs = load(options.model), [f"{method}@{options.keep}" for method in options.methods]
    if options.sample is None:
        sample, found = choose(bundle, specs)
    else:
        family, _, number = options.sample.rpartition("-")
        sample = get_task("shapes").sample("test", family, int(number))
        found = answers(bundle, sample, specs)
    if options.all:
        config = bundle[0].config
        tokens = found[0].dense_tokens
        found = answers(
            bundle, sample, every_spec(options.keep, tokens, config.text_config.num_hidden_layers)
        )
    gallery(sample, found, COLUMNS if options.all else None).save(options.path, optimize=True)
    print(f"{sample.id}: {sample.question} {sample.answers[0]}")


if __name__ == "__main__":
    main()
