# SPDX-License-Identifier: Apache-2.0
"""Processors that tell a model nothing of the tiles of an image but their number, for tiny models."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vlmprune.testing.families.shared import (
    GRID,
    IMAGE_SIZE,
    MERGE,
    PATCH_SIZE,
    image_processor,
    tiny_tokenizer,
)

SIDE = IMAGE_SIZE * MERGE  # pixels along the side of GRID x GRID tokens of MERGE x MERGE patches


def gemma3() -> Any:
    """Pan and scan: up to four crops behind the whole image."""
    from transformers import Gemma3Processor

    images = image_processor("Gemma3", size={"height": SIDE, "width": SIDE})
    # an image is "[" in a text, which also stands in front of its tokens
    tokenizer = tiny_tokenizer(image_token="<image>", boi_token="[", eoi_token="]")
    made = Gemma3Processor(images, tokenizer, image_seq_length=GRID**2)
    made.images_kwargs = {
        **made.images_kwargs,
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 32,
    }
    return made


def idefics2() -> Any:
    """Four quarters and the whole image."""
    from transformers import Idefics2Processor

    size = {"shortest_edge": IMAGE_SIZE, "longest_edge": 2 * IMAGE_SIZE}
    images = image_processor("Idefics2", size=size, do_image_splitting=True)
    return Idefics2Processor(images, tiny_tokenizer(), image_seq_len=GRID**2)


def lfm2() -> Any:
    from transformers import Lfm2VlProcessor

    images = image_processor(
        "Lfm2Vl",
        encoder_patch_size=PATCH_SIZE,
        downsample_factor=MERGE,
        tile_size=SIDE,
        min_image_tokens=4,
        max_image_tokens=GRID**2,
        max_tiles=4,
    )
    return Lfm2VlProcessor(images, tiny_tokenizer(image_token="<image>"))


def minicpm() -> Any:
    """Up to nine slices behind the whole image."""
    from transformers import MiniCPMV4_6Processor

    marks = {
        "image_start_token": "[",
        "image_end_token": "]",
        "slice_start_token": "{",
        "slice_end_token": "}",
    }
    named = {"video_token": "<video>", "image_id_start_token": "(", "image_id_end_token": ")"}
    images = image_processor("MiniCPMV4_6", scale_resolution=168, patch_size=PATCH_SIZE)

    # clips would need torchvision; what the processor asks of them is the form of their slices
    class PicturesOnly(MiniCPMV4_6Processor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    still = SimpleNamespace(slice_mode=False, downsample_mode="16x")
    return PicturesOnly(images, still, tiny_tokenizer(image_token="<image>", **marks, **named))


def perception() -> Any:
    """Up to four tiles behind the whole image."""
    from transformers import PerceptionLMProcessor

    images = image_processor("PerceptionLM", tile_size=IMAGE_SIZE, max_num_tiles=4)

    class PicturesOnly(PerceptionLMProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = tiny_tokenizer(image_token="<image>", video_token="<video>")
    return PicturesOnly(None, images, tokenizer, patch_size=PATCH_SIZE, pooling_ratio=1)


# family -> processor
TILED: dict[str, Callable[[], Any]] = {
    "gemma3": gemma3,
    "idefics2": idefics2,
    "lfm2_vl": lfm2,
    "minicpmv4_6": minicpm,
    "perception_lm": perception,
}
# whose image processors resize by torchvision only
BY_TORCHVISION = {"lfm2_vl", "perception_lm"}
