# SPDX-License-Identifier: Apache-2.0
"""Real HF processors, built offline, that fit the tiny models of ``vlmprune.testing.tiny``.

The tokenizer knows one id per byte, so it encodes any text; image processors are the ones that need Pillow
only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.utils import is_torchvision_available

from ..errors import UnsupportedError, did_you_mean

IMAGE_SIZE, PATCH_SIZE, GRID = 84, 14, 6  # pixels of a crop, of a patch; patches along each side of a crop
PINPOINTS = {
    "llava_next_video": [[84, 168], [168, 84], [168, 168], [252, 84], [84, 252]],
    "llava_next": [[84, 168], [168, 84], [168, 168], [252, 84], [84, 252]],
    # every grid of tiles, as in the released models; 4 x 4 exceeds anyres_max_9, so the model scales its
    # features down
    "llava_onevision": [[84 * rows, 84 * cols] for rows in range(1, 5) for cols in range(1, 5)],
}

# <pad> is 0, the 256 bytes follow, and the other special ids close the vocabulary
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = ["<pad>", *BYTES, "<s>", "</s>", "<image>", "<video>"]
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, VIDEO_ID = (
    VOCABULARY.index(token) for token in ("<pad>", "<s>", "</s>", "<image>", "<video>")
)
SPECIAL_IDS = (PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, VIDEO_ID)

FAMILY_PREFIX = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
    "vipllava": "VipLlava",
    "llava_next_video": "LlavaNextVideo",
    "video_llava": "VideoLlava",
    "internvl": "InternVL",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "fast_vlm": "FastVlm",
    "paligemma": "PaliGemma",
    "gemma3": "Gemma3",
}
_TOWERS = ("clip", "siglip")
# families that have one tower, of their own
OWN_TOWER = {"internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "fast_vlm"}

# line breaks inside expressions: jinja as transformers sets it up swallows one after a block
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] in ('image', 'video') %}{{ '<' + "
    "part['type'] + '>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def family_prefix(family: str) -> str:
    """Prefix of the transformers class names of a family: ``"llava_next"`` gives ``"LlavaNext"``."""
    return FAMILY_PREFIX[known("family", family, tuple(FAMILY_PREFIX))]


def tower_of(family: str, tower: str | None) -> str:
    """Check a vision tower, or give the one that the released models of the family have."""
    if family in OWN_TOWER:
        return known("tower", tower or "own", ("own",))
    if family in ("paligemma", "gemma3"):
        return known("tower", tower or "siglip", ("siglip",))
    tower = known("tower", tower or ("siglip" if family == "llava_onevision" else "clip"), _TOWERS)
    if family in ("vipllava", "video_llava") and tower != "clip":
        raise UnsupportedError(
            f"{family} with a {tower} tower: it drops a [CLS] token, which only clip has; use tower='clip'"
        )
    return tower


def tiny_tokenizer(**names: str) -> transformers.PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges that starts every text with ``<s>`` and pads on the left.

    ``names`` gives special tokens the attributes that a processor reads, such as ``image_token="<image>"``.
    """
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([VOCABULARY[i] for i in SPECIAL_IDS])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **({"extra_special_tokens": names} if names else {}),
    )


def tiny_processor(family: str = "llava", tower: str | None = None) -> Any:
    """The HF processor of a family, sized for ``tiny_model(family, tower)``.

    Without torchvision transformers has no video processors: families with clips then take pictures and text
    only (and cannot be saved); ``tiny_inputs(family, video=True)`` builds the tensors of clips by hand.
    """
    prefix, tower = family_prefix(family), tower_of(family, tower)
    if family not in _PROCESSORS:
        raise UnsupportedError(
            f"no tiny processor of {family}; build tensors with tiny_inputs, or use one of {[*_PROCESSORS]}"
        )
    arguments = _PROCESSORS[family](prefix, tower)
    kind = getattr(transformers, _PROCESSOR_OF.get(family, prefix) + "Processor")
    return _build(kind, prefix, {"chat_template": _TEMPLATE, "tokenizer": tiny_tokenizer(), **arguments})


