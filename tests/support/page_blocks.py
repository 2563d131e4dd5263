# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of the pages: what they take for granted, and running them with what they print."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

import vlmprune
from vlmprune.example_picture import picture

# a checkpoint that pages name; the tiny model stands for it, so that nothing is downloaded
CHECKPOINT = "llava-hf/llava-1.5-7b-hf"


def blocks_of(page: Path) -> list[str]:
    """In the order of the page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in ``folder``, with a photo in it and a checkpoint behind its id."""
    picture().save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    loaded = vlmprune.load("tiny")
    for number, auto in enumerate((transformers.AutoModelForImageTextToText, transformers.AutoProcessor)):
        read = auto.from_pretrained

        def instead(name: Any, *, number: int = number, read: Any = read, **options: Any) -> Any:
            return loaded[number] if name == CHECKPOINT else read(name, **options)

        monkeypatch.setattr(auto, "from_pretrained", instead)


def run_block(code: str, page: str, names: dict[str, Any]) -> dict[int, str]:
    """Run a block in ``names``; line number -> what that line printed last."""
    said: dict[int, str] = {}

    def tell(*values: Any) -> None:
        said[sys._getframe(1).f_lineno] = " ".join(map(str, values))

    names["print"] = tell  # one dictionary: functions look up names in the globals that they were made in
    exec(compile(code, page, "exec"), names)
    return said


def promised(code: str) -> dict[int, str]:
    """Line number -> what the comment behind a print says that it prints."""
    lines = enumerate(code.splitlines(), 1)
    found = {number: re.fullmatch(r"\s*print\(.*\)  # (.+)", line) for number, line in lines}
    return {number: match[1] for number, match in found.items() if match}


def kept(promise: str, said: str) -> bool:
    """Whether a line is what its comment says; ``...`` stands for anything."""
    pattern = ".*".join(map(re.escape, promise.split("...")))
    return re.fullmatch(pattern, said) is not None
