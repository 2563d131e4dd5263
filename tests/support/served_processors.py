# SPDX-License-Identifier: Apache-2.0
"""Processors that fit small random models of families without a tiny processor in the package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vlmprune.testing.families.shared import (
    GRID,
    IMAGE_SIZE,
    MERGE,
    PATCH_SIZE,
    SQUARE,
    image_processor,
    tiny_tokenizer,
)

TOKEN = PATCH_SIZE * MERGE  # pixels along the side of a token, where a token is MERGE x MERGE patches
SIDE = IMAGE_SIZE * MERGE  # pixels along the side of a tile of GRID x GRID such tokens
AREA: dict[str, Any] = {
    "size": {"shortest_edge": SIDE**2 // 2, "longest_edge": SIDE**2},
    "patch_size": PATCH_SIZE,
    "merge_size": MERGE,
}
# marks around and between pictures are single bytes
MARKS = {"boi_token": "[", "eoi_token": "]"}


def tiles(side: int) -> dict[str, Any]:
    """One to three square tiles."""
    return {
        "size": {"height": side, "width": side},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 3,
    }


def aria() -> Any:
    from transformers import AriaProcessor

    images = image_processor("Aria", min_image_size=1)
    return AriaProcessor(
        images, tiny_tokenizer(image_token="<image>"), size_conversion={490: GRID**2, 980: GRID**2}
    )


def aya() -> Any:
    """Tiles with words in front of each, so that it matters which placeholders go."""
    from transformers import AyaVisionProcessor

    return AyaVisionProcessor(
        image_processor("GotOcr2", **tiles(SIDE)),
        tiny_tokenizer(),
        patch_size=PATCH_SIZE,
        img_size=SIDE,
        downsample_factor=MERGE,
        image_token="<video>",
        img_patch_token="<image>",
        start_of_img_token="[",
        end_of_img_token="]",
    )


def cohere2() -> Any:
    from transformers import Cohere2VisionProcessor

    # here patch_size is the number of tokens along the side of a tile
    images = image_processor("Cohere2Vision", **tiles(SIDE), patch_size=GRID)
    return Cohere2VisionProcessor(
        images, tiny_tokenizer(image_token="<image>", img_line_break_token="|", **MARKS)
    )


def deepseek() -> Any:
    from transformers import DeepseekVLProcessor

    images = image_processor("DeepseekVL", size=SQUARE, min_size=1)
    return DeepseekVLProcessor(images, tiny_tokenizer(image_token="<image>"), num_image_tokens=GRID**2)


def paddle() -> Any:
    from transformers import PaddleOCRVLProcessor

    return PaddleOCRVLProcessor(image_processor("PaddleOCRVL", **AREA), tiny_tokenizer(image_token="<image>"))


def renamed(names: dict[str, str], **special: str) -> Any:
    """The tokenizer of bytes with other names of its special tokens."""
    import transformers
    from tokenizers import Tokenizer

    words = tiny_tokenizer().backend_tokenizer.to_str()
    for old, new in names.items():
        words = words.replace(old, new)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(words),
        pad_token="<pad>",
        bos_token=names.get("<s>", "<s>"),
        eos_token=names.get("</s>", "</s>"),
        **({"extra_special_tokens": special} if special else {}),
    )


def qianfan() -> Any:
    """vLLM's own processor knows these names."""
    from transformers import InternVLProcessor, InternVLVideoProcessor

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = image_processor("GotOcr2", **tiles(SIDE), image_mean=mean, image_std=std)
    # what stands for a clip in transformers is what vLLM puts a picture in the place of
    words = {"<image>": "<IMG_CONTEXT>", "<video>": "<image>", "<s>": "<img>", "</s>": "</img>"}
    tokens = {"context_image_token": "<IMG_CONTEXT>", "video_token": "<image>"}
    tokens |= {"start_image_token": "<img>", "end_image_token": "</img>"}
    return InternVLProcessor(
        images, renamed(words, **tokens), InternVLVideoProcessor(), image_seq_length=GRID**2
    )


def vllm_tiles(images: list[Any]) -> Any:
    """Tiles as vLLM's own processor of Qianfan-OCR makes them; that of transformers resizes otherwise."""
    from vllm.transformers_utils.processors.internvl import InternVLImageProcessor

    bounds = {"min_dynamic_patch": 1, "max_dynamic_patch": 3, "dynamic_image_size": True}
    made = InternVLImageProcessor(image_size=SIDE, use_thumbnail=True, **bounds)
    return made(images, return_tensors="pt")["pixel_values_flat"]


def omni(start: str) -> Any:
    import transformers

    from vlmprune.testing.tiny import tiny_processor

    parts = tiny_processor("qwen2_5_vl")
    marks = {"vision_bos_token": "</s>", "vision_eos_token": "<s>"}
    sounds = {"audio_token": "ă", "audio_bos_token": "(", "audio_eos_token": ")"}
    return getattr(transformers, f"{start}Processor")(
        image_processor=parts.image_processor,
        tokenizer=tiny_tokenizer(image_token="<image>", video_token="<video>", **marks, **sounds),
        video_processor=parts.video_processor,
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=8),
    )


