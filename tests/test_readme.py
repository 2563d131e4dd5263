# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the README runs, and what it promises is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from page_blocks import blocks_of, stand_in

from vlmprune.registry import list_methods, unregister

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = blocks_of(README)


@pytest.fixture(autouse=True)
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_the_readme_runs(block: str) -> None:
    before = set(list_methods())
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, str(README), "exec"), names)
    for added in set(list_methods()) - before:
        unregister(added)
    if "run" in names:
        assert names["run"].last.pruned, "the block prunes nothing"


def printed(block: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], list[str]]:
    """What a block defines, and the lines that it prints."""
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, str(README), "exec"), names)
    return names, capsys.readouterr().out.splitlines()


def test_the_first_block_loads_as_transformers_does_and_prints_an_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    block = BLOCKS[0]
    assert "AutoModelForImageTextToText.from_pretrained" in block and "AutoProcessor.from_pretrained" in block
    names, lines = printed(block, capsys)
    said, counted = lines
    assert names["answer"].shape[0] >= 1
    assert said == names["processor"].decode(names["answer"], skip_special_tokens=True)
    # the tiny model stands in for LLaVA-1.5, whose tower has 24 x 24 patches
    assert counted.startswith("fastervlm@64: 64 of 144 visual tokens in 1 image, ")
    assert "# fastervlm@64: 64 of 576 visual tokens in 1 image, ..." in block


def test_the_offline_block_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    block = BLOCKS[1]
    names, (said, counted) = printed(block, capsys)
    assert said == "x k l" and f"# {said}\n" in block
    assert counted.startswith("fastervlm@36: 36 of 144 visual tokens in 1 image, ")
    assert f"# {counted.partition('image, ')[0]}image, " in block
    example = next(line for line in block.splitlines() if "example()" in line)
    assert f'"{names["question"]}", "{names["answer"]}"' in example
    assert said.replace(" ", "") == names["answer"]


def test_the_readme_has_its_blocks_and_files() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(BLOCKS) >= 4
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (README.parent / target).exists(), f"the README links to {target}, which is not there"


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "readme_tables", README.parent / "docs" / "readme_tables.py"
    )
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_table_of_methods_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert tables().filled(text) == text, "run python docs/readme_tables.py"


def test_every_method_has_a_card_and_is_in_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert tables().without_card() == []
    assert [name for name in list_methods() if f"| `{name}" not in text] == []
