# SPDX-License-Identifier: Apache-2.0
"""Families in vLLM's wrapper of transformers: what is known of a picture before it is processed."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from served_processors import PROCESSORS
from served_tiny import FAMILIES, model_of
from transformers.utils import is_torchvision_available

from vlmprune.models import adapter_class, families
from vlmprune.serving.vllm.families import IN_WRAPPER, NOT_SERVED, OWN, TRIED, architecture
from vlmprune.serving.vllm.layouts import LAYOUTS, tokens_of
from vlmprune.serving.vllm.plugin import refusal
from vlmprune.testing.tiny import tiny_processor

# that of vLLM 0.32.0, whose processors say what stands for a picture; older ones lack some of the families
with_processors = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"), reason="needs transformers 5.19"
)
# its processor, or that of its clips
OF_TORCHVISION = {
    "cohere2_vision",
    "exaone4_5",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "hyperclovax_vision_v2",
    "mistral3",
    "perception_lm",
    "smolvlm",
    "video_llama_3",
}


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(family):
    if family in ("fast_vlm", "perception_lm"):
        pytest.importorskip("timm", reason="its tower needs timm")
    return model_of(family).config


@pytest.fixture(scope="module")
def processor(family):
    if family in OF_TORCHVISION and not is_torchvision_available():
        pytest.skip("its processor needs torchvision")
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="its processor needs num2words")
    return PROCESSORS[family]() if family in PROCESSORS else tiny_processor(family)


@with_processors
def test_what_is_promised_for_a_size_is_what_the_processor_makes(family, config, processor):
    """Of wide, tall, square and very tall pictures, and two in one prompt."""
    layout, served = LAYOUTS[family], FAMILIES[family]
    for sizes in served.shapes:
        images = [Image.fromarray(np.zeros((*size, 3), np.uint8)) for size in sizes]
        text = " ".join([served.picture] * len(images))
        made = processor(images=images, text=text, return_tensors="pt", **served.asked)
        before = [layout.before(config, processor, size, served.asked) for size in sizes]
        placeholders = int((made["input_ids"] == config.image_token_id).sum())
        made_of = [tokens_of(grids) + layout.newlines(grids) for item in before for grids in item]
        assert placeholders == sum(made_of)
        if layout.field in made:
            assert before == [layout.made(config, value) for value in made[layout.field]]
        else:
            # where pictures have rows of their own, these have equally many tiles
            assert sum(map(len, before)) == math.prod(made["pixel_values"].shape[: layout.axis + 1])
            assert before == [layout.made(config, torch.tensor(len(item))) for item in before]


@with_processors
def test_patches_behind_a_token_are_counted(family, config):
    single = {"aria", "fast_vlm", "vipllava", "deepseek_vl", "janus", "llava_next_video", "video_llama_3"}
    single |= {"perception_lm"}
    wanted = dict.fromkeys(single, 1) | {"got_ocr2": 16}
    assert LAYOUTS[family].merges(config) == wanted.get(family, 4)


def test_every_layout_belongs_to_a_served_family():
    from vlmprune.testing.families import family_of

    assert {name: family_of(name).prefix for name in LAYOUTS} == {n: one[0] for n, one in IN_WRAPPER.items()}


def test_of_every_family_of_the_package_is_said_whether_it_is_served_and_why_not():
    said = [*OWN, *IN_WRAPPER, *NOT_SERVED]
    assert len(said) == len(set(said))
    # not those that other tests register
    own = {name for name in families() if adapter_class(name).__module__.startswith("vlmprune.")}
    # Emu3 has no adapter, and vLLM runs it
    assert set(said) == {*own, "emu3"}
    assert set(NOT_SERVED) >= TRIED


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
def test_a_family_that_is_not_served_is_told_why(name):
    start, reason = NOT_SERVED[name]
    assert reason in str(refusal(name)) and "\n" not in reason
    # a class that serves another family is refused when its config was read
    shared = start in {one[0] for one in IN_WRAPPER.values()}
    assert shared or any(
        why in str(refusal(architecture(start))) for other, why in NOT_SERVED.values() if other == start
    )


def test_a_family_that_nobody_looked_at_is_refused_without_a_reason():
    assert str(refusal("OtherModel")).startswith("OtherModel cannot be pruned in vLLM yet; served are")


def test_the_page_shows_the_families_of_now():
    page = Path(__file__).parents[2] / "docs" / "serve_families.py"
    spec = importlib.util.spec_from_file_location("serve_families", page)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text = made.PAGE.read_text(encoding="utf-8")
    assert made.filled(text) == text, "run python docs/serve_families.py"
