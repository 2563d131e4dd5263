# SPDX-License-Identifier: Apache-2.0
"""Draw the README's picture: one question of the benchmark, the whole picture, and what four methods leave of
it; or what all methods leave of it, or of a clip.

    python docs/gallery.py docs/gallery.png
    python docs/gallery.py docs/gallery_all.png --all
    python docs/gallery.py docs/gallery_clips.png --clips
    python docs/gallery.py needle.png --sample needle-7 --keep 9 --methods random pool fastervlm fastv

Without --sample the question is chosen by a rule and not by hand: the first test question about one picture
that the whole picture answers right, the first method wrong, and most of the others right. Model and
questions ship with the package. Methods inside the language model are drawn after their last cut. With --all
the question is the same, and every method is there that chooses tokens by a budget. Those whose schedule
cannot meet it get a quarter or half of the tokens, as their panel says. With --clips the methods for clips
are drawn, on the first clip of the benchmark of clips that the same rule finds.
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
from vlmprune.viz.strip import GAP as EDGE
from vlmprune.viz.strip import sheet as strip_of

METHODS = ("random", "divprune", "fastervlm", "fastv")
SIZE = 432  # three pixels for each one of the benchmark, so that patches stay sharp
GAP = 14
HEAD, FOOT = 58, 56  # pixels of text above and below a panel
TEXT = 34  # size of its letters
COLUMNS = 6  # of a gallery of all methods
CLIP_COLUMNS = 4  # of a gallery of methods for clips
CLIP_KEEP = 0.3  # of a clip; dycoke can do with less only where there are more frames
LOOKED_AT = 500  # questions; beyond them the rule finds nothing
TRAINED = {"visionselector": "visionselector(weights=tiny)"}  # with weights that come with the package


def answers(bundle: tuple[Any, Any], sample: Any, specs: Sequence[str], task: str = "shapes") -> list[Record]:
    """What the dense model and each spec answer to one question."""
    return list(evaluate(*bundle, [sample], ["dense", *specs], get_task(task)))


def telling(records: list[Record]) -> bool:
    """Right with all tokens, wrong with those of the first spec, right with most of the other specs."""
    dense, first, *others = (record.score == 1 for record in records)
    return dense and not first and sum(others) > len(others) / 2


def choose(bundle: tuple[Any, Any], specs: Sequence[str], task: str = "shapes") -> tuple[Any, list[Record]]:
    """The first telling question about one picture, or about one clip, with its answers."""
    for sample in get_task(task).samples("test", LOOKED_AT):
        one = len(sample.images) == 1 or task == "clips"
        if one and telling(found := answers(bundle, sample, specs, task)):
            return sample, found
    raise SystemExit(
        f"none of {LOOKED_AT} questions is answered right by most of {specs[1:]} and wrong by {specs[0]}"
    )


def fitting(text: str) -> Any:
    """A font in which a line of text is not wider than a panel."""
    size = TEXT
    while ImageFont.load_default(size).getlength(text) > SIZE - 4:
        size -= 1
    return ImageFont.load_default(size)


def titled(text: str, tall: int = SIZE) -> Image.Image:
    """A panel with nothing but what stands above the picture, which is so many pixels tall."""
    sheet = Image.new("RGB", (SIZE, HEAD + tall + FOOT), "white")
    ImageDraw.Draw(sheet).text((2, 8), text, fill="black", font=fitting(text))
    return sheet


def panel(images: Sequence[Image.Image], record: Record) -> Image.Image:
    """The picture, or the frames of a clip, with the kept patches; the spec above and the answer below."""
    kept, total = record.realised_tokens, record.dense_tokens
    drawn = strip(images, record) if len(images) > 1 else enlarged(images[0], record)
    sheet = titled(record.spec if kept < total else f"all {total} tokens", drawn.height)
    sheet.paste(drawn, (0, HEAD))
    right = record.score == 1
    text = f"{record.answer or 'no answer'} ({'right' if right else 'wrong'})"
    pen, colour = ImageDraw.Draw(sheet), "#007050" if right else "#B03000"
    pen.text((2, HEAD + drawn.height + 6), text, fill=colour, font=fitting(text))
    return sheet


def enlarged(image: Image.Image, record: Record) -> Image.Image:
    """A picture in the size of a panel, with its kept patches."""
    large = image.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return record.keep[0].draw(large) if record.realised_tokens < record.dense_tokens else large


def strip(frames: Sequence[Image.Image], record: Record) -> Image.Image:
    """Frames of a clip in two rows as wide as a panel, each with its kept patches and their number."""
    half = len(frames) // 2
    wide = SIZE // half - 2 * EDGE
    small = [frame.resize((wide, wide), Image.Resampling.LANCZOS) for frame in frames]
    names = [f"frame {number}" for number in range(1, len(frames) + 1)]
    if record.realised_tokens == record.dense_tokens:
        return strip_of(small, names, across=half)
    drawn = [one.draw(frame) for one, frame in zip(record.keep, small, strict=True)]
    return strip_of(drawn, names, [str(len(one)) for one in record.keep], half)


def gallery(sample: Any, records: list[Record], columns: int | None = None) -> Image.Image:
    """One panel per answer under the question, in rows of ``columns``."""
    panels = [panel(sample.load_images(), record) for record in records]
    across, tall = columns or len(panels), panels[0].height
    rows = -(-len(panels) // across)
    sheet = Image.new("RGB", (across * (SIZE + GAP) - GAP, HEAD + rows * (tall + GAP) - GAP), "white")
    ImageDraw.Draw(sheet).text((2, 6), sample.question, fill="black", font=ImageFont.load_default(38))
    for number, one in enumerate(panels):
        down, right = divmod(number, across)
        sheet.paste(one, (right * (SIZE + GAP), HEAD + down * (tall + GAP)))
    return sheet


def clip_specs() -> list[str]:
    """All built-in methods for clips, behind the one that the rule compares them with."""
    names = [name for name in attachable_methods() if get(name).clips]
    own = [name for name in names if get(name).__module__.startswith("vlmprune.")]
    return [f"{name}@{CLIP_KEEP}" for name in ("random", *own)]


def every_spec(keep: int, tokens: int, depth: int) -> list[str]:
    """All built-in methods that choose tokens of a picture by a budget, without weights of a user."""
    classes = {name: get(name) for name in attachable_methods() if name != "rcp" and not get(name).clips}
    return [
        spec_at(name, keep, tokens, depth).replace(name, TRAINED.get(name, name))
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
    parser.add_argument("--clips", action="store_true", help="methods for clips, on one clip")
    options = parser.parse_args(words)
    if options.clips:
        sample, found = choose(load("video"), clip_specs(), "clips")
        gallery(sample, found, CLIP_COLUMNS).save(options.path, optimize=True)
        print(f"{sample.id}: {sample.question} {sample.answers[0]}")
        return
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
