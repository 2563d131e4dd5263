# SPDX-License-Identifier: Apache-2.0
"""Real HF processors, built offline, that fit the tiny models of ``vlmprune.testing.tiny``.

The tokenizer knows one id per byte, so it encodes any text; image processors are the ones that need Pillow only.
"""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.utils import is_torchvision_available

from ..errors import UnsupportedError, did_you_mean

IMAGE_SIZE, PATCH_SIZE, GRID = 84, 14, 6  # pixels of a crop, of a patch; patches along each side of a crop
PINPOINTS = {
    "llava_next": [[84, 168], [168, 84], [168, 168], [252, 84], [84, 252]],
    # every grid of tiles, as in the released models; 4 x 4 exceeds anyres_max_9, so the model scales its features down
    "llava_onevision": [[84 * rows, 84 * cols] for rows in range(1, 5) for cols in range(1, 5)],
}

# <pad> is 0, the 256 bytes follow, and the other special ids close the vocabulary
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = ["<pad>", *BYTES, "<s>", "</s>", "<image>", "<video>"]
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, VIDEO_ID = (VOCABULARY.index(token) for token in ("<pad>", "<s>", "</s>", "<image>", "<video>"))
SPECIAL_IDS = (PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, VIDEO_ID)

FAMILY_PREFIX = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision", "vipllava": "VipLlava"}
_TOWERS = ("clip", "siglip")

# line breaks inside expressions: jinja as transformers sets it up swallows one after a block
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] in ('image', 'video') %}{{ '<' + part['type'] + '>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def family_prefix(family: str) -> str:
    """Prefix of the transformers class names of a family: ``"llava_next"`` gives ``"LlavaNext"``."""
    return FAMILY_PREFIX[known("family", family, tuple(FAMILY_PREFIX))]


def tower_of(family: str, tower: str | None) -> str:
    """Check a vision tower, or give the one that the released models of the family have."""
    tower = known("tower", tower or ("siglip" if family == "llava_onevision" else "clip"), _TOWERS)
    if family == "vipllava" and tower != "clip":
        raise UnsupportedError(f"vipllava with a {tower} tower: it drops a [CLS] token, which only clip has; use tower='clip'")
    return tower


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges that starts every text with ``<s>`` and pads on the left."""
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([VOCABULARY[i] for i in SPECIAL_IDS])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        model_max_length=8192, clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )


def tiny_processor(family: str = "llava", tower: str | None = None) -> Any:
    """The HF processor of a family, sized for ``tiny_model(family, tower)``.

    Without torchvision transformers has no video processor: llava_onevision then takes pictures and text only (and cannot be
    saved); ``tiny_inputs("llava_onevision", video=True)`` builds the video tensors by hand.
    """
    prefix, tower = family_prefix(family), tower_of(family, tower)
    strategy, cls_tokens = ("default", 1) if tower == "clip" else ("full", 0)
    common: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "chat_template": _TEMPLATE}
    common["vision_feature_select_strategy"] = strategy
    square, edge = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, {"shortest_edge": IMAGE_SIZE}
    if family == "llava_onevision":
        images = _image_processor(prefix, size=square, image_grid_pinpoints=PINPOINTS[family])
        common |= {"num_image_tokens": GRID * GRID + cls_tokens, "vision_aspect_ratio": "anyres_max_9"}
        return _onevision(image_processor=images, **common)
    if family == "llava_next":
        images = _image_processor(prefix, size=edge, crop_size=square, image_grid_pinpoints=PINPOINTS[family])
    elif tower == "clip":
        images = _image_processor("CLIP", size=edge, crop_size=square)
    else:
        images = _image_processor("Siglip", size=square)
    kind = getattr(transformers, ("Llava" if family == "vipllava" else prefix) + "Processor")
    return kind(image_processor=images, patch_size=PATCH_SIZE, num_additional_image_tokens=cls_tokens, **common)


def _image_processor(prefix: str, **sizes: Any) -> Any:
    # where a class named ...Pil exists, the plain name needs torchvision; elsewhere the plain name is the Pillow one
    name = prefix + "ImageProcessor"
    return (getattr(transformers, name + "Pil", None) or getattr(transformers, name))(**sizes)


def _onevision(**arguments: Any) -> Any:
    if is_torchvision_available():
        video = transformers.LlavaOnevisionVideoProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        return transformers.LlavaOnevisionProcessor(video_processor=video, **arguments)

    class PicturesOnly(transformers.LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    return PicturesOnly(video_processor=None, **arguments)


def known(what: str, name: str, names: tuple[str, ...]) -> str:
    """Return a name that has a tiny model, or raise naming those that have."""
    if name not in names:
        raise UnsupportedError(f"no tiny model of {what} {name!r}; expected one of {list(names)}.{did_you_mean(name, names)}")
    return name
