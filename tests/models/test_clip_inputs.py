# SPDX-License-Identifier: Apache-2.0
"""From frames to model inputs: as one clip where a processor takes clips, else as images of one prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BatchFeature
from transformers.utils import is_torchvision_available

import vlmprune
from vlmprune.models.loading import encode_clip
from vlmprune.testing.tiny import picture, tiny_bundle, tiny_model

FRAMES = [picture(number, (84, 84)) for number in range(4)]


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_frames_are_images_where_a_model_knows_no_clips(family: str) -> None:
    model, processor = tiny_bundle(family)
    inputs, apart = encode_clip(model, processor, FRAMES, "What moves?")
    assert apart
    with vlmprune.prune(model, "evs@0.5", frames=True) as run, torch.no_grad():
        model(**inputs)
    assert len(run.last.keep) == 4 and sum(run.last.realised_tokens) * 2 == sum(run.last.dense_tokens)


def test_smolvlm_is_asked_for_whole_frames() -> None:
    class Recording:
        """Takes what it is given for model inputs."""

        def __call__(self, **options: Any) -> BatchFeature:
            self.given = options
            return BatchFeature({})

    processor = Recording()
    _, apart = encode_clip(tiny_model("smolvlm"), processor, FRAMES, "What moves?")
    assert apart and processor.given["do_image_splitting"] is False
    assert len(processor.given["images"]) == processor.given["text"].count("<image>") == 4


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision: processors read clips with it")
# tiny processors of other families are not sized for clips
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl"])
def test_frames_are_a_clip_where_a_processor_takes_clips(family: str) -> None:
    model, processor = tiny_bundle(family)
    times = [1.0, 3.0, 5.0, 7.0]
    inputs, apart = encode_clip(model, processor, FRAMES, "What moves?", times)
    assert not apart and "pixel_values_videos" in inputs
    if family == "qwen2_5_vl":  # two frames, two seconds apart, are one of the grid
        assert inputs["second_per_grid_ts"].tolist() == pytest.approx([4.0])
    with vlmprune.prune(model, "vidcom2@0.5") as run, torch.no_grad():
        model(**inputs)
    assert len(run.last.keep) == (2 if "qwen" in family else 4)
    assert all(one.frame is not None for one in run.last.keep)
