# SPDX-License-Identifier: Apache-2.0
"""Pictures between whose tokens text stands in a prompt: merged rows stand where their tokens stood."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from served_processors import PROCESSORS
from torch import Tensor

import vlmprune
from vlmprune.hooks.slots.before_lm import Choice, to_slots
from vlmprune.hooks.vision.pictures import Picture
from vlmprune.models import adapter_for
from vlmprune.testing.families.shared import BYTES, IMAGE_ID, MERGE, PATCH_SIZE
from vlmprune.testing.processors import PROCESSED
from vlmprune.testing.reference import entered
from vlmprune.testing.tiny import tiny_bundle, tiny_inputs, tiny_model

SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))


FAMILIES = [
    pytest.param(name, marks=() if name in ("mistral3", "llava_next") else pytest.mark.slow)
    for name in sorted({*PROCESSED, *PROCESSORS})
]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_real_processors_put_between_tokens_is_declared(family: str) -> None:
    if family in PROCESSORS:
        pytest.importorskip("torchvision")
        processor = PROCESSORS[family]()
        model: Any = tiny_model(family, vocab_size=len(processor.tokenizer))
    else:
        model, processor = tiny_bundle(family)
    adapter = adapter_for(model)
    ids = vlmprune.encode(model, processor, SMALL, "what?")["input_ids"][0]
    columns = (ids == adapter.token_id(adapter.modalities[0])).nonzero()[:, 0].tolist()
    runs = 1 + sum(after - before > 1 for before, after in pairwise(columns))
    # tiles that are pictures of their own stand apart
    assert (runs > adapter.parts(processor, SMALL)) == ("image" in adapter.parted)


def in_lines(lines: int, cols: int) -> tuple[dict[str, Tensor], Tensor]:
    """A prompt with a picture of so many lines, a mark behind each, and the columns (N,) of its tokens."""
    token = MERGE * PATCH_SIZE
    inputs = tiny_inputs("mistral3", images=(1,), size=(lines * token, cols * token))
    ids = inputs["input_ids"][0]
    first = int((ids == IMAGE_ID).nonzero()[0])
    line = [IMAGE_ID] * cols + [BYTES.index("|") + 1]
    made = torch.cat([ids[:first], torch.tensor(line * lines), ids[first + lines * cols :]])[None]
    columns = (made[0] == IMAGE_ID).nonzero()[:, 0]
    assert len(columns) == lines * cols
    return {**inputs, "input_ids": made, "attention_mask": torch.ones_like(made)}, columns


def test_merged_rows_of_mistral3_stand_between_the_marks_of_their_lines() -> None:
    model, (inputs, columns) = tiny_model("mistral3"), in_lines(5, 7)
    model.set_attn_implementation("eager")
    with vlmprune.prune(model, "dense"):
        dense = entered(model, inputs)[0]  # (L, D)
    with vlmprune.prune(model, "visionzip(cls='mean')@7", positions="compact") as run:
        rows = entered(model, inputs)[0]
    kept = columns[run.last.keep[0].keep_idx]
    text = [column for column in range(len(dense)) if column not in columns.tolist()]
    read = sorted([*text, *kept.tolist()])
    assert len(rows) == len(read) and len(kept) == 7
    own = [column for row, column in zip(rows, read, strict=True) if torch.equal(row, dense[column])]
    assert set(text) <= set(own)
    others = [row for row, column in zip(rows, read, strict=True) if column not in own]
    # one row is merged of others, and none is that of a token that stood elsewhere
    assert 0 < len(others) < 7
    assert not any(torch.equal(row, one) for row in others for one in dense)


@pytest.mark.parametrize("parted", [False, True])
def test_rows_have_the_order_of_the_method_where_nothing_stands_between(parted: bool) -> None:
    picture = Picture(torch.randn(6, 4), ((2, 3),), parted=parted)
    cut = to_slots(picture, [Choice(None, torch.tensor([4, 1]), torch.randn(2, 4))])
    assert cut.row_slots.tolist() == ([4, 1] if parted else [1, 4])
    # and so they have where the model itself put a mark
    marked = Picture(torch.randn(6, 4), ((2, 2),), special=torch.tensor([0, 0, 1, 0, 0, 1]).bool())
    cut = to_slots(marked, [Choice(None, torch.tensor([3, 1]), torch.randn(2, 4))])
    assert cut.row_slots.tolist() == [4, 1]


def test_frames_with_their_times_between_them_are_declared() -> None:
    parted = {name: adapter_for(tiny_model(name)).parted for name in ("video_llama_3", "lfm3_vl", "qwen2_vl")}
    assert parted == {"video_llama_3": ("video",), "lfm3_vl": ("video",), "qwen2_vl": ()}
