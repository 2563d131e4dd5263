# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501
"""Break the kernels on purpose, one line at a time: a case that the real ones answer right must notice, in the interpreter."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import vlmprune
from vlmprune.errors import InvariantError
from vlmprune.testing.kernel_cases import CASES
from vlmprune.testing.kernel_check import check

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning"),
]
PACKAGE = Path(vlmprune.__file__).parent


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    op: str
    within: str = ""  # part of the names of the cases to try
    slow: bool = True


MUTANTS = [
    Mutant("the last of equals is dropped", "triton_select", "(rank_equal <= need)", "(rank_equal < need)", "topk_select", "ties-7", False),
    Mutant("the zeros differ", "triton_select", "(sign & 0x7FFFFFFF)) - sign", "(sign & 0x7FFFFFFF))", "topk_select", "special", False),
    Mutant("negative NaN above positive NaN", "triton_select", "return tl.maximum(key, 0x00FFFFFE)", "return tl.maximum(key, 1)", "topk_select", "special", False),
    Mutant("NaN highest", "triton_select", "+ 0x807FFFFF", "+ 0x80000000", "topk_select", "special", False),
    Mutant("partial scores not added", "triton_select", "for _ in range(1, parts)", "for _ in range(2, parts)", "topk_select", "parts-33", False),
    Mutant("bisection stops early", "triton_select", "while low < high:", "while low + 1 < high:", "topk_select"),
    Mutant("k above N in a segment", "triton_select", "k = tl.minimum(tl.load(ks + s), n)", "k = tl.load(ks + s)", "topk_select_varlen", "long"),
    Mutant("host: k above N", "triton_rows", "    k = min(k, n)\n", "", "prune", "k above N", False),
    Mutant("segments start at 0", "triton_select", "return start.to(tl.int64), n", "return start.to(tl.int64) * 0, n", "topk_select_varlen"),
    Mutant("ends not counted before", "triton_gather", "lane < block * ROWS - pre", "lane < block * ROWS", "prune", "ends-ties"),
    Mutant("rows behind land at N", "triton_gather", "pre + k + token - n)", "row)", "prune", "ends-ties", False),
    Mutant("rows behind are lost", "triton_gather", "(token < n + post)", "(token < n)", "prune", "k above N"),
    Mutant("gather: rows behind", "triton_gather", "pre + n + chosen - k)", "n + chosen - k)", "prune", "ends-ties-two"),
    Mutant("columns of one share only", "triton_gather", "range(part * BD, width, split * BD)", "range(part * BD, width, (split + 1) * BD)", "prune", "many columns"),
    Mutant("last columns masked off", "triton_gather", "(at < width)[None, :]", "(at < width - 1)[None, :]", "gather_rows"),
    Mutant("indices by every share", "triton_gather", "tl.store(idx + first + place, token, mask=keep)", "tl.store(idx + first + place, token + 1, mask=keep)", "prune", "no ends"),
    Mutant("dropped rows not zero", "triton_gather", "tl.store(y + target[:, None] + at[None, :], value, mask=(row < n)[:, None] & inside)", "tl.store(y + target[:, None] + at[None, :], value, mask=found[:, None] & inside)", "unprune"),
    Mutant("search one step short", "triton_gather", "for _ in range(0, steps)", "for _ in range(1, steps)", "unprune"),
    Mutant("digits of other prefixes counted", "triton_large", "valid & ((key >> 21) == high)", "valid", "topk_select", "long"),
    Mutant("chunks before forgotten", "triton_large", "tl.sum(above, 0), tl.sum(equal, 0))", "tl.sum(above, 0), 0)", "topk_select", "long"),
    Mutant("higher index wins a pick", "triton_greedy", "tl.min(tl.where(key == top, token, 0x7FFFFFFF), 0)", "tl.max(tl.where(key == top, token, 0), 0)", "greedy_maxmin", "21", False),
    Mutant("picked again", "triton_greedy", "        taken = taken | (lane == pick)\n        row", "        row", "greedy_maxmin", "21", False),
    Mutant("NaN forgotten", "triton_greedy", "best = tl.maximum(best, row, propagate_nan=tl.PropagateNan.ALL)", "best = tl.where(row > best, row, best)", "greedy_maxmin", "spoilt"),
    Mutant("itself the nearest", "triton_greedy", " & (token[:, None] != other[None, :])", "", "greedy_maxmin", "21-7-nn"),
    Mutant("weight forgotten", "triton_greedy", "tl.load(weight + at, mask=valid, other=0.0) * value", "value", "greedy_maxmin", "weighted"),
    Mutant("column instead of row", "triton_greedy", "sim + pick.to(tl.int64) * row_stride + lane, mask=valid, other=0.0)\n        best", "sim + pick + lane * row_stride, mask=valid, other=0.0)\n        best", "greedy_maxmin", "spoilt"),
    Mutant("rounding counts as residual", "triton_greedy", "tl.where(residual <= floor, 0.0, residual)", "residual", "greedy_dpp", "rank used up"),
    Mutant("nothing explained", "triton_greedy", "explained += tl.sum(rows * picks[:, None], 0)", "explained += 0.0", "greedy_dpp", "21"),
    Mutant("step: leavings of one launch only", "triton_steps", "at = ((step - 1) & 1) *", "at = (step & 1) *", "greedy_maxmin_features"),
    Mutant("step: picked again", "triton_steps", "tl.store(taken + at, gone.to(tl.int8), mask=valid)\n            leave(keys, tokens, step, worth_of", "leave(keys, tokens, step, worth_of", "greedy_maxmin_features"),
    Mutant("step: history a row short", "triton_steps", "valid, step - 1, history_stride", "valid, step - 17, history_stride", "greedy_dpp_features", "21"),
    Mutant("head of another group", "triton_attention", "(head * group + mine)[:, None] * (q_head", "(head + mine)[:, None] * (q_head", "attn_row_scores", "groups-float32"),
    Mutant("softmax of the columns asked for", "triton_attention", "valid = key < keys", "valid = key < v0 + nv", "attn_row_scores", "wide-float32"),
    Mutant("sum instead of mean", "triton_attention", "total * share", "total", "attn_row_scores", "groups-float32-lse"),
    Mutant("rows of the matrix not weighed", "triton_attention", "total += left * tl.load(y +", "total += tl.load(y +", "zoo_sensitivity"),
]  # fmt: skip


def broken(mutant: Mutant, folder: Path):
    """The launchers of a copy of the package in which one line differs."""
    package = folder / "mutated"
    (package / "kernels").mkdir(parents=True)
    for path in (PACKAGE / "kernels").glob("*.py"):
        if path.stem == "reference" or path.stem.startswith("triton_"):
            shutil.copy(path, package / "kernels")
    shutil.copy(PACKAGE / "errors.py", package)
    (package / "__init__.py").touch()
    (package / "kernels" / "__init__.py").touch()
    path = package / "kernels" / f"{mutant.file}.py"
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"the line of {mutant.name!r} stands {source.count(mutant.old)} times; update the list"
    path.write_text(source.replace(mutant.old, mutant.new))
    ops = importlib.import_module("mutated.kernels.triton_ops")
    sys.modules["mutated.kernels.triton_rows"]._BUSY = 1  # few programs, each with several tiles of columns
    return ops


@pytest.fixture
def mutated(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda mutant: broken(mutant, tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mutated"]:
        del sys.modules[name]


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name, marks=[pytest.mark.slow] * m.slow) for m in MUTANTS])
def test_a_case_notices(mutant, mutated, poisoned):
    ops = mutated(mutant)
    cases = [case for case in CASES if case.op == mutant.op and mutant.within in case.name and not case.slow]
    assert cases
    for case in cases:
        try:
            check(case, ops)
        except (InvariantError, IndexError, ValueError, RuntimeError):
            return
    pytest.fail(f"{len(cases)} cases let it pass: {mutant.old} -> {mutant.new}")


def test_offsets_need_64_bits(mutated):
    # two rows 2**31 bytes apart, and as much memory before them, where a wrapped offset leads; most of it is never touched
    store = torch.empty(2**32 + 64, dtype=torch.int8)
    x = store[2**31 :].as_strided((1, 2, 16), (2**32, 2**31, 1)).fill_(1)
    store[:16] = 0
    offsets = "batch * b0 + row * r0,"
    ops = mutated(Mutant("", "triton_gather", f"copy_rows(x0, y0, {offsets}", f"copy_rows(x0, y0, ({offsets[:-1]}).to(tl.int32),", ""))
    assert ops.gather_rows([x], torch.tensor([[0, 1]]).int())[0].sum(-1).tolist() == [[16, 0]]
