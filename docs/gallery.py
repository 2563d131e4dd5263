# SPDX-License-Identifier: Apache-2.0
"""Draw the README's picture: one image of the benchmark, four methods, the same budget, and what the model answers.

    python docs/gallery.py docs/gallery.png
    python docs/gallery.py needle.png --sample needle-7 --keep 9 --methods random pool fastervlm fastv

Model and question are those that ship with the package. Methods inside the language model are drawn after their last cut.
"""

from __future__ import annotations

import argparse
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlmprune.benchmarks.evaluate import evaluate
from vlmprune.benchmarks.record import Record
from vlmprune.benchmarks.tasks import get_task
from vlmprune.models.loading import load

METHODS = ("random", "divprune", "fastervlm", "fastv")
SIZE, GAP, HEAD, FOOT = 432, 14, 40, 34  # SIZE: three pixels for each one of the benchmark, so that patches stay sharp


def panel(image: Image.Image, record: Record) -> Image.Image:
    """The picture with its kept patches, the spec above and the answer below."""
    sheet = Image.new("RGB", (SIZE, HEAD + SIZE + FOOT), "white")
    sheet.paste(record.keep[0].draw(image.resize((SIZE, SIZE), Image.Resampling.NEAREST)), (0, HEAD))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    pen.text((2, 8), record.spec, fill="black", font=font)
    right = record.score == 1
    text = f"{record.answer or 'no answer'} ({'right' if right else 'wrong'})"
    pen.text((2, HEAD + SIZE + 6), text, fill="#007050" if right else "#B03000", font=font)
    return sheet


def gallery(bundle: tuple[Any, Any], sample: Any, specs: list[str]) -> Image.Image:
    """One panel per spec under the question."""
    records = evaluate(*bundle, [sample], specs, get_task("shapes"))
    panels = [panel(sample.load_images()[0], record) for record in records]
    sheet = Image.new("RGB", (len(panels) * (SIZE + GAP) - GAP, HEAD + panels[0].height), "white")
    ImageDraw.Draw(sheet).text((2, 6), sample.question, fill="black", font=ImageFont.load_default(24))
    for number, one in enumerate(panels):
        sheet.paste(one, (number * (SIZE + GAP), HEAD))
    return sheet


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--sample", default="needle-0", help="family-number in the test split")
    parser.add_argument("--keep", type=int, default=18)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args(words)
    family, _, number = options.sample.rpartition("-")
    sample = get_task("shapes").sample("test", family, int(number))
    gallery(load(options.model), sample, [f"{method}@{options.keep}" for method in options.methods]).save(options.path)


if __name__ == "__main__":
    main()
