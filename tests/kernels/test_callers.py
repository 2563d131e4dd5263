# SPDX-License-Identifier: Apache-2.0
"""No kernel is without a caller: what no path of the library calls is deleted, not kept for later."""

from __future__ import annotations

import ast
from importlib.util import resolve_name
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlmprune import kernels
from vlmprune.kernels import backends, cpu, dispatch, ops

PACKAGE = Path(kernels.__file__).parents[1]
OPS = set(kernels.__all__) - {"use"}  # which forces a backend and computes nothing
DOORS = {"vlmprune.kernels", "vlmprune.kernels.dispatch", "vlmprune.kernels.unchecked"}
# ops that no path calls by name, and the ops that lead to them
LED_TO = {
    "unprune": "gather_rows",  # its gradient
    "greedy_maxmin": "greedy_maxmin_features",  # of few tokens on a GPU
    "greedy_dpp": "greedy_dpp_features",
}


def asked_for(source: str, package: str) -> set[str]:
    """What a file of ``package`` asks of the kernels: imported by name, or as attributes of a door."""
    nodes = list(ast.walk(ast.parse(source)))
    doors, found = set(), set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                if f"{base}.{alias.name}" in DOORS:
                    doors.add(alias.asname or alias.name)
                elif base in DOORS:
                    found.add(alias.name)
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in doors:
            found.add(node.attr)
    return found


def called() -> set[str]:
    """What the library asks of its kernels."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        folder = path.relative_to(PACKAGE.parent).parent
        if folder.parts[:2] != ("vlmprune", "kernels"):
            found |= asked_for(path.read_text(), ".".join(folder.parts))
    return found


def test_every_op_has_a_caller() -> None:
    assert sorted(OPS - called() - set(LED_TO)) == []


def test_exceptions_are_needed_and_their_ops_have_callers() -> None:
    assert set(LED_TO) <= OPS - called()
    assert set(LED_TO.values()) <= called()


def test_the_gradient_of_gathered_rows_is_unprune(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, unprune = [], cpu.unprune
    monkeypatch.setattr(cpu, "unprune", lambda *args, **options: seen.append(1) or unprune(*args, **options))
    x = torch.randn(1, 4, 2, requires_grad=True)
    dispatch.gather_rows([x], torch.tensor([[2, 0]]))[0].sum().backward()
    assert seen == [1] and x.grad[0, :, 0].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("op", ["greedy_maxmin", "greedy_dpp"])
def test_few_features_go_to_the_kernel_of_a_matrix(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launchers = SimpleNamespace(**{op: lambda sim, *rest: ("matrix", sim.shape, rest)})
    monkeypatch.setattr(kernels, "triton", launchers, raising=False)
    start = backends._launcher(LED_TO[op], torch.zeros(2, 5, 3), "")
    assert start(torch.zeros(2, 5, 3), 4) == ("matrix", (2, 5, 5), (4,))


def test_the_lists_of_ops_are_the_same() -> None:
    tree = ast.parse((PACKAGE / "kernels" / "triton" / "__init__.py").read_text())
    (launchers,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert set(ops.SCHEMAS) == OPS
    assert set(launchers) == OPS - set(backends._NO_TRITON)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from ..kernels import dispatch\ndispatch.prune(s, 2, [x])", {"prune"}),
        (
            "def f():\n    from ..kernels import unchecked as fast\n    return fast.unprune(g, i, 3)",
            {"unprune"},
        ),
        ("from ..kernels.dispatch import greedy_cover", {"greedy_cover"}),
        ("from vlmprune.kernels import topk_select", {"topk_select"}),
        ("from .. import kernels\nkernels.gather_rows([x], i)", {"gather_rows"}),
        ("from ..kernels import dispatch", set()),
        ("from ..viz import dispatch\ndispatch.prune(s)", set()),
        ('"""Like dispatch.prune."""\nprune = other.prune', set()),
    ],
)
def test_what_a_file_asks_for_is_read_from_its_source(code: str, found: set[str]) -> None:
    assert asked_for(code, "vlmprune.core") == found
