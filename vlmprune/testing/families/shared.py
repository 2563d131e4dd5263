# SPDX-License-Identifier: Apache-2.0
"""What all tiny models share: sizes, ids of a vocabulary of bytes, and its tokenizer."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from ...errors import UnsupportedError, did_you_mean

IMAGE_SIZE, PATCH_SIZE, GRID = 84, 14, 6  # pixels of a crop, of a patch; patches along each side of a crop
MERGE = 2  # patches along each side of a token, where a family merges them
SQUARE, EDGE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, {"shortest_edge": IMAGE_SIZE}

# <pad> is 0, the 256 bytes follow, and the other special ids close the vocabulary
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = ["<pad>", *BYTES, "<s>", "</s>", "<image>", "<video>"]
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, VIDEO_ID = (
    VOCABULARY.index(token) for token in ("<pad>", "<s>", "</s>", "<image>", "<video>")
)
SPECIAL_IDS = (PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, VIDEO_ID)


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


def image_processor(prefix: str, **sizes: Any) -> Any:
    """An image processor of transformers that needs Pillow only."""
    # where a class named ...Pil exists, the plain name needs torchvision; elsewhere the plain name is the
    # Pillow one
    name = prefix + "ImageProcessor"
    return (getattr(transformers, name + "Pil", None) or getattr(transformers, name))(**sizes)


def known(what: str, name: str, names: tuple[str, ...]) -> str:
    """Return a name that has a tiny model, or raise naming those that have."""
    if name not in names:
        raise UnsupportedError(
            f"no tiny model of {what} {name!r}; expected one of {list(names)}.{did_you_mean(name, names)}"
        )
    return name
