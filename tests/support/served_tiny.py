# SPDX-License-Identifier: Apache-2.0
"""Small random models as an engine loads them from a folder, their twins in transformers, and prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest import MonkeyPatch
from served_processors import PROCESSORS, SIDE, vllm_tiles

from vlmprune.testing.families.shared import BYTES, PATCH_SIZE

NEW = 6  # tokens of an answer
# heads of the language model are as wide as vLLM's backend for CPUs wants them
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
_WIDE = HEADS | {"head_dim": 32}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN3 = _WIDE | {"rope_parameters": _ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
_QWEN3_5 = _WIDE | {"rope_parameters": _QWEN3["rope_parameters"] | {"partial_rotary_factor": 1.0}}
_PLACED = _WIDE | {"rope_parameters": _ROPE | {"mrope_section": [4, 6, 6], "partial_rotary_factor": 1.0}}
_FEATURES = ("dense", "divprune@0.25", "uniform@20", "pool@9")
_QUERIES = ("dense", "divprune@0.25", "gprune@20", "divprune@9", "textmonkey@12")  # of tokens without places
_OF_LLAVA = ("fastervlm@9", "visionzip@12", "zooprune@9", "vispruner@12")
_OF_QWEN = ("fastervlm(cls=mean)@9", "visionzip(cls=mean, place=after)@12", "divprune@9")
_FLAT = {"within": "", "text": "model"}
# wide and tall pictures of Gemma 3 have crops behind the whole
_PANNED = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 50,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.5,
}
# (height, width): wide, tall, square, very tall, and two pictures of different shape in one prompt
SHAPES = (((84, 168),), ((200, 90),), ((168, 168),), ((250, 60),), ((100, 100), (168, 84)))


@dataclass(frozen=True)
class Served:
    """A family: what its small model is made with, and what is asked of it."""

    specs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    tower: str | None = None  # another one than that of the small models of the package
    nested_tower: bool = False  # vLLM wants the names of weights that transformers had before
    inputs_first: bool = False  # experts of checkpoints are the transposed ones of transformers
    # prune refuses it here: this transformers makes several answers of one prompt by other pictures
    single: bool = False
    tied: bool = False  # vLLM has no head apart from its table of words
    picture: str = "<image>"  # stands for a picture in the text
    pixels: Callable[[list[Any]], Any] | None = None  # in place of those of transformers
    target: str = ""  # the same in what vLLM is given, where that is another word
    clip: str = "<video>"  # stands for a clip
    wrapped: bool = False  # runs in vLLM's wrapper of transformers
    asked: dict[str, Any] = field(default_factory=dict)  # options of its processor
    shapes: tuple[tuple[tuple[int, int], ...], ...] = SHAPES
    # checkpoints hold a model around it: start of the name of its class, and its name in there
    within: tuple[str, str] | None = None
    told: dict[str, Any] = field(default_factory=dict)  # by released configs, and not by transformers
    architecture: str | None = None  # start of the name of its class in checkpoints that vLLM reads
    places: dict[str, str] = field(default_factory=dict)  # of weights there: start of a name -> another
    inside: str = ""  # folder of the weights there
    # where this transformers has the parts of the model, for which the adapter knows a newer one only
    parts: dict[str, str] = field(default_factory=dict)
    # fields that vLLM reads of its config, or of a part of it, and transformers does not
    named: dict[str, dict[str, int]] = field(default_factory=dict)
    # weights that are made larger, so that answers depend on what stays of pictures
    louder: str | None = None


FAMILIES = {
    "llava_next": Served(_FEATURES + _OF_LLAVA, HEADS | {"head_dim": 32}, nested_tower=True),
    "llava_onevision": Served((*_FEATURES, "fastervlm(cls=mean)@9", "zooprune@9"), HEADS, nested_tower=True),
    "internvl": Served(
        (*_FEATURES, "fastervlm@9", "fastervlm(cls=mean)@9", "visionzip(cls=mean, place=after)@12"), HEADS
    ),
    # vLLM reads numbers where transformers writes pairs
    "qianfan_ocr": Served(
        (*_FEATURES, "fastervlm@9", "fastervlm(cls=mean)@9", "visionzip(cls=mean, place=after)@12"),
        _WIDE,
        told={
            "vision_config": {"image_size": SIDE, "patch_size": PATCH_SIZE},
            "force_image_size": SIDE,
            "max_dynamic_patch": 3,
        },
        # transformers writes these names otherwise than it reads them
        places={"language_model.model.encoder.": "language_model.model."},
        pixels=vllm_tiles,
        picture="<IMG_CONTEXT>",
        target="<image>",
    ),
    "qwen2_vl": Served(
        _FEATURES + _OF_QWEN, HEADS | {"rope_parameters": _ROPE | {"mrope_section": [4, 6, 6]}}
    ),
    "qwen2_5_vl": Served(
        _FEATURES + _OF_QWEN, HEADS | {"rope_parameters": _ROPE | {"mrope_section": [4, 6, 6]}}
    ),
    "qwen3_vl": Served(
        _FEATURES + _OF_QWEN,
        _QWEN3,
        picture="<|image_pad|>",
        clip="<|video_pad|>",
    ),
    # released configs say that weights of experts add up to 1, which transformers takes for granted
    "qwen3_vl_moe": Served(
        _FEATURES + _OF_QWEN,
        _QWEN3 | {"norm_topk_prob": True, "shared_expert_intermediate_size": 0, "moe_intermediate_size": 64},
        inputs_first=True,
        picture="<|image_pad|>",
        clip="<|video_pad|>",
    ),
    "qwen3_5": Served(_FEATURES + _OF_QWEN, _QWEN3_5, picture="<|image_pad|>", clip="<|video_pad|>"),
    "qwen3_5_moe": Served(_FEATURES + _OF_QWEN, _QWEN3_5, picture="<|image_pad|>", clip="<|video_pad|>"),
    "qwen2_5_omni_thinker": Served(
        _FEATURES + _OF_QWEN,
        HEADS | {"rope_parameters": _ROPE | {"mrope_section": [4, 6, 6]}},
        picture="see </s><image><s>",
        clip="</s><video><s>",
        within=("Qwen2_5Omni", "thinker"),
        parts=_FLAT,
    ),
    "qwen3_omni_moe_thinker": Served(
        _FEATURES + _OF_QWEN,
        _QWEN3 | {"norm_topk_prob": True, "shared_expert_intermediate_size": 0, "moe_intermediate_size": 64},
        picture="see </s><image><s>",
        clip="</s><video><s>",
        within=("Qwen3OmniMoe", "thinker"),
        # a table of 12 x 12 places
        told={"vision_config": {"image_size": 12 * PATCH_SIZE, "apply_vit_abs_pos_embed": True}},
        parts=_FLAT,
    ),
    "cosmos3_omni": Served(
        _FEATURES + _OF_QWEN,
        _QWEN3,
        architecture="Cosmos3",
        inside="transformer",
        places={"model.language_model.": "", "model.visual.": ""},
        picture="<|image_pad|>",
        clip="<|video_pad|>",
    ),
    "gemma3": Served(_FEATURES + _OF_QWEN[:2], _WIDE, nested_tower=True, picture="[", asked=_PANNED),
    "gemma3n": Served((*_FEATURES, "divprune@9"), _WIDE, tied=True),
    "gemma4": Served(
        (*_FEATURES, "divprune@9"),
        # its processor makes a token of its own behind the vocabulary of bytes
        HEADS | {"head_dim": 32, "global_head_dim": 32, "vocab_size": 264},
        asked={"max_soft_tokens": 70},
        named={
            "": {"boi_token_id": BYTES.index("[") + 1, "eoi_token_id": BYTES.index("]") + 1},
            "vision_config": {"default_output_length": 70},
        },
        louder="model.embed_vision.embedding_projection.weight",
    ),
    "granite4_vision": Served((*_QUERIES[:4], "uniform@20"), HEADS, nested_tower=True, tower="siglip"),
    # released configs name widths of its layers, which transformers does not read
    "lfm2_vl": Served(
        _FEATURES + _OF_QWEN[:2],
        HEADS | {"conv_dim": 64, "block_dim": 64},
        nested_tower=True,
        tied=True,
        asked={"add_special_tokens": True},
    ),
    # a token is 56 pixels wide, so that pictures have few
    "minicpmv4_6": Served(
        ("dense", "divprune@0.25", "uniform@5", "pool@4", "divprune@3"), _QWEN3_5, picture="<|image_pad|>"
    ),
    "glm46v": Served(_FEATURES + _OF_QWEN[:2], _PLACED, wrapped=True),
    "glm4v": Served(_FEATURES + _OF_QWEN[:2], _PLACED, wrapped=True),
    "glm4v_moe": Served(_FEATURES + _OF_QWEN[:2], _PLACED, wrapped=True),
    "glm_ocr": Served(_FEATURES + _OF_QWEN[:2], _PLACED, wrapped=True),
    "paddleocr_vl": Served(_FEATURES + _OF_QWEN[:2], _PLACED, wrapped=True, single=True),
    "glmga": Served(_FEATURES + _OF_QWEN[:2], _PLACED, wrapped=True),
    "aria": Served(_QUERIES, HEADS, wrapped=True, asked={"max_image_size": 490}),
    "aya_vision": Served(_FEATURES + _OF_QWEN[:2], _WIDE, picture="<video>", wrapped=True),
    "cohere2_vision": Served(_FEATURES + _OF_QWEN[:2], _WIDE, wrapped=True),
    "deepseek_vl": Served(_FEATURES + _OF_QWEN[:2], _WIDE, wrapped=True),
    "fast_vlm": Served(_FEATURES + _OF_QWEN[:2], HEADS, wrapped=True),
    "got_ocr2": Served(
        (*_FEATURES, "divprune@9"),
        HEADS,
        picture="<imgpad>",
        wrapped=True,
        asked={"num_image_tokens": 36, "crop_to_patches": True, "max_patches": 3},
    ),
    # its processor makes tokens of its own behind the vocabulary of bytes
    "idefics3": Served(_FEATURES + _OF_QWEN[:2], _WIDE | {"vocab_size": 264}, wrapped=True),
    "janus": Served(_FEATURES + _OF_QWEN[:2], _WIDE, wrapped=True),
    "lighton_ocr": Served(_FEATURES + _OF_QWEN[:2], _WIDE, wrapped=True),
    "mistral3": Served(_FEATURES + _OF_QWEN[:2], _WIDE, wrapped=True),
    "ovis2": Served(_FEATURES + _OF_QWEN[:2], HEADS, wrapped=True),
    "perception_lm": Served(
        (*_FEATURES, "divprune@9"),
        _WIDE,
        tower="timm",
        wrapped=True,
        shapes=(*SHAPES[:-1], ((100, 100), (168, 168))),
    ),
    "smolvlm": Served(_FEATURES + _OF_QWEN[:2], _WIDE | {"vocab_size": 264}, wrapped=True),
    "exaone4_5": Served(_FEATURES + _OF_QWEN[:2], _WIDE, wrapped=True),
    "hyperclovax_vision_v2": Served(_FEATURES + _OF_QWEN[:2], _WIDE, wrapped=True),
    "video_llama_3": Served(_FEATURES + _OF_QWEN[:2], _WIDE, wrapped=True),
    "llava_next_video": Served((*_FEATURES, "fastervlm@9", "vispruner@12"), _WIDE, wrapped=True),
    "vipllava": Served((*_FEATURES, "fastervlm@9", "vispruner@12"), _WIDE, wrapped=True),
}


def model_of(family: str) -> Any:
    """The small model of a family in transformers."""
    import torch

    from vlmprune.testing import tiny_configs
    from vlmprune.testing.tiny import tiny_model

    with MonkeyPatch.context() as patch:
        if FAMILIES[family].single:
            patch.setattr(tiny_configs, "too_old", lambda *args: False)
        model = tiny_model(family, FAMILIES[family].tower, **FAMILIES[family].options)
    for part, fields in FAMILIES[family].named.items():
        (getattr(model.config, part) if part else model.config).update(fields)
    if FAMILIES[family].louder:
        with torch.no_grad():
            model.get_parameter(FAMILIES[family].louder).mul_(8)
    if FAMILIES[family].tied:
        table = model.get_input_embeddings().weight
        with torch.no_grad():
            # small, or the last word would say the next one whatever the picture is
            model.lm_head.weight.copy_(table.mul_(0.03))
    return model


def save(family: str, folder: Path) -> None:
    """A model of a family, and its processor, as vLLM loads them."""
    from safetensors.torch import load_file, save_file

    served = FAMILIES[family]
    model_of(family).save_pretrained(folder)
    processor_of(family).save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    if served.nested_tower:
        plain, full = "vision_tower.", "vision_tower.vision_model."
        weights = {name if full in name else name.replace(plain, full): one for name, one in weights.items()}
    if served.inputs_first:
        weights = {
            name: one.transpose(1, 2).contiguous() if ".experts." in name else one
            for name, one in weights.items()
        }
    if served.tied:
        del weights["lm_head.weight"]
    for old, new in served.places.items():
        weights = {
            new + name.removeprefix(old) if name.startswith(old) else name: one
            for name, one in weights.items()
        }
    tell(served, folder)
    if served.within is not None:
        _, part = served.within
        weights = {f"{part}.{name}": one for name, one in weights.items()}
    file.unlink()
    (folder / served.inside).mkdir(exist_ok=True)
    save_file(weights, folder / served.inside / file.name, metadata={"format": "pt"})


def tell(served: Served, folder: Path) -> None:
    """Put into the config of a folder what vLLM reads of it."""
    import transformers

    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for name, value in served.told.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    start = served.architecture
    if served.within is not None:
        start, part = served.within
        whole = getattr(transformers, f"{start}Config")(**{f"{part}_config": config})
        config = whole.to_dict()
    if start is not None:
        config["architectures"] = [f"{start}ForConditionalGeneration"]
    file.write_text(json.dumps(config), encoding="utf-8")


def processor_of(family: str) -> Any:
    """A processor that fits the small model of a family."""
    from vlmprune.testing.tiny import tiny_processor

    processor = PROCESSORS[family]() if family in PROCESSORS else tiny_processor(family)
    if family.startswith(("qwen", "cosmos")):
        # vLLM normalises pixels of both in the tower, with the numbers of images
        for name in ("size", "patch_size", "image_mean", "image_std"):
            setattr(processor.video_processor, name, getattr(processor.image_processor, name))
    return processor


class TinyTwin:
    """The model in transformers, and the processor as vLLM loads it: resizing differs between its forms."""

    def __init__(self, family: str, folder: Path) -> None:
        from transformers import AutoProcessor

        self.model = model_of(family)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.served = FAMILIES[family]
        self.never = {token: -100.0 for token in self.model.generation_config.suppress_tokens}

    def prompt(
        self, sizes: tuple[tuple[int, int], ...], seed: int = 0, **options: Any
    ) -> tuple[dict[str, Any], dict]:
        """(request without a spec, inputs of transformers): random pictures with words between them.

        Args:
            options: of the processor of transformers.
        """
        import numpy as np
        from PIL import Image

        draw = np.random.default_rng(seed)
        images = [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        text = " and ".join([self.served.picture] * len(images)) + "\nwhat is it ? tell me"
        inputs = self.processor(images=images, text=text, return_tensors="pt", **self.served.asked, **options)
        if self.served.pixels is not None:
            inputs["pixel_values"] = self.served.pixels(images)
        asked = text.replace(self.served.picture, self.served.target or self.served.picture)
        return self.request(asked, {"image": images}), dict(inputs)

    def clip(self, frames: int, side: tuple[int, int]) -> tuple[dict[str, Any], dict]:
        """The same with a random clip."""
        import numpy as np
        from transformers.video_utils import VideoMetadata

        array = np.random.default_rng(frames).integers(0, 256, (frames, *side, 3), dtype=np.uint8)
        told = {"total_num_frames": frames, "fps": 24.0, "duration": frames / 24}
        told |= {"frames_indices": list(range(frames)), "video_backend": "opencv"}
        text = f"look {self.served.clip} what is it ? tell me"
        inputs = self.processor(
            videos=[array],
            video_metadata=[VideoMetadata(**told)],
            text=text,
            do_sample_frames=False,
            return_tensors="pt",
        )
        video = (array, told | {"do_sample_frames": False})
        return self.request(text, {"video": [video]}), dict(inputs)

    def request(self, text: str, data: dict[str, list]) -> dict[str, Any]:
        """A prompt with one placeholder per picture, for vLLM to fill in."""
        return {"prompt_token_ids": self.processor.tokenizer(text)["input_ids"], "multi_modal_data": data}

    def answer(self, inputs: dict, spec: str) -> list[int]:
        import vlmprune
        from vlmprune.models import adapter_class

        adapter = None
        if self.served.single or self.served.parts:
            adapter = type("ByHand", (adapter_class(self.model.config.model_type),), self.served.parts)
        with vlmprune.prune(self.model, spec, adapter=adapter):
            out = self.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def jobs(self, specs: tuple[str, ...], each: int, seed: int = 0) -> list[tuple[dict, list[int]]]:
        """(request, answer of transformers), shuffled: every spec with ``each`` of the shapes of prompts."""
        made = [self.prompt(sizes, seed + number) for number, sizes in enumerate(self.served.shapes)]
        jobs = []
        for number, spec in enumerate(specs):
            for at in range(each):
                request, inputs = made[(number + at) % len(made)]
                options = {"mm_processor_kwargs": {"vlmprune": spec}}
                jobs.append(({**request, **options}, self.answer(inputs, spec)))
        random.Random(seed).shuffle(jobs)
        return jobs
