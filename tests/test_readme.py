# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the README runs, and what it promises is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vlmprune.registry import list_methods, unregister

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:40] for block in BLOCKS])
def test_a_block_of_the_readme_runs(block: str) -> None:
    before = set(list_methods())
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block, str(README), "exec"), names)
    for added in set(list_methods()) - before:
        unregister(added)
    if "run" in names:
        assert names["run"].last.pruned, "the block prunes nothing"


def test_the_readme_has_its_blocks_and_files() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(BLOCKS) >= 3 and "TABLE" not in text
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (README.parent / target).exists(), f"the README links to {target}, which is not there"


def test_every_method_is_in_the_readme_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in list_methods() if f"| `{name}" not in text] == []
