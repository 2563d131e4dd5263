# SPDX-License-Identifier: Apache-2.0
"""What the report of a call says."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch

import vlmprune
from vlmprune.testing.conformance import generate, shared_model
from vlmprune.testing.tiny import tiny_inputs, tiny_model


def test_the_report_says_what_happened() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1, 0, 2))
    with vlmprune.prune(model, "fastervlm@9") as run:
        assert run.last is None
        generate(model, inputs, max_new_tokens=4)
    report = run.last
    longest = max(inputs["attention_mask"].sum(1) - torch.tensor([27, 0, 54]))
    assert (report.method, report.note, report.pruned, report.decode_steps) == ("fastervlm@9", "", True, 3)
    assert (report.dense_tokens, report.realised_tokens, report.tokens_per_layer) == (
        [36] * 3,
        [9] * 3,
        [9.0] * 4,
    )
    assert report.sequence == (inputs["input_ids"].shape[1], int(longest))
    assert report.firings == {"encode": 1, "enter": 1, "exit": 1} and 0 < report.seconds < 5
    maps = [(one.index, one.frame, one.total, one.grids, one.method) for one in report.keep]
    assert maps == [(i, None, 36, ((6, 6),), "fastervlm@9") for i in range(3)]
    assert str(report).startswith("fastervlm@9: 27 of 108 visual tokens in 3 images, ")


def test_decode_steps_belong_to_the_prompt_before_them() -> None:
    model = shared_model("llava", None, None)
    with vlmprune.prune(model, "fastervlm@9") as run:
        generate(model, tiny_inputs(images=(1,)), max_new_tokens=4)
        first = run.last
        generate(model, tiny_inputs(images=(0,)), max_new_tokens=3)
    assert first.decode_steps == 3 and run.last.decode_steps == 2 and run.last is not first
    assert str(run.last).endswith("(no images in this call)") and "0 images" in str(run.last)


@pytest.mark.parametrize("spec", ["fastervlm@9", "pool@9", "prumerge@9", "tome@9/crop", "fastv@9"])
@torch.no_grad()
def test_a_report_can_be_pickled_and_copied(spec: str) -> None:
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1, 2))
    with vlmprune.prune(model, spec) as run:
        model(**inputs)
    report = run.last
    for other in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert str(other) == str(report) and other != report
        for one, same in zip(report.keep, other.keep, strict=True):
            assert torch.equal(one.keep_idx, same.keep_idx)
            assert (one.joins is None) == (same.joins is None)
            assert one.joins is None or torch.equal(one.joins, same.joins)


def test_decode_steps_are_those_of_the_thread_that_read_the_prompt() -> None:
    model, inputs, steps = tiny_model("llava"), tiny_inputs(images=(1,)), []

    def answer(run: Any, count: int) -> None:
        model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=2**20)
        steps.append((count, run.local.report.decode_steps))

    with vlmprune.prune(model, "divprune@9") as run:
        threads = [threading.Thread(target=answer, args=(run, count)) for count in (3, 9, 15, 21)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(steps) == [(count, count - 1) for count in (3, 9, 15, 21)]


@torch.no_grad()
def test_a_turn_in_another_thread_belongs_to_the_prompt() -> None:
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    with vlmprune.prune(model, "divprune@9") as run:
        cache = model(**inputs, use_cache=True).past_key_values
        report, words = run.last, {"input_ids": torch.tensor([[7]]), "past_key_values": cache}
        thread = threading.Thread(target=model, kwargs=words)
        thread.start()
        thread.join()
        assert run.last is report and report.decode_steps == 1
