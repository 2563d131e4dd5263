# SPDX-License-Identifier: Apache-2.0
"""Families in vLLM's wrapper of transformers: what is known of a picture before it is processed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from served_processors import PROCESSORS
from served_tiny import FAMILIES, SHAPES
from transformers.utils import is_torchvision_available

from vlmprune.serving.vllm.layouts import LAYOUTS, tokens_of
from vlmprune.serving.vllm.plugin import REASONS, WRAPPED, refusal
from vlmprune.testing.tiny import tiny_model, tiny_processor

# that of vLLM 0.32.0, whose processors say what stands for a picture; older ones lack some of the families
with_processors = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"), reason="needs transformers 5.19"
)


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(family):
    return tiny_model(family, **FAMILIES[family].options).config


@pytest.fixture(scope="module")
def processor(family):
    if family in ("cohere2_vision", "mistral3") and not is_torchvision_available():
        pytest.skip("its processor needs torchvision")
    return PROCESSORS[family]() if family in PROCESSORS else tiny_processor(family)


@with_processors
def test_what_is_promised_for_a_size_is_what_the_processor_makes(family, config, processor):
    """Of wide, tall, square and very tall pictures, and two in one prompt."""
    layout, served = LAYOUTS[family], FAMILIES[family]
    for sizes in SHAPES:
        images = [Image.fromarray(np.zeros((*size, 3), np.uint8)) for size in sizes]
        text = " ".join([served.picture] * len(images))
        made = processor(images=images, text=text, return_tensors="pt", **served.asked)
        before = [layout.before(config, processor, size, served.asked) for size in sizes]
        placeholders = int((made["input_ids"] == config.image_token_id).sum())
        assert placeholders == sum(tokens_of(grids) for item in before for grids in item)
        if layout.field in made:
            assert before == [layout.made(config, value) for value in made[layout.field]]
        else:
            assert sum(map(len, before)) == made["pixel_values"].shape[layout.axis]
            assert before == [layout.made(config, torch.tensor(len(item))) for item in before]


@with_processors
def test_patches_behind_a_token_are_counted(family, config):
    wanted = {"vipllava": 1, "deepseek_vl": 1, "janus": 1, "got_ocr2": 16}
    assert LAYOUTS[family].merges(config) == wanted.get(family, 4)


def test_every_layout_belongs_to_a_served_architecture():
    from vlmprune.testing.families import family_of

    assert {family_of(name).prefix for name in LAYOUTS} == set(WRAPPED)


@pytest.mark.parametrize("name", sorted(REASONS))
def test_a_family_that_is_not_served_is_told_why(name):
    said = str(refusal(f"{name}ForConditionalGeneration"))
    assert REASONS[name] in said and name not in WRAPPED and "\n" not in said


def test_a_family_that_nobody_looked_at_is_refused_without_a_reason():
    assert str(refusal("OtherModel")).startswith("OtherModel cannot be pruned in vLLM yet; served are")
