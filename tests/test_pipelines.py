# SPDX-License-Identifier: Apache-2.0
"""Pipelines of transformers under ``prune``: what docs/pipelines.md says, and that nothing else changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import pipeline

import vlmprune
from vlmprune.errors import UnsupportedError

PAGE = Path(__file__).parents[1] / "docs" / "pipelines.md"


@pytest.fixture(scope="module")
def pipe():
    model, processor = vlmprune.load("tiny")
    return pipeline("image-text-to-text", model=model, processor=processor)


def conversation(family="text", number=0):
    picture, question, _ = vlmprune.example(family, number)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def said(pipe, *chats, **options):
    given = list(chats) if len(chats) > 1 else chats[0]
    found = pipe(text=given, max_new_tokens=8, return_full_text=False, **options)
    return [(one[0] if isinstance(one, list) else one)["generated_text"].strip() for one in found]


def by_hand(pipe, spec, family, number):
    """The answer of ``generate`` under a spec."""
    picture, question, _ = vlmprune.example(family, number)
    inputs = vlmprune.encode(pipe.model, pipe.processor, picture, question)
    with vlmprune.prune(pipe.model, spec):
        ids = pipe.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_blocks_of_the_page_run_and_print_what_they_say(capsys):
    names = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    answer, report = capsys.readouterr().out.strip().splitlines()
    assert answer.strip() == "x k l" and "# x k l\n" in blocks[0]
    assert report.startswith("fastervlm@36: 36 of 144 visual tokens in 1 image, ")
    assert names["handle"].last.realised_tokens == [36] and not names["handle"].attached


@pytest.mark.parametrize("spec", ["random@9", "fastv(layer=2)@18", "visionzip@18"])
def test_a_pipeline_answers_what_generate_answers(pipe, spec):
    with vlmprune.prune(pipe.model, spec) as run:
        found = said(pipe, conversation())
    assert found == [by_hand(pipe, spec, "text", 0)] and run.last.pruned


def test_outside_of_the_block_the_pipeline_is_what_it_was(pipe):
    before = said(pipe, conversation())
    with vlmprune.prune(pipe.model, "random@1"):
        inside = said(pipe, conversation())
    assert said(pipe, conversation()) == before != inside


def test_a_pipeline_in_place_of_its_model_is_told_of_the_model_in_it(pipe):
    with pytest.raises(
        UnsupportedError, match=r"got ImageTextToTextPipeline; give the model in it, its \.model"
    ):
        vlmprune.prune(pipe, "fastervlm@18")
    with pytest.raises(UnsupportedError, match="got str; load it first with from_pretrained"):
        vlmprune.prune("a/model", "fastervlm@18")


def test_every_picture_of_a_batch_keeps_its_own_tokens(pipe):
    chats = [conversation("text", 0), conversation("attribute", 1), conversation("count", 2)]
    with vlmprune.prune(pipe.model, "fastervlm@18") as run:
        found = said(pipe, *chats, batch_size=3)
    assert run.last.realised_tokens == [18] * 3
    alone = [by_hand(pipe, "fastervlm@18", *of) for of in (("text", 0), ("attribute", 1), ("count", 2))]
    assert found == alone
