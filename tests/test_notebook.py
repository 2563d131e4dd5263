# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows of our objects: a short line, a picture, a table, and nothing that could run."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import vlmprune
from vlmprune.core.keepmap import KeepMap, ScoreMap
from vlmprune.core.report import Report
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.example_picture import picture
from vlmprune.models.loading import encode
from vlmprune.testing.tiny import tiny_bundle, tiny_inputs, tiny_model
from vlmprune.viz.notebook import LEAST_WIDTH, beside, figure, sheet, slider

HOSTILE = "<script>alert(1)</script>"
SCORES = ScoreMap(torch.arange(6.0), ((2, 3),), "fastervlm")
REPORT = Report(
    "fastervlm@2",
    dense_tokens=[6, 6],
    realised_tokens=[2, 2],
    layer_tokens=[[2, 2, 2], [2, 2, 1]],
    sequence=(30, 22),
    firings={"encode": 1},
    seconds=0.0021,
)


class Reader(HTMLParser):
    """Names of the tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.sources = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        (SCORES, "ScoreMap('fastervlm', 6 tokens, scores 0 to 5, 2 x 3, image 0)"),
        (SCORES.keep(2), "KeepMap('fastervlm', 2 of 6 tokens, 2 x 3, image 0)"),
        (REPORT, "Report(fastervlm@2: 4 of 12 visual tokens in 2 images, 2.1 ms to choose)"),
        (vlmprune.parse("holov( crops = 4 )@0.25/crop"), "Spec('holov(crops=4)@0.25/crop')"),
        (vlmprune.parse("pool@4").parts, "(Part('pool@4'),)"),
        (vlmprune.method_info("random"), "MethodInfo('random', before_lm, needs nothing, options: seed)"),
    ],
)
def test_an_object_is_one_short_line(shown, said):
    assert repr(shown) == said


@pytest.mark.parametrize("shown", [SCORES, SCORES.keep(2)])
def test_a_map_shows_itself_drawn(shown):
    png = Image.open(io.BytesIO(shown._repr_png_()))
    assert png.format == "PNG" and (np.asarray(png) == np.asarray(shown.draw(max_side=640))).all()
    page = Reader(shown._repr_html_())
    assert page.tags[:2] == ["figure", "img"] and page.text == repr(shown)
    (source,) = page.sources
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == shown._repr_png_()


def test_a_map_of_a_large_picture_stays_small_in_a_notebook():
    large = ScoreMap(torch.arange(6.0), ((2, 3),), image=Image.new("RGB", (3000, 2000)))
    assert Image.open(io.BytesIO(large._repr_png_())).size == (640, 427)


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (REPORT, ["[2, 2] of [6, 6]", "2, 2, 1.5", "22 of 30", "encode 1"]),
        (Report("dense", note="no images in this call"), ["no images in this call"]),
        (
            vlmprune.parse("debias+fastv(layer=2)@0.25"),
            ["debias", "fastv(layer=2)@0.25", "last prompt token"],
        ),
        (
            vlmprune.method_info("fastervlm"),
            ["Ranks patches", "cls_attention", "option layer", "arXiv:2412.01818v1"],
        ),
    ],
)
def test_other_objects_show_a_table(shown, words):
    page = Reader(shown._repr_html_())
    assert set(page.tags) == {"table", "caption", "code", "tr", "th", "td"}
    assert [word for word in words if word not in page.text] == []


def test_names_in_double_backticks_are_shown_as_code():
    page = vlmprune.parse("debias+fastv(layer=2)@0.25")._repr_html_()
    assert "``" not in page and "<code>debias+fastv@64</code>" in page


def test_text_in_an_object_is_never_markup():
    hostile = [ScoreMap(torch.rand(4), ((2, 2),), HOSTILE), KeepMap([0], 4, ((2, 2),), method=HOSTILE)]
    for shown in [*hostile, Report(HOSTILE, firings={HOSTILE: 1}, note=HOSTILE)]:
        page = shown._repr_html_()
        assert "<script" not in page and HOSTILE in Reader(page).text


def test_scores_remember_the_pictures_that_were_given():
    model, processor = tiny_bundle()
    photo, other = picture(0), picture(1)
    inputs = encode(model, processor, photo, "?")
    (alone,) = vlmprune.score(model, inputs, "fastervlm", image=photo)
    assert alone.image is photo and (np.asarray(alone.draw()) == np.asarray(alone.draw(photo))).all()
    assert vlmprune.score(model, inputs, "fastervlm")[0].image is None
    two = processor(images=[photo, other], text="<image> <image> ?", return_tensors="pt")
    found = vlmprune.score(model, two, "fastervlm", image=[photo, other])
    assert [one.image for one in found] == [photo, other]
    for wrong in (photo, [photo], [photo] * 3):
        with pytest.raises(SpecError, match=re.escape("expected 2, one for each that inputs were made of")):
            vlmprune.score(model, two, "fastervlm", image=wrong)


def test_every_frame_of_a_clip_gets_the_picture_of_the_clip():
    clip, inputs = picture(2), tiny_inputs("llava_next_video", images=(0,), video=True)
    maps = vlmprune.score(tiny_model("llava_next_video"), inputs, "fastervlm", image=[clip])
    assert len(maps) > 1 and all(one.image is clip for one in maps)


# --- pictures, rows of things, tables -------------------------------------------------------------


def test_a_map_on_another_picture_is_the_same_map_and_draws_on_it():
    photo, keep = picture(0), SCORES.keep(2)
    on = keep.on(photo)
    assert on.image is photo and keep.image is None and on.keep_idx.equal(keep.keep_idx)
    assert (np.asarray(on.draw()) == np.asarray(keep.draw(photo))).all()
    assert isinstance(SCORES.on(photo), ScoreMap) and on.on(None).image is None


@pytest.mark.parametrize(("width", "shown"), [(144, 432), (LEAST_WIDTH, LEAST_WIDTH), (640, 640), (1, 320)])
def test_a_small_picture_is_shown_enlarged_by_whole_pixels(width, shown):
    page = figure(Image.new("RGB", (width, 10)), "a")
    assert f'width="{shown}"' in page and ("pixelated" in page) == (shown > width)


def test_things_stand_beside_each_other_below_their_titles():
    page = beside([SCORES, SCORES.keep(2)], ["all <b>", "two"])._repr_html_()
    found = Reader(page)
    assert found.tags.count("figure") == 2 and "all <b>" in found.text and "two" in found.text
    assert page.index("all &lt;b&gt;") < page.index(repr(SCORES)[:8]) < page.index("two")
    assert Reader(beside([SCORES])._repr_html_()).tags.count("figure") == 1
    with pytest.raises(SpecError, match="1 titles were given for 2 things"):
        beside([SCORES, SCORES], ["one"])


def test_a_sheet_has_a_column_for_every_name_and_no_markup():
    page = sheet([{"spec": "``dense``", "n": 1}, {"spec": HOSTILE, "p": 0.5}])._repr_html_()
    assert page.count("<th>") == 3 and page.count("<td>") == 6
    assert "<td><code>dense</code></td><td>1</td><td></td>" in page
    assert "<script" not in page and HOSTILE in Reader(page).text


# --- the slider -----------------------------------------------------------------------------------


def test_the_map_follows_the_slider():
    pytest.importorskip("ipywidgets")
    chosen, drawing = slider(SCORES, keep=2).children
    assert (chosen.min, chosen.max, chosen.value) == (1, 6, 2)
    assert drawing.value == SCORES.keep(2)._repr_html_()
    chosen.value = 5
    assert drawing.value == SCORES.keep(5)._repr_html_()
    assert slider(SCORES).children[0].value == 1


@pytest.mark.parametrize("keep", [0, 7, 2.0, True])
def test_a_slider_cannot_stand_outside(keep):
    pytest.importorskip("ipywidgets")
    with pytest.raises(SpecError, match="expected a number of tokens from 1 to 6"):
        slider(SCORES, keep)


def test_without_ipywidgets_the_slider_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    with pytest.raises(UnsupportedError, match=re.escape('pip install -e ".[notebook]"')):
        slider(SCORES)
