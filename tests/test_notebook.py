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
from vlmprune.errors import SpecError
from vlmprune.example_picture import picture
from vlmprune.models.loading import encode
from vlmprune.testing.tiny import tiny_bundle, tiny_inputs, tiny_model

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