def got() -> Any:
    from transformers import GotOcr2Processor

    # it knows its placeholder by this name only
    return GotOcr2Processor(image_processor("GotOcr2", **tiles(2 * SIDE)), renamed({"<image>": "<imgpad>"}))


def qwen3() -> Any:
    from transformers import Qwen3VLProcessor

    from vlmprune.testing.tiny import tiny_processor

    parts = tiny_processor("qwen3_vl")
    # vLLM writes clips with these names
    names = {
        "<image>": "<|image_pad|>",
        "<video>": "<|video_pad|>",
        "</s>": "<|vision_end|>",
        "<s>": "<|vision_start|>",
    }
    tokenizer = renamed(
        names,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    return Qwen3VLProcessor(
        image_processor=parts.image_processor, tokenizer=tokenizer, video_processor=parts.video_processor
    )


def idefics3() -> Any:
    from transformers import Idefics3Processor

    # up to 2 x 2 tiles, and the whole picture
    images = image_processor(
        "Idefics3", size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    return Idefics3Processor(images, tiny_tokenizer(), image_seq_len=GRID**2)


def perception() -> Any:
    from transformers import PerceptionLMProcessor, PerceptionLMVideoProcessor

    images = image_processor("PerceptionLM", tile_size=IMAGE_SIZE, max_num_tiles=3)
    tokenizer = tiny_tokenizer(image_token="<image>", video_token="<video>")
    return PerceptionLMProcessor(
        PerceptionLMVideoProcessor(), images, tokenizer, patch_size=PATCH_SIZE, pooling_ratio=1
    )


def smol() -> Any:
    from transformers import SmolVLMProcessor, SmolVLMVideoProcessor

    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    return SmolVLMProcessor(
        image_processor("SmolVLM", **sizes),
        tiny_tokenizer(),
        SmolVLMVideoProcessor(size={"longest_edge": SIDE}),
        image_seq_len=GRID**2,
    )


def packed(name: str, images: str = "Qwen2VL", clips: str = "Qwen2VL", **sizes: Any) -> Any:
    """Pictures of any size, of about GRID x GRID tokens."""
    import transformers

    names = {"image_token": "<image>", "video_token": "<video>"}
    return getattr(transformers, f"{name}Processor")(
        image_processor=image_processor(images, **(sizes or AREA)),
        tokenizer=tiny_tokenizer(**names),
        video_processor=getattr(transformers, f"{clips}VideoProcessor")(),
    )


def fast() -> Any:
    from transformers import LlavaProcessor

    square = {"height": 32 * GRID, "width": 32 * GRID}
    images = image_processor("CLIP", size=square, crop_size=square)
    return LlavaProcessor(images, tiny_tokenizer(), patch_size=32, vision_feature_select_strategy="full")


# vLLM asks for tokens of several line ends, which no text here has; as they stand in JSON
LINE_ENDS = {byte: "\\n" * (number + 1) for number, byte in enumerate("ĀāĂă")}


def gemma3() -> Any:
    from transformers import Gemma3Processor

    images = image_processor("Gemma3", size={"height": SIDE, "width": SIDE})
    tokenizer = renamed(LINE_ENDS, image_token="<image>", boi_token="[", eoi_token="]")
    return Gemma3Processor(images, tokenizer, image_seq_length=GRID**2)


def gemma3n() -> Any:
    from transformers import Gemma3nAudioFeatureExtractor, Gemma3nProcessor

    marks = {"image_token": "<image>", "boi_token": "[", "eoi_token": "]"}
    sounds = {"audio_token": "<video>", "boa_token": "(", "eoa_token": ")"}
    return Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(feature_size=16),
        image_processor("Siglip", size={"height": 32 * GRID, "width": 32 * GRID}),
        renamed(LINE_ENDS, **marks, **sounds),
        image_seq_length=GRID**2,
    )


def gemma4() -> Any:
    from transformers import Gemma4AudioFeatureExtractor, Gemma4Processor, Gemma4VideoProcessor

    sizes: dict[str, Any] = {"patch_size": PATCH_SIZE, "pooling_kernel_size": MERGE, "max_soft_tokens": 70}
    marks = {"image_token": "<image>", "boi_token": "[", "eoi_token": "]"}
    sounds = {"audio_token": "<video>", "boa_token": "(", "eoa_token": ")"}
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(feature_size=16),
        image_processor("Gemma4", **sizes),
        tiny_tokenizer(**marks, **sounds),
        Gemma4VideoProcessor(**sizes),
        image_seq_length=70,
    )


def granite() -> Any:
    from transformers import Granite4VisionProcessor

    from vlmprune.testing.families.llava_next import PINPOINTS

    sizes = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS}
    return Granite4VisionProcessor(
        image_processor("LlavaNext", **sizes),
        tiny_tokenizer(),
        patch_size=PATCH_SIZE // 2,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
    )


