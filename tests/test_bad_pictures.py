# SPDX-License-Identifier: Apache-2.0
"""Pictures and questions that are given by mistake: one sentence each, and no error of another library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import vlmprune
from vlmprune.errors import SpecError
from vlmprune.hub import deployment_card
from vlmprune.testing.tiny import picture

QUESTION = "What shape is red?"


@pytest.fixture(scope="module")
def loaded():
    return vlmprune.load("tiny")


def slips():
    """Picture, question, and what is said of them."""
    shown = picture()
    of_image = "; expected one PIL image or the path of one; arrays become images by PIL.Image.fromarray"
    return {
        "no picture": (None, QUESTION, f"image is a NoneType{of_image}"),
        "two pictures": ([shown, shown], QUESTION, f"image is a list{of_image}"),
        "an array": (np.asarray(shown), QUESTION, f"image is a ndarray{of_image}"),
        "no question": (shown, None, "the question is a NoneType; expected one text, behind the picture"),
        "half a character": (shown, "Why \ud83d?", "holds half of a character"),
        "two questions": (shown, [QUESTION] * 2, "the question is a list; expected one text"),
        "swapped": (QUESTION, shown, "the question is a Image; expected one text, behind the picture"),
        "no such file": ("none.png", QUESTION, "'none.png' cannot be read as a picture"),
        "a URL": ("https://a.org/b.png", QUESTION, "is a URL, and none is read; expected the path of a file"),
    }


@pytest.mark.parametrize("slip", slips())
def test_encode_says_what_is_wrong_with_picture_or_question(loaded, slip):
    image, question, said = slips()[slip]
    with pytest.raises(SpecError) as error:
        vlmprune.encode(*loaded, image, question)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_encode_takes_a_path_of_either_kind(loaded, tmp_path):
    picture().save(tmp_path / "a.png")
    wanted = vlmprune.encode(*loaded, picture(), QUESTION)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        given = vlmprune.encode(*loaded, path, QUESTION)
        assert all(torch.equal(given[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("by_path", [True, False])
def test_the_model_sees_deep_grey_as_it_is_drawn(loaded, tmp_path, by_path):
    grey = np.asarray(picture().convert("L"))
    low, high = int(grey.min()), int(grey.max())
    deep = Image.fromarray(((grey.astype(np.uint32) - low) * 65535 // (high - low)).astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    seen = vlmprune.encode(*loaded, tmp_path / "deep.png" if by_path else deep, QUESTION)["pixel_values"]
    level = Image.fromarray(((grey.astype(np.float64) - low) / (high - low) * 255).astype(np.uint8))
    wanted = vlmprune.encode(*loaded, level, QUESTION)["pixel_values"]
    assert (seen - wanted).abs().max() < 0.02 and seen.std() > 0.1


@pytest.mark.parametrize("slip", slips())
def test_a_second_look_says_the_same(loaded, slip):
    image, question, said = slips()[slip]
    with pytest.raises(SpecError) as error:
        vlmprune.refine(*loaded, image, question)
    assert said in str(error.value)


@pytest.mark.parametrize("layers", [3, "3", 3.0])
def test_a_second_look_wants_layers_in_a_list(loaded, layers):
    with pytest.raises(SpecError, match=r"layers='?3.*; expected a list of decoder layers, such as \[3"):
        vlmprune.refine(*loaded, picture(), QUESTION, layers=layers)


def test_a_second_look_takes_a_path(loaded, tmp_path):
    vlmprune.example().picture.save(tmp_path / "a.png")
    options = {"layers": [3], "steps": "first", "max_new_tokens": 2}
    found = vlmprune.refine(*loaded, tmp_path / "a.png", QUESTION, **options)
    assert found.box == vlmprune.refine(*loaded, vlmprune.example().picture, QUESTION, **options).box


def test_a_card_needs_a_report():
    with pytest.raises(SpecError, match=r"report is a NoneType; expected a Report, which is in run\.last"):
        deployment_card("a/model", "fastervlm@64", None)
