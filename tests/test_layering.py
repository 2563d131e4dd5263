# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the core knows no method and no family, methods hold formulas only, and nothing runs
in circles.
"""

from __future__ import annotations

import ast
import tokenize
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vlmprune"
# of the core's business, nothing that moves tokens is named in a method
CORE_WORDS = {"topk", "attention_mask", "position_ids"}
# what a layer must not know, whatever lies between
FORBIDDEN = {
    "vlmprune.kernels": ("core", "hooks", "methods", "models", "api"),
    "vlmprune.core": ("hooks", "methods", "models", "api", "registry"),
    "vlmprune.hooks": ("methods", "models", "api", "registry"),
    "vlmprune.methods": ("models", "hooks"),
    "vlmprune.models": ("methods", "api", "evaluation"),
}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def statements(body, deep):
    """Import statements that run: all of them, or only those that run when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from statements(node.orelse, deep)
        elif deep or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(ast.iter_child_nodes(node), deep)


def roots(node):
    """First parts of what a statement imports from outside of the package."""
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").split(".")[0]} if node.level == 0 else set()
    return {alias.name.split(".")[0] for alias in node.names}


def imports(source, module, is_package, known, deep):
    """Modules of the package that a source imports; ``from x import y`` is x.y where that is a module, else
    x.
    """
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in statements(ast.parse(source).body, deep):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = resolve_name("." * node.level + (node.module or ""), package)
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names
            ]
        found |= {name for name in names if name.split(".")[0] == "vlmprune"}
    return found - {module}


@cache
def graph(deep):
    return {
        name: imports(path.read_text(), name, path.name == "__init__.py", set(MODULES), deep)
        for name, path in MODULES.items()
    }


def inside(name, package):
    return name == package or name.startswith(package + ".")


def trespasses(layer, edges):
    """Imports from a layer of what the layer must not know."""
    return sorted(
        f"{module} imports {name}"
        for module, names in edges.items()
        if inside(module, layer)
        for name in names
        if any(inside(name, f"vlmprune.{other}") for other in FORBIDDEN[layer])
    )


# the single entry point to the kernels; their files are free to move
ENTRY = {"vlmprune.kernels", "vlmprune.kernels.dispatch", "vlmprune.kernels.unchecked"}


def past_the_entry(edges):
    """Imports of a file of the kernels from outside."""
    return sorted(
        f"{module} imports {name}"
        for module, names in edges.items()
        if not inside(module, "vlmprune.kernels")
        for name in names
        if inside(name, "vlmprune.kernels") and name not in ENTRY
    )


def packages(edges):
    """The same between packages: first parts of names, such as core, hooks, api."""
    between = {}
    for module, names in edges.items():
        for name in names:
            above, below = ((*each.split("."), "")[1] for each in (module, name))
            if above and below and above != below:
                between.setdefault(above, set()).add(below)
    return between


def cycle(edges):
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def core_words(path):
    """Words of the core's business in a file, as names or as whole strings; prose may use them."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return CORE_WORDS & {
        token.string.strip("'\"") for token in tokens if token.type in (tokenize.NAME, tokenize.STRING)
    }


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_imports_nothing_above_it(layer):
    assert trespasses(layer, graph(deep=True)) == []


def test_only_dispatch_leads_to_the_kernels():
    assert past_the_entry(graph(deep=True)) == []


def test_no_modules_import_each_other():
    assert cycle(graph(deep=False)) == []


def test_no_packages_import_each_other():
    """Imports inside functions count too: what is imported late is still known."""
    assert cycle(packages(graph(deep=True))) == []


def test_the_core_knows_no_transformers():
    for name, path in MODULES.items():
        if inside(name, "vlmprune.core") or inside(name, "vlmprune.kernels"):
            assert "transformers" not in {
                word for node in statements(ast.parse(path.read_text()).body, True) for word in roots(node)
            }, f"{name} imports transformers"


@pytest.mark.parametrize("name", [name for name in MODULES if inside(name, "vlmprune.methods")])
def test_a_method_holds_only_its_formula(name):
    assert core_words(MODULES[name]) == set()


def test_the_graph_is_that_of_the_package():
    assert "vlmprune.core.tokens" in graph(deep=False)["vlmprune.core.method"]
    assert "vlmprune.kernels.unchecked" in graph(deep=True)["vlmprune.core.select"]
    assert {"vlmprune.core.method", "vlmprune.registry"} <= graph(deep=True)["vlmprune.methods.baselines"]


# --- the checks themselves ------------------------------------------------------------------------

KNOWN = {"vlmprune", "vlmprune.a", "vlmprune.core", "vlmprune.core.b", "vlmprune.core.c"}


@pytest.mark.parametrize(
    ("code", "shallow", "deep"),
    [
        ("import torch", set(), set()),
        ("from . import b", {"vlmprune.core.b"}, {"vlmprune.core.b"}),
        ("from .b import thing", {"vlmprune.core.b"}, {"vlmprune.core.b"}),
        ("from .. import a", {"vlmprune.a"}, {"vlmprune.a"}),
        ("import vlmprune.a", {"vlmprune.a"}, {"vlmprune.a"}),
        ("try:\n    from ..a import x\nexcept ImportError:\n    x = None", {"vlmprune.a"}, {"vlmprune.a"}),
        ("def f():\n    from ..a import x", set(), {"vlmprune.a"}),
        ("class F:\n    from ..a import x", {"vlmprune.a"}, {"vlmprune.a"}),
        ("if TYPE_CHECKING:\n    from ..a import x", set(), set()),
        (
            "if typing.TYPE_CHECKING:\n    from ..a import x\nelse:\n    from . import b",
            {"vlmprune.core.b"},
            {"vlmprune.core.b"},
        ),
    ],
)
def test_imports_are_read_from_the_source(code, shallow, deep):
    assert imports(code, "vlmprune.core.c", False, KNOWN, deep=False) == shallow
    assert imports(code, "vlmprune.core.c", False, KNOWN, deep=True) == deep


def test_imports_past_the_entry_are_found():
    edges = {
        "vlmprune.core.b": {*ENTRY, "vlmprune.kernels.cpu"},
        "vlmprune.kernels.ops": {"vlmprune.kernels.cpu"},
    }
    assert past_the_entry(edges) == ["vlmprune.core.b imports vlmprune.kernels.cpu"]


def test_trespasses_and_cycles_are_found():
    edges = {
        "vlmprune.core.b": {"vlmprune.methods.m"},
        "vlmprune.methods.m": {"vlmprune.core.b", "vlmprune.hooks.session"},
    }
    assert trespasses("vlmprune.core", edges) == ["vlmprune.core.b imports vlmprune.methods.m"]
    assert trespasses("vlmprune.methods", edges) == ["vlmprune.methods.m imports vlmprune.hooks.session"]
    assert set(cycle(edges)) == {"vlmprune.core.b", "vlmprune.methods.m"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("scores.topk(k)", {"topk"}),
        ("torch.topk(scores, k)", {"topk"}),
        ("kwargs['attention_mask']", {"attention_mask"}),
        ("f(position_ids=None)", {"position_ids"}),
        ('"""No topk here: the core knows the attention_mask."""', set()),
    ],
)
def test_words_of_the_core_are_found_outside_prose(code, words, tmp_path):
    path = tmp_path / "method.py"
    path.write_text(code + "\n")
    assert core_words(path) == words
