# SPDX-License-Identifier: Apache-2.0
"""Break the kernels on purpose: a case that the real ones answer right must notice, in the interpreter."""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_cases import CASES
from kernel_check import check

import vlmprune
from vlmprune.errors import InvariantError

sys.path.append(str(Path(__file__).parents[1] / "mutation"))
from mutants_of_triton import MUTANTS, SourceMutant, mutated_source

interpreted = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
KERNELS = Path(vlmprune.__file__).parent / "kernels"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_has_its_place(mutant: SourceMutant) -> None:
    source = (KERNELS / "triton" / f"{mutant.module}.py").read_text()
    assert mutated_source(mutant, source) != ast.unparse(ast.parse(source))
    assert any(case.op == mutant.op and mutant.within in case.name and not case.slow for case in CASES)


def test_wrapped_lines_and_comments_hide_no_place_and_other_functions_do_not_count() -> None:
    mutant = SourceMutant("", "select.kernel", "at + (x & 1)", "at", "")
    wrapped = (
        "def kernel(x, at):\n    return f(\n    # why\n        at\n    + (x & 1),  # 1\n        at,\n    )\n"
    )
    assert mutated_source(mutant, wrapped + "def other(x, at):\n    return at + (x & 1)\n").startswith(
        "def kernel(x, at):\n    return f(at, at)"
    )
    with pytest.raises(LookupError, match=r"stands 0 times in select\.kernel"):
        mutated_source(mutant, wrapped.replace("& 1", "& 2"))
    with pytest.raises(LookupError, match="stands 2 times"):
        mutated_source(mutant, wrapped.replace("at,\n    )", "at + (x & 1))"))


Breaker = Callable[[SourceMutant], ModuleType]


@pytest.fixture
def mutated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Breaker]:
    """Gives the launchers of a copy of the package with one mistake."""

    def broken(mutant: SourceMutant) -> ModuleType:
        package = tmp_path / "mutated"
        (package / "kernels").mkdir(parents=True)
        shutil.copytree(KERNELS / "triton", package / "kernels" / "triton")
        for name in ("reference.py", "crops.py"):
            shutil.copy(KERNELS / name, package / "kernels")
        shutil.copy(KERNELS.parent / "errors.py", package)
        (package / "__init__.py").touch()
        (package / "kernels" / "__init__.py").touch()
        path = package / "kernels" / "triton" / f"{mutant.module}.py"
        path.write_text(mutated_source(mutant, path.read_text()))
        ops = importlib.import_module("mutated.kernels.triton")
        # few programs, each with several tiles of columns
        sys.modules["mutated.kernels.triton.gather"]._BUSY = 1
        return ops

    monkeypatch.syspath_prepend(tmp_path)
    yield broken
    for name in [name for name in sys.modules if name.partition(".")[0] == "mutated"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=m.name, marks=[*interpreted, *[pytest.mark.slow] * m.slow]) for m in MUTANTS],
)
def test_a_case_notices(mutant: SourceMutant, mutated: Breaker, poisoned: object) -> None:
    ops = mutated(mutant)
    cases = [case for case in CASES if case.op == mutant.op and mutant.within in case.name and not case.slow]
    for case in cases:
        try:
            check(case, ops)
        except (InvariantError, IndexError, ValueError, RuntimeError):
            return
    pytest.fail(f"{len(cases)} cases let it pass: {mutant.old} -> {mutant.new}")


@pytest.mark.interpret
def test_offsets_need_64_bits(mutated: Breaker) -> None:
    # two rows 2**31 bytes apart, and as much memory before them, where a wrapped offset leads: hardly touched
    store = torch.empty(2**32 + 64, dtype=torch.int8)
    x = store[2**31 :].as_strided((1, 2, 16), (2**32, 2**31, 1)).fill_(1)
    store[:16] = 0
    offset = "b * b0 + source * r0"
    ops = mutated(SourceMutant("", "gather.gather_kernel", offset, f"({offset}).to(tl.int32)", ""))
    assert ops.gather_rows([x], torch.tensor([[0, 1]]).int())[0].sum(-1).tolist() == [[16, 0]]
