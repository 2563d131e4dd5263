# SPDX-License-Identifier: Apache-2.0
"""The trained model in the package: files, hashes, answers, and what a damaged file does."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import transformers

from vlmprune.errors import VlmPruneError
from vlmprune.evaluation.tasks.shapes import shapes
from vlmprune.models.tiny import FOLDER, SUMS, load_tiny, verify

MiB = 1024 * 1024


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "tiny")


def test_every_file_is_in_the_list():
    assert set(verify()) == {path.name for path in FOLDER.iterdir()} - {SUMS}
    assert {"model.safetensors", "config.json", "card.md", "provenance.json"} <= set(verify())


def test_it_is_a_plain_llava_of_at_most_12_mib(tiny):
    model, processor = tiny
    assert type(model) is transformers.LlavaForConditionalGeneration and isinstance(
        processor, transformers.LlavaProcessor
    )
    assert sum(weight.numel() * weight.element_size() for weight in model.parameters()) <= 12 * MiB
    assert model.dtype == torch.float32 and not model.training


def test_a_plain_from_pretrained_reads_the_same(tiny):
    plain, info = transformers.AutoModelForImageTextToText.from_pretrained(FOLDER, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert plain.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(tiny[0].parameters(), plain.parameters(), strict=True))


@torch.no_grad()
def test_it_sees_and_answers(tiny):
    model, processor = tiny
    task, scores = shapes(), []
    for sample in task.samples("dev", 60):
        text = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
        inputs = processor(images=sample.load_images(), text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        scores.append(task.score(sample, processor.decode(ids, skip_special_tokens=True)))
    blind = np.mean(list(task.blind.values()))
    assert np.mean(scores) > blind + 0.3, "retrained models differ by a few points; this one lost its eyes"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_named(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(VlmPruneError, match=rf"{name} is damaged.*install the package again"):
        load_tiny(folder=copy)


@pytest.mark.parametrize("name", ["model.safetensors", SUMS])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(VlmPruneError, match=f"lacks.*{name}"):
        load_tiny(folder=copy)
