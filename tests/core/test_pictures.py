# SPDX-License-Identifier: Apache-2.0
"""Pictures as adapters describe them, against what the model and its processor do with pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlmprune.core.method import Need
from vlmprune.hooks.vision.capture import VisionCapture
from vlmprune.hooks.vision.encode import run_encoder
from vlmprune.hooks.vision.pictures import Picture
from vlmprune.models import adapter_for
from vlmprune.testing.conformance import shared_model
from vlmprune.testing.tiny import tiny_inputs, tiny_processor

SIDE = 6  # patches along each side of a crop


def described(family: str, inputs: dict[str, Tensor], needs: Sequence[str], kind: int = 0) -> list[Picture]:
    """Every picture of one encoder call; ``kind`` 1 is that of clips."""
    adapter = adapter_for(shared_model(family, None, None))
    return run_encoder(adapter, adapter.modalities[kind], inputs, [adapter.capture(needs)])[1][0]


@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "llava_onevision", "vipllava", "video_llava", "internvl", "qwen2_vl"]
)
def test_maps_cover_what_the_usual_processor_shows_of_a_picture(family: str) -> None:
    """A centred square where the margins of a wide picture are cut off, else the whole picture."""
    noise = np.random.default_rng(0).integers(0, 255, (120, 240, 3), dtype=np.uint8)
    without_margin = noise.copy()
    without_margin[:, :30] = 0
    process = tiny_processor(family).image_processor
    made = [process(images=Image.fromarray(one), return_tensors="pt") for one in (noise, without_margin)]
    shown = [next(iter(one.values())) for one in made]  # pixels, under whatever name
    view = "center" if torch.equal(*shown) else "stretch"
    found = described(family, tiny_inputs(family, images=(1,)), ())
    assert [one.view for one in found] == [view]


@pytest.mark.parametrize(("size", "across"), [((168, 168), 2), ((84, 252), 3), ((252, 84), 1)])
def test_every_patch_of_a_tiled_picture_knows_its_tile(size: tuple[int, int], across: int) -> None:
    """The overview is crop 0, tiles count row by row; sizes (height, width) that need no padding."""
    (picture,) = described(
        "llava_next", tiny_inputs("llava_next", images=(1,), size=size), ("cls_attention",)
    )
    rows, cols = (side // 84 * SIDE for side in size)
    tile = [1 + row // SIDE * across + col // SIDE for row in range(rows) for col in range(cols)]
    assert picture.grids == ((SIDE, SIDE), (rows, cols))
    assert picture.crops().tolist() == [0] * SIDE**2 + tile


def test_rows_of_cls_stand_in_the_order_of_the_feature_layers() -> None:
    model = shared_model("llava", "clip", None)
    inputs = tiny_inputs(images=(1,))
    tower = model.model.vision_tower
    with torch.no_grad(), VisionCapture(tower, ("cls_features",), (-2, 1)) as record:
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    want = torch.cat([states[layer][:, :1] for layer in (-2, 1)], dim=-1)
    assert torch.equal(record.take()[Need("cls_features")], want)


def mean_of_cells(frame: Tensor, stride: int) -> Tensor:
    """(n, channels) of one frame in raster order -> (n / stride^2, channels), cell by cell."""
    grid = frame.unflatten(0, (SIDE, SIDE))
    cells = range(0, SIDE, stride)
    means = [grid[y : y + stride, x : x + stride].flatten(0, 1).mean(0) for y in cells for x in cells]
    return torch.stack(means)


def test_what_is_captured_of_a_pooled_clip_is_the_mean_over_each_cell_frame_after_frame() -> None:
    family = "llava_next_video"
    inputs = tiny_inputs(family, images=(0,), video=True)
    model = shared_model(family, None, None)
    frames = inputs["pixel_values_videos"].flatten(0, 1)  # (frames, 3, H, W)
    with torch.no_grad(), VisionCapture(model.model.vision_tower, ("keys",), (-2,)) as record:
        model.model.vision_tower(frames)
    stride = model.config.spatial_pool_stride
    want = torch.cat([mean_of_cells(frame, stride) for frame in record.take()[Need("keys")]])
    (clip,) = described(family, inputs, ("keys",), kind=1)
    assert clip.grids == ((SIDE // stride,) * 2,) * len(frames)
    torch.testing.assert_close(clip.captured[Need("keys")], want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_projector_of_gemma_takes_averaged_tokens_to_what_the_model_makes_of_their_patches() -> None:
    model: Any = shared_model("gemma3", None, None)
    connector = model.model.multi_modal_projector
    side, width = connector.patches_per_image, model.config.vision_config.hidden_size
    patches = torch.randn(2, side**2, width, generator=torch.Generator().manual_seed(0))
    step = side // connector.tokens_per_side
    cells = patches.unflatten(1, (side // step, step, side // step, step)).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(adapter_for(model).projector(cells), connector(patches), rtol=1e-5, atol=1e-5)
