# SPDX-License-Identifier: Apache-2.0
"""Heat maps, charts and sentences of a report: what they draw, and what they may claim."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from report_rows import difference, results, row

from vlmprune.evaluation.report.charts import forest, panels, ticks
from vlmprune.evaluation.report.heat import heat_maps
from vlmprune.evaluation.report.sentences import sentences
from vlmprune.evaluation.stats.summary import Band, Headline, Worst


def test_the_worst_family_is_framed_only_where_it_is_worse():
    dense = row("dense", families={"a": 0.5, "b": 0.8, "c": 0.0, "d": 0.9})
    hurt = row("x@9", families={"a": 0.4, "b": 0.2, "c": 0.0, "d": 0.1})
    whole = row("y@9", families={"a": 0.5, "b": 0.797, "c": 0.0, "d": 0.9})
    headline = Headline("m", "t", ("a", "b", "c"), {"d": "not learnt"}, {"a": 0.1}, 0.1)
    (found,) = heat_maps(results(dense, hurt, whole, headline=[headline]), [dense, hurt, whole])
    assert [cell.worst for cell in found.lines[0].cells] == [False, True, False, False]  # d does not count
    assert not any(cell.worst for cell in found.lines[1].cells)  # 100 % to the digits shown
    assert [cell.kept for cell in found.lines[0].cells][2] is None and found.blind == {"a": 0.1}
    assert heat_maps(results(hurt), [hurt]) == []


def test_points_lie_where_the_numbers_are():
    rows = [row("dense", 0.85), row("a@36", 0.6, half=0.1), row("a@9", 0.4, half=0.1)]
    (panel,) = panels(rows, None)
    dots = re.findall(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', panel.svg)
    (x9, y9), (x36, y36) = (tuple(map(float, dot)) for dot in dots)
    assert x9 < x36 and y9 > y36  # fewer tokens to the left, lower accuracy further down
    assert panel.svg.count("<title>") == 2 and "a@9: 40.0 % [30.0, 50.0] at 9 tokens" in panel.svg
    assert ">accuracy, %</text>" in panel.svg and "tokens per question" in panel.svg
    assert "chance-line" not in panel.svg
    headline = Headline("m", "t", ("f",), {}, {"f": 0.25}, 0.25)
    (with_chance,) = panels(rows, headline)
    (y,) = re.findall(r'class="chance-line" [^>]*y1="([\d.]+)"', with_chance.svg)
    lowest = max(
        float(found) for found in re.findall(r'class="dot" cx="[\d.]+" cy="([\d.]+)"', with_chance.svg)
    )
    assert float(y) > lowest


def test_one_budget_is_drawn_as_one_chart_the_best_first():
    rows = [
        row("dense", 0.85),
        row("a@9", 0.6),
        row("b@9", 0.7),
        row("random@9", 0.4, band=Band(("s",), 0.35, 0.45)),
    ]
    (panel,) = panels(rows, None)
    assert panel.series == "" and panel.svg == forest(rows, None)
    names = re.findall(r'data-name="">([^<]+)<', panel.svg)
    assert names == ["dense", "b@9", "a@9", "random@9"]
    places = [float(x) for x in re.findall(r'class="dot[^"]*" cx="([\d.]+)"', panel.svg)]
    assert places == sorted(places, reverse=True)
    assert panel.svg.count("random-band") == 1 and panel.svg.count("dense-line") == 1
    assert panels([row("dense")], None) == []


def test_a_run_without_visual_tokens_is_drawn():
    rows = [
        row("dense", realised_tokens=0.0),
        row("a@9", realised_tokens=0.0),
        row("a@4", realised_tokens=0.0),
    ]
    assert panels(rows, None)


@pytest.mark.parametrize(
    ("ends", "found"),
    [
        ((0.3, 1.0), [0.4, 0.6, 0.8, 1.0]),
        ((0.5, 1.0), [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ((0.9, 1.0), [0.9, 1.0]),
    ],
)
def test_ticks_are_round_and_inside(ends, found):
    assert ticks(ends) == pytest.approx(found)


def test_the_page_says_only_what_the_intervals_support():
    rows = [row("dense", 0.9, mdd=None), row("random@9", 0.4, mdd=0.07), row("pool@9", 0.5, mdd=0.06)]
    rows += [row("a@9", 0.8, mdd=0.02, vs_random=difference(0.4), worst=Worst("text", 0.3, 0.4))]
    rows += [row("b@9", 0.5, mdd=0.03, vs_random=difference(0.1), worst=Worst("text", 0.3, 1.0))]
    headline = Headline("m", "t", ("f",), {}, {"f": 0.25}, 0.25)
    first, second, third = sentences(results(*rows, headline=[headline]))
    assert "answers 90.0 % of 100 questions, the best guess without a look at the picture 25.0 %." in first
    assert "below 2.0 to 7.0 points" in first
    assert second == (
        "keep 9: 1 of 2 methods beats random tokens, 1 lies clearly above pooling (50.0 %), a@9 stands alone "
        "at the top (80.0 %)."
    )
    assert third == "Hardest hit: a@9 keeps 40 % of the dense accuracy on text."
    harmless = [replace(one, worst=None) for one in rows]
    assert not any("Hardest" in text for text in sentences(results(*harmless)))