_SQUARE, _EDGE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, {"shortest_edge": IMAGE_SIZE}
_PROCESSOR_OF = {"vipllava": "Llava"}


def _llava(prefix: str, tower: str) -> dict[str, Any]:
    clip = tower == "clip"
    if prefix.startswith("LlavaNext"):
        images = _image_processor(
            "LlavaNext", size=_EDGE, crop_size=_SQUARE, image_grid_pinpoints=PINPOINTS["llava_next"]
        )
    elif prefix == "VideoLlava":
        images = _image_processor(prefix, size=_EDGE, crop_size=_SQUARE)
    else:
        images = (
            _image_processor("CLIP", size=_EDGE, crop_size=_SQUARE)
            if clip
            else _image_processor("Siglip", size=_SQUARE)
        )
    return {
        "image_processor": images,
        "patch_size": PATCH_SIZE,
        "num_additional_image_tokens": int(clip),
        "vision_feature_select_strategy": "default" if clip else "full",
    }


def _onevision(prefix: str, tower: str) -> dict[str, Any]:
    return {
        "image_processor": _image_processor(
            prefix, size=_SQUARE, image_grid_pinpoints=PINPOINTS["llava_onevision"]
        ),
        "num_image_tokens": GRID * GRID + (tower == "clip"),
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }


def _internvl(prefix: str, tower: str) -> dict[str, Any]:
    side = {"height": 2 * IMAGE_SIZE, "width": 2 * IMAGE_SIZE}
    images = _image_processor("GotOcr2", size=side, crop_to_patches=True, min_patches=1, max_patches=3)
    tokens = {
        "start_image_token": "<s>",
        "end_image_token": "</s>",
        "context_image_token": "<image>",
        "video_token": "<video>",
    }
    return {"image_processor": images, "image_seq_length": GRID * GRID, "tokenizer": tiny_tokenizer(**tokens)}


def _qwen(prefix: str, tower: str) -> dict[str, Any]:
    area = (2 * IMAGE_SIZE) ** 2  # of pixels: pictures of all shapes give about GRID x GRID tokens
    images = _image_processor(
        "Qwen2VL",
        size={"shortest_edge": area // 2, "longest_edge": area + area // 9},
        patch_size=PATCH_SIZE,
        merge_size=2,
    )
    tokens = {
        "image_token": "<image>",
        "video_token": "<video>",
        "vision_start_token": "<s>",
        "vision_end_token": "</s>",
    }
    return {"image_processor": images, "tokenizer": tiny_tokenizer(**tokens)}


_PROCESSORS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "llava": _llava,
    "vipllava": _llava,
    "llava_next": _llava,
    "llava_next_video": _llava,
    "video_llava": _llava,
    "llava_onevision": _onevision,
    "internvl": _internvl,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
}


PROCESSED = tuple(_PROCESSORS)  # families that have a tiny processor


def _image_processor(prefix: str, **sizes: Any) -> Any:
    # where a class named ...Pil exists, the plain name needs torchvision; elsewhere the plain name is the
    # Pillow one
    name = prefix + "ImageProcessor"
    return (getattr(transformers, name + "Pil", None) or getattr(transformers, name))(**sizes)


def _build(kind: Any, prefix: str, arguments: dict[str, Any]) -> Any:
    """A processor; one for pictures and text only where it would need a video processor and torchvision is
    missing.
    """
    if "video_processor" not in inspect.signature(kind.__init__).parameters:
        return kind(**arguments)
    if is_torchvision_available():
        size = {} if prefix.startswith("Qwen") else {"size": _SQUARE}
        name = {"Qwen2_5_VL": "Qwen2VL"}.get(prefix, prefix) + "VideoProcessor"
        return kind(video_processor=getattr(transformers, name)(**size), **arguments)

    class PicturesOnly(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    return PicturesOnly(video_processor=None, **arguments)


def known(what: str, name: str, names: tuple[str, ...]) -> str:
    """Return a name that has a tiny model, or raise naming those that have."""
    if name not in names:
        raise UnsupportedError(
            f"no tiny model of {what} {name!r}; expected one of {list(names)}.{did_you_mean(name, names)}"
        )
    return name
