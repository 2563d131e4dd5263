# SPDX-License-Identifier: Apache-2.0
"""Outcomes as HTML: text stays text, and each card says what there is to say."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from vlmprune.demo.cards import cards, problem
from vlmprune.demo.playground import Outcome

HOSTILE = "<img src=x onerror=alert(1)>\"'&"
ANSWERED = Outcome(
    "fastervlm@18",
    answer="x k l",
    drawn=Image.new("RGB", (8, 4), "red"),
    tokens=18,
    dense=144,
    layer_tokens=18.0,
    first=0.0123,
    total=0.5,
    choosing=0.0004,
)


def test_a_card_says_what_was_kept_and_how_long_it_took():
    page = cards([ANSWERED])
    for text in ("<code>fastervlm@18</code>", "x k l", "18 of 144", "12 ms", "0.4 ms", "500 ms"):
        assert text in page
    data = page.split("data:image/png;base64,")[1].split('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 4)


@pytest.mark.parametrize(("right", "words"), [(True, "vp-right"), (False, "vp-wrong"), (None, "")])
def test_right_and_wrong_are_marked_where_they_are_known(right, words):
    page = cards([Outcome("dense", answer="a", right=right)])
    assert f'<div class="vp-answer{words and " " + words}">' in page


def test_nothing_that_a_model_or_a_user_wrote_is_markup():
    shown = [Outcome(HOSTILE, answer=HOSTILE, drawn=ANSWERED.drawn), Outcome(HOSTILE, problem=HOSTILE)]
    for page in (cards(shown), problem(HOSTILE)):
        assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;" in page


def test_an_empty_answer_is_said_and_a_problem_stands_alone():
    assert "<i>no answer</i>" in cards([Outcome("blind")])
    page = cards([Outcome("fastv@1", problem="it cannot")])
    assert (
        "it cannot" in page and "visual tokens" not in page and "vp-answer" not in page.split("</style>")[1]
    )
