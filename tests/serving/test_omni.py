# SPDX-License-Identifier: Apache-2.0
"""Thinkers in vLLM: sounds, which stay whole, and clips with their sound, which are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlmprune.errors import UnsupportedError

pytestmark = pytest.mark.vllm
NAMES = ["Qwen2_5OmniForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"]
FRAMES = 40  # of a sound
PICTURE, SOUND = 6, {NAMES[0]: 10, NAMES[1]: 5}  # tokens of both


def model(name):
    """A model without layers."""
    from vlmprune.serving.vllm import qwen_omni

    made = object.__new__(getattr(qwen_omni, name))
    made.config = SimpleNamespace(
        vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=25), position_id_per_seconds=25
    )
    made.merge = 2
    return made


def feature(modality, offset, length, **data):
    place = SimpleNamespace(offset=offset, length=length)
    held = {name: SimpleNamespace(data=value) for name, value in data.items()}
    return SimpleNamespace(modality=modality, mm_position=place, data=held)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_a_sound_have_the_positions_that_vllm_gives_them(name):
    """Between two pictures; all stay, so that vLLM's own positions say where each of them is."""
    from vlmprune.serving.vllm.mrope import grid_places

    grid, length = torch.tensor([1, 4, 6]), SOUND[name]
    starts = (3, 3 + PICTURE + 2, 3 + PICTURE + 2 + length + 2)
    features = [
        feature("image", starts[0], PICTURE, image_grid_thw=grid),
        feature("audio", starts[1], length, audio_feature_lengths=torch.tensor(FRAMES)),
        feature("image", starts[2], PICTURE, image_grid_thw=grid),
    ]
    tokens = [0] * (starts[2] + PICTURE + 4)
    served = model(name)
    positions, delta = served.get_mrope_input_positions(tokens, features)
    for start in (starts[0], starts[2]):
        positions[:, start : start + PICTURE] += grid_places(1, 2, 3).T
    # what stands behind ours among its classes
    own = next(kind for kind in type(served).__mro__ if kind.__module__.startswith("vllm."))
    wanted, behind = own.get_mrope_input_positions(served, tokens, features)
    assert positions.equal(wanted) and delta == behind


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_sound_add_nothing_to_their_positions(name, monkeypatch):
    from vlmprune.serving.vllm.mrope import split_places

    served, sounds = model(name), [torch.rand(3, 8), torch.rand(2, 8)]
    for method, answer in (("_parse_and_validate_audio_input", "parsed"), ("_process_audio_input", sounds)):
        monkeypatch.setattr(type(served), method, lambda self, *args, given=answer, **kwargs: given)
    found = [split_places(one) for one in served.embed_multimodal(input_audio_features=torch.rand(4, 9))]
    assert [rows.equal(one) for (rows, _), one in zip(found, sounds, strict=True)] == [True, True]
    assert all(not places.any() for _, places in found)


def test_clips_with_their_sound_are_refused():
    from vlmprune.serving.vllm.qwen_omni import Qwen25OmniProcessor

    merged = {"use_audio_in_video": True}
    context = SimpleNamespace(get_merged_mm_kwargs=lambda options: {**merged, **options})
    processor = object.__new__(Qwen25OmniProcessor)
    processor.info = SimpleNamespace(ctx=context)
    with pytest.raises(UnsupportedError, match="take turns with those of its sound"):
        processor._request(SimpleNamespace(hf_processor_mm_kwargs={"vlmprune": "dense"}, mm_data_items={}))
