# SPDX-License-Identifier: Apache-2.0
"""Which functions of the package run in one forward: the path that a reader of the code has to follow.

    python benchmarks/hops.py "fastervlm@9"

A tiny LLaVA generates two tokens inside ``with prune(...)``, once to warm up and once under a profile. The
functions of ``vlmprune`` are listed in the order in which they are first called, apart for five parts:

* attach: ``prune`` and entering the block,
* encode: from ``generate`` until the pictures are encoded,
* prefill: the forward that gives the first token,
* decode: the second token, and what ``generate`` does when it returns,
* detach: leaving the block.

Comprehensions and lambdas are frames of their own, but stand inside the function that a reader is in, so that
they are counted apart. What dataclasses generate has no file and is not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import vlmprune
from vlmprune.testing.tiny import tiny_inputs, tiny_model

PARTS = ("attach", "encode", "prefill", "decode", "detach")
PACKAGE = Path(vlmprune.__file__).parent
METHODS = ("fastervlm@9", "fastv(layer=2)@9", "var(dims=[7,21],tau=2.0,first_layer=1)")


@dataclass
class Part:
    """What ran in one part: how often each function was called, in order of first call."""

    calls: Counter[CodeType] = field(default_factory=Counter)

    @property
    def functions(self) -> list[CodeType]:
        """Functions with a name; methods and inner functions are such."""
        return [code for code in self.calls if not code.co_name.startswith("<")]

    @property
    def inner(self) -> list[CodeType]:
        """Comprehensions, generator expressions and lambdas."""
        return [code for code in self.calls if code.co_name.startswith("<")]

    @property
    def files(self) -> list[str]:
        """Files that the functions stand in."""
        return list(dict.fromkeys(file_of(code) for code in self.functions))


def file_of(code: CodeType) -> str:
    """Path inside the package."""
    return Path(code.co_filename).relative_to(PACKAGE).as_posix()


def name_of(code: CodeType) -> str:
    """File, line and name."""
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.11
    return f"{file_of(code)}:{code.co_firstlineno}  {name}"


class Hops:
    """Follows one run; ``part`` says where calls are counted, None nowhere."""

    def __init__(self) -> None:
        self.parts = {name: Part() for name in PARTS}
        self.part: str | None = None

    def _called(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        # modules are run once, when they are imported
        if event != "call" or self.part is None or code.co_name == "<module>":
            return
        if Path(code.co_filename).is_relative_to(PACKAGE):
            self.parts[self.part].calls[code] += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(before)


def count(spec: str, model: Any = None) -> dict[str, Part]:
    """What runs in each part when a tiny LLaVA answers under a spec."""
    model = tiny_model("llava") if model is None else model
    inputs = tiny_inputs("llava")
    with torch.inference_mode():
        _run(spec, model, inputs, Hops())  # modules are imported, signatures are read
        hops = Hops()
        with hops.watching():
            _run(spec, model, inputs, hops)
    return hops.parts


def _run(spec: str, model: Any, inputs: dict[str, Any], hops: Hops) -> None:
    def entered(module: object, args: object) -> None:
        if hops.part == "encode":  # generate encodes before the first forward
            hops.part = "prefill"

    def first_token(module: object, args: object, output: object) -> None:
        hops.part = "decode"  # the forward around the whole model has ended

    hops.part = "attach"
    with vlmprune.prune(model, spec):
        hops.part = None
        handles = [model.register_forward_pre_hook(entered), model.register_forward_hook(first_token)]
        try:
            hops.part = "encode"
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        finally:
            hops.part = None
            for handle in handles:
                handle.remove()
        hops.part = "detach"
    hops.part = None


def lines(spec: str, parts: dict[str, Part], *, listed: bool) -> Iterator[str]:
    """The report of one spec."""
    for name, part in parts.items():
        inner = f", {len(part.inner)} comprehensions and lambdas" if part.inner else ""
        yield f"{spec} {name}: {len(part.functions)} functions in {len(part.files)} files{inner}"
        if listed:
            yield from (f"    {times:4d}  {name_of(code)}" for code, times in part.calls.items())


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="List the functions of vlmprune that run in one forward.")
    parser.add_argument("specs", nargs="*", default=METHODS, help="specs, such as fastervlm@9")
    parser.add_argument("--short", action="store_true", help="numbers only")
    options = parser.parse_args(words)
    for spec in options.specs:
        print(*lines(spec, count(spec), listed=not options.short), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
