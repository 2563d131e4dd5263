# SPDX-License-Identifier: Apache-2.0
"""benchmarks/hops.py: how many functions and files one forward goes through; the path must not grow."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

from vlmprune.testing.tiny import tiny_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import hops

ROOT = Path(__file__).parents[1]
takes_encoded = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
pytestmark = pytest.mark.skipif(not takes_encoded, reason="generate of this transformers takes another path")

# functions and files of encoding and of a prefill: lower them when the path gets shorter
FASTERVLM, FASTV, VAR = hops.METHODS
MOST = {
    (FASTERVLM, "encode"): (40, 9),
    (FASTERVLM, "prefill"): (94, 24),
    (FASTV, "encode"): (26, 5),
    (FASTV, "prefill"): (146, 28),
    (VAR, "encode"): (26, 5),
    (VAR, "prefill"): (82, 17),
}


@cache
def counted(spec: str) -> dict[str, hops.Part]:
    return hops.count(spec, tiny_model("llava"))


@pytest.mark.parametrize(("spec", "part"), MOST)
def test_the_path_of_a_forward_does_not_grow(spec: str, part: str) -> None:
    found, (functions, files) = counted(spec)[part], MOST[spec, part]
    assert len(found.functions) <= functions, [hops.name_of(code) for code in found.functions]
    assert len(found.files) <= files, found.files


def test_parts_are_told_apart_and_calls_are_counted() -> None:
    names = {
        part: {code.co_name: calls for code, calls in found.calls.items()}
        for part, found in counted(FASTERVLM).items()
    }
    assert names["encode"]["pictures"] == 1 and "pictures" not in names["prefill"]
    assert names["prefill"]["score"] == 1 and "score" not in names["decode"]
    assert names["attach"]["prune"] == names["detach"]["detach"] == 1
    assert "<listcomp>" not in {code.co_name for code in counted(FASTERVLM)["prefill"].functions}


def test_the_files_of_a_forward_are_those_of_the_architecture_page() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("### The files that it goes through") : text.index("## One forward of `fastv(")]
    told = re.findall(r"`((?:core|hooks|kernels|methods|models)/[\w/]+\.py)`", table)
    parts = counted(FASTERVLM)
    assert sorted(told) == sorted({*parts["encode"].files, *parts["prefill"].files})


def test_numbers_and_names_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert hops.main([FASTERVLM]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^fastervlm@9 prefill: \d+ functions in \d+ files", out, re.MULTILINE)
    assert re.search(r"^ +1  methods/fastervlm\.py:\d+  .*score$", out, re.MULTILINE)
