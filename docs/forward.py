# SPDX-License-Identifier: Apache-2.0
"""Draw the picture of docs/architecture.md, one forward from pixels to the next token:

python docs/forward.py docs/forward.svg
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, TOP, GAP = 1000, 86, 12
MODEL, BARS, NOTES = 24, 286, 604  # left edges: the model's modules, two sequences, what the library does
TEXT, VISUAL, LINE, BOX = "#8a8f98", "#0072b2", "#c9ced6", "#f3f5f8"
LEGEND = "tokens read: grey text, blue visual, pale a copy of the one before"
FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"
CODE = "font-family='DejaVu Sans Mono, Menlo, monospace'"


class Stage(NamedTuple):
    """One module of the model, and what happens there.

    Args:
        module: what the model runs.
        lengths: visual tokens that it reads under a cut before, and under one inside, the language model; of
            twelve, 0 where there is no sequence yet.
        notes: (file, what happens in it).
    """

    module: tuple[str, str]
    lengths: tuple[int, int]
    notes: tuple[tuple[str, str], ...]


STAGES = (
    Stage(
        ("get_image_features", "vision tower, projector"),
        (0, 0),
        (
            ("hooks/patches.py", "Encode: records while the encoder runs"),
            ("hooks/vision/capture.py", "the one [CLS] row, no attention map"),
            ("models/llava.py", "from crops to Picture, by the model's own packing"),
        ),
    ),
    Stage(
        ("forward", "text and picture merged"),
        (12, 12),
        (
            ("hooks/patches.py", "RecordedForward: opens the state of this forward"),
            ("hooks/session.py", "takes the pictures that were encoded"),
        ),
    ),
    Stage(
        ("language_model", "its entrance"),
        (4, 12),
        (
            ("hooks/entrance.py", "finds the pictures; masks and positions of what is left"),
            ("hooks/slots/before_lm.py", "slot before_lm: units, budget, choice, cut"),
            ("methods/fastervlm.py", "the formula; core/select.py ranks and breaks ties"),
        ),
    ),
    Stage(
        ("decoder layers 0, 1", ""),
        (4, 12),
        (("hooks/attention_tap.py", "layer 1: attention of the last prompt token"),),
    ),
    Stage(
        ("decoder layer 2", "its input"),
        (4, 4),
        (
            ("hooks/slots/inside_lm.py", "slot inside_lm: choice, cut, a view of its own"),
            ("methods/fastv.py", "the formula; core/select.py ranks and breaks ties"),
        ),
    ),
    Stage(
        ("decoder layers 2, 3, ...", "fewer slots in the KV cache"),
        (4, 4),
        (("hooks/sequence/views.py", "each group of layers gets its mask and positions"),),
    ),
    Stage(
        ("language_model", "its exit"),
        (12, 12),
        (
            ("hooks/entrance.py", "hidden states back to the full length"),
            ("hooks/sequence/cache.py", "the cache learns what was cut: tokens seen, slots held"),
        ),
    ),
    Stage(
        ("logits, next token", "generate goes on"),
        (0, 0),
        (
            ("hooks/session.py", "checks that every slot acted; run.last; the state is gone"),
            ("core/report.py", "what was really kept, per picture and layer"),
        ),
    ),
)


def text(x: float, y: float, words: str, size: int = 14, colour: str = "#1d232b", font: str = FONT) -> str:
    return f"<text x='{x}' y='{y}' font-size='{size}' fill='{colour}' {font}>{escape(words)}</text>"


def sequence(x: float, y: float, visual: int, full: int = 12, filled: bool = False) -> str:
    """Three text tokens, visual ones, three text tokens; ``filled``: those that were cut are pale copies."""
    cells = [TEXT] * 3 + [VISUAL] * visual + [TEXT] * 3
    if filled:
        cells = [TEXT] * 3 + [VISUAL if number % 3 == 0 else "#b9d7ea" for number in range(full)] + [TEXT] * 3
    return "".join(
        f"<rect x='{x + 6.2 * number:.1f}' y='{y}' width='5' height='16' fill='{colour}'/>"
        for number, colour in enumerate(cells)
    )


def drawing() -> str:
    parts, y = [], float(TOP)
    heads = ((MODEL, "the model, unmodified"), (BARS, "fastervlm"), (BARS + 132, "fastv(layer=2)"))
    parts += [text(x, 46, words, 15) for x, words in (*heads, (NOTES, "what vlmprune does there"))]
    parts.append(
        text(BARS, 66, "tokens read: grey text, blue visual, pale a copy of the one before", 11, TEXT)
    )
    for number, stage in enumerate(STAGES, 1):
        height = max(44, 20 + 34 * len(stage.notes))
        middle = y + height / 2
        parts.append(
            f"<rect x='{MODEL}' y='{y}' width='238' height='{height}' rx='5' fill='{BOX}' stroke='{LINE}'/>"
        )
        name, about = stage.module
        parts.append(text(MODEL + 14, middle + (5 if not about else -3), name, 13, font=CODE))
        parts.append(text(MODEL + 14, middle + 15, about, 12, "#4a525d"))
        if number < len(STAGES):
            x, foot = MODEL + 119, y + height
            parts.append(f"<line x1='{x}' x2='{x}' y1='{foot}' y2='{foot + GAP}' stroke='#4a525d'/>")
        for column, visual in enumerate(stage.lengths):
            if visual:
                exit_ = stage.module[1] == "its exit"
                parts.append(sequence(BARS + 132 * column, middle - 8, visual, filled=exit_))
        parts.append(
            f"<circle cx='{NOTES - 18}' cy='{middle}' r='11' fill='none' stroke='#4a525d'/>"
            f"<text x='{NOTES - 18}' y='{middle + 5}' font-size='13' text-anchor='middle' {FONT}>"
            f"{number}</text>"
        )
        first = middle - 17 * len(stage.notes) + 12
        for line, (file, what) in enumerate(stage.notes):
            parts.append(text(NOTES, first + 34 * line, file, 12, VISUAL, CODE))
            parts.append(text(NOTES, first + 34 * line + 16, what, 13))
        y += height + GAP
    size = f"width='{WIDTH}' height='{y + 8:.0f}' viewBox='0 0 {WIDTH} {y + 8:.0f}'"
    body = "\n".join(parts)
    title = "<title>One forward: what the model runs, what it reads, what vlmprune does</title>"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size}>{title}\n"
        f"<rect width='100%' height='100%' fill='white'/>\n{body}\n</svg>\n"
    )


def files() -> list[str]:
    """Every file that the picture names, from the package on."""
    return sorted({file for stage in STAGES for file, _ in stage.notes} | {"core/select.py"})


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.parse_args(words).path.write_text(drawing(), encoding="utf-8")


if __name__ == "__main__":
    main()
