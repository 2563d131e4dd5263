# SPDX-License-Identifier: Apache-2.0
"""Outcomes as HTML: one card for each spec, side by side. Whatever a model or a user wrote stays text."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import Any

from ..errors import VlmPruneError
from ..viz.notebook import png
from .playground import Outcome, Playground

# !important: Gradio has colours of its own for text in HTML
STYLE = """<style>
.vp-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px; }
.vp-card { border: 1px solid var(--border-color-primary, #ccc); border-radius: 8px; padding: 10px; }
.vp-card img { width: 100%; border-radius: 4px; image-rendering: auto; }
.vp-card code { font-weight: 600; overflow-wrap: anywhere; }
.vp-answer { font-size: 1.15em; margin: 6px 0; overflow-wrap: anywhere; }
.vp-right::after { content: " (right)"; color: #1a7f37; font-size: 0.8em; }
.vp-wrong::after { content: " (wrong)"; color: #b5451b; font-size: 0.8em; }
.vp-fact { display: flex; justify-content: space-between; font-size: 0.85em; margin-top: 3px; }
.vp-fact span:last-child { font-variant-numeric: tabular-nums; white-space: nowrap; }
.vp-problem { color: #b5451b !important; overflow-wrap: anywhere; }
.dark .vp-right::after { color: #5fd07f; }
.dark .vp-problem, .dark .vp-wrong::after { color: #ff9d76 !important; }
</style>"""


def cards(outcomes: Sequence[Outcome]) -> str:
    """All outcomes; those that failed say why in their card."""
    return STYLE + f'<div class="vp-cards">{"".join(map(_card, outcomes))}</div>'


def problem(text: str) -> str:
    """One sentence in place of the cards."""
    return STYLE + f'<p class="vp-problem" role="alert">{escape(text)}</p>'


def _card(outcome: Outcome) -> str:
    head = f"<code>{escape(outcome.spec)}</code>"
    if outcome.problem:
        return f'<div class="vp-card">{head}<p class="vp-problem">{escape(outcome.problem)}</p></div>'
    mark = {None: "", True: " vp-right", False: " vp-wrong"}[outcome.right]
    said = escape(outcome.answer) or "<i>no answer</i>"
    facts = "".join(
        f'<div class="vp-fact"><span>{name}</span><span>{value}</span></div>'
        for name, value in _facts(outcome).items()
    )
    return (
        f'<div class="vp-card">{head}<div class="vp-answer{mark}">{said}</div>{_image(outcome)}{facts}</div>'
    )


def _image(outcome: Outcome) -> str:
    if outcome.drawn is None:
        return ""
    data = b64encode(png(outcome.drawn)).decode()
    about = f"what {outcome.spec} kept of the picture"
    return f'<img alt="{escape(about)}" src="data:image/png;base64,{data}">'


def _facts(outcome: Outcome) -> dict[str, str]:
    return {
        "visual tokens": f"{outcome.tokens} of {outcome.dense}",
        "mean over the layers": f"{outcome.layer_tokens:.4g}",
        "first token": f"{outcome.first * 1e3:.0f} ms",
        "of it, choosing": f"{outcome.choosing * 1e3:.1f} ms",
        "whole answer": f"{outcome.total * 1e3:.0f} ms",
    }


def answered(
    playground: Playground, picture: Any, question: str, methods: Sequence[str] | None, percent: float
) -> str:
    """What the page shows for its inputs: cards, or a sentence that says what is wrong with the inputs."""
    try:
        return cards(playground.compare(picture, question, methods or [], percent / 100))
    except VlmPruneError as error:
        return problem(str(error))