def lfm2() -> Any:
    """One picture, or two to four tiles and the whole."""
    from transformers import Lfm2VlProcessor

    sizes = {"encoder_patch_size": PATCH_SIZE, "downsample_factor": MERGE, "tile_size": IMAGE_SIZE}
    images = image_processor(
        "Lfm2Vl", **sizes, min_image_tokens=4, max_image_tokens=GRID**2, max_tiles=4, max_pixels_tolerance=0.5
    )
    return Lfm2VlProcessor(images, tiny_tokenizer(image_token="<image>"))


def glm(name: str, parts: str = "") -> Any:
    # a picture is counted as two frames
    volume = {"size": {"shortest_edge": SIDE**2, "longest_edge": 2 * SIDE**2}}
    return packed(name, parts or name, parts or name, **volume, patch_size=PATCH_SIZE, merge_size=MERGE)


def video_llama() -> Any:
    area = {"size": {"shortest_edge": IMAGE_SIZE**2 // 2, "longest_edge": IMAGE_SIZE**2}}
    return packed("VideoLlama3", "VideoLlama3", "VideoLlama3", **area, patch_size=PATCH_SIZE, merge_size=1)


def janus() -> Any:
    from transformers import JanusProcessor

    images = image_processor("Janus", size=SQUARE, min_size=1)
    tokenizer = tiny_tokenizer(image_token="<image>", **MARKS)
    return JanusProcessor(images, tokenizer, num_image_tokens=GRID**2)


def lighton() -> Any:
    from transformers import LightOnOcrProcessor

    tokenizer = tiny_tokenizer(image_token="<image>", image_break_token="|", image_end_token="]")
    images = image_processor("Pixtral", size={"longest_edge": SIDE}, patch_size=TOKEN)
    return LightOnOcrProcessor(images, tokenizer, patch_size=PATCH_SIZE, spatial_merge_size=MERGE)


def minicpm() -> Any:
    """Some pictures have slices behind the whole."""
    from transformers import MiniCPMV4_6Processor, MiniCPMV4_6VideoProcessor

    sizes = {"scale_resolution": 150, "patch_size": PATCH_SIZE, "max_slice_nums": 4}
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    marks = {"image_start_token": "[", "image_end_token": "]"}
    marks |= {"slice_start_token": "{", "slice_end_token": "}"}
    marks |= {"image_id_start_token": "(", "image_id_end_token": ")"}
    tokenizer = renamed({"<image>": "<|image_pad|>", "<video>": "<|video_pad|>"}, **names, **marks)
    images = image_processor("MiniCPMV4_6", **sizes)
    return MiniCPMV4_6Processor(images, MiniCPMV4_6VideoProcessor(**sizes), tokenizer)


def mistral3() -> Any:
    from transformers import PixtralProcessor

    images = image_processor("Pixtral", size={"longest_edge": SIDE}, patch_size=PATCH_SIZE)
    return PixtralProcessor(
        images,
        tiny_tokenizer(),
        patch_size=PATCH_SIZE,
        spatial_merge_size=MERGE,
        image_token="<image>",
        image_break_token="|",
        image_end_token="]",
    )


def ovis2() -> Any:
    """Marks around a picture are single tokens, those between tiles are words."""
    from transformers import Ovis2Processor

    images = image_processor("Ovis2", **tiles(SIDE))
    names = {"<image>": "<IMG_ATOM>", "</s>": "<IMG_START>", "<video>": "<IMG_END>"}
    return Ovis2Processor(images, renamed(names), image_seq_length=GRID**2)


# family -> processor
PROCESSORS: dict[str, Callable[[], Any]] = {
    "aria": aria,
    "aya_vision": aya,
    "cohere2_vision": cohere2,
    "deepseek_vl": deepseek,
    "exaone4_5": partial(packed, "Exaone4_5_"),
    "fast_vlm": fast,
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "granite4_vision": granite,
    "glm46v": partial(glm, "Glm46V"),
    "glm4v": partial(glm, "Glm4v"),
    "glm4v_moe": partial(glm, "Glm4v"),
    "glm_ocr": partial(glm, "Glm46V"),
    "glmga": partial(glm, "Glm46V", "Glmga"),
    "got_ocr2": got,
    "hyperclovax_vision_v2": partial(packed, "HyperCLOVAXVisionV2"),
    "idefics3": idefics3,
    "janus": janus,
    "lfm2_vl": lfm2,
    "lighton_ocr": lighton,
    "minicpmv4_6": minicpm,
    "mistral3": mistral3,
    "ovis2": ovis2,
    "paddleocr_vl": paddle,
    "perception_lm": perception,
    "qianfan_ocr": qianfan,
    "qwen2_5_omni_thinker": partial(omni, "Qwen2_5Omni"),
    "qwen3_omni_moe_thinker": partial(omni, "Qwen3OmniMoe"),
    "cosmos3_omni": qwen3,
    "qwen3_5": qwen3,
    "qwen3_5_moe": qwen3,
    "qwen3_vl": qwen3,
    "qwen3_vl_moe": qwen3,
    "smolvlm": smol,
    "video_llama_3": video_llama,
}
