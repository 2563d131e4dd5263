# SPDX-License-Identifier: Apache-2.0
"""The files of a new method: method, test, card and ledger, for a plug-in or for this repository.

Those of a new family are in ``scaffold_family.py``.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from string import Template

from ..errors import SpecError
from ..registry import GROUP, list_methods

_IMPORTED = ("ClassVar", "Method", "Tensor", "VisualTokens")  # what the generated file imports

# templates, not f-strings: braces of the code stand as they are
_METHOD = Template('''\
# SPDX-License-Identifier: Apache-2.0
"""$name: keep the tokens with the largest features. TODO: replace the formula, and say whose it is.

Deviations: TODO: from the paper, and from the official code.
Provenance: TODO: what was read, and under which licence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
$imports


@register("$name")
@dataclass(frozen=True)
class $cls(Method):
    """Ranks tokens by the Euclidean norm of their features.

    Args:
        power: the norm is raised to it; a negative one keeps the smallest.

    Example:
        ``vlmprune.select("$name", keep=64, features=features)``
    """

    power: float = 1.0

    needs = ("features",)
    paper: ClassVar[str] = ""
    licence: ClassVar[str] = ""

    def score(self, tokens: VisualTokens) -> Tensor:
        length = tokens.need("features").float().square().sum(dim=-1).sqrt()  # (B, N, D) -> (B, N)
        return length.pow(self.power)
''')
_LAST_STEP = "fill in every TODO: the card says what the method does, the ledger how faithful it is"
# a built-in method imports by relative paths, a plug-in what is public
_IMPORTS_INSIDE = """
from ..core.method import Method
from ..core.tokens import VisualTokens
from ..registry import register"""
_RUN_CHECKS = "from vlmprune.testing.conformance import run_checks"
_IMPORTS_OUTSIDE = "from vlmprune import Method, VisualTokens, register"

_TEST = Template('''\
# SPDX-License-Identifier: Apache-2.0
"""$name against a literal transcription of its formula, and against the checks of every method."""

from __future__ import annotations

import numpy as np
import torch
$imports


def test_kept_tokens_follow_the_formula():
    x = np.random.default_rng(0).normal(size=(2, 40, 8)).astype(np.float32)
    score = np.sqrt((x.astype(np.float64) ** 2).sum(-1))
    keep = np.sort(np.argsort(-score, kind="stable")[:, :10])
    assert vlmprune.select($cls(), keep=10, features=torch.from_numpy(x)).tolist() == keep.tolist()


def test_conformance():
    results = run_checks("$name@0.25", families=["llava"])
    assert results
    assert [f"{r.check}: {r.detail}" for r in results if r.status == "fail"] == []
''')
_CARD = Template("""\
# $name: TODO, in one line what it keeps

TODO: authors, title, arXiv id (venue). Official code: repository, commit, licence, and whether it was read.

**Idea.** TODO: two sentences.

**Equation.** TODO: replace; higher is kept.

    score(i) = |x_i| ^ power

**Where it acts.** Between projector and language model, on the embeddings that the language model would read.

**Positions.** Compact.

**Options.** `power` (1.0): the norm is raised to it.

**Cost.** N D multiplications per image; N numbers are held.

**When it fails.** TODO: an example that can be looked at.

**What differs from the paper.** TODO.

**What differs from the official code.** TODO.

**Published numbers.** TODO: with source, and whether they were measured again here; see the ledger.
""")
_LEDGER = Template("""\
method: $name
paper: TODO
official_code: TODO  # {repository: ..., commit: ..., licence: ...}
licence_of_what_was_read: TODO
calibration: none
entries:
  - what: scores on random features against a transcription of the formula
    paper: null
    official: null
    ours: null
    tolerance: exact kept sets
    reproduce: pytest $test
""")
# of a plug-in: by it vlmprune finds the class once it is installed
ENTRY_POINT = Template("""\
[project.entry-points."$group"]
$name = "$module:$cls"
""")
_PROJECT = Template("""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$project"
version = "0.1.0"
requires-python = ">=3.10"
dependencies = ["vlmprune"]

$entry_point
[tool.setuptools]
py-modules = [$modules]
""")


REGISTRY = Path("vlmprune", "registry.py")
# the head of the table and its indented lines; the closing brace is not a part of it
_TABLE = re.compile(r"^_BUILTIN\b.*= \{\n(?:    .*\n)*", re.MULTILINE)


@dataclass(frozen=True)
class Scaffold:
    """What was written, what got a line more, and what is left to do."""

    files: tuple[Path, ...]
    changed: tuple[Path, ...]
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """Texts of new files and of changed ones, by path below the folder."""

    new: dict[Path, str]
    changed: dict[Path, str]
    steps: tuple[str, ...]


def scaffold(name: str, folder: Path) -> Scaffold:
    """Write the files of a method called ``name``.

    In a checkout of vlmprune they go where built-in methods live; anywhere else they make a plug-in that can
    be installed.
    """
    cls = _class_name(name)
    require_folder(folder)
    # a checkout is known by this folder
    inside = (folder / "vlmprune" / "methods").is_dir()
    return write(_inside(name, cls, folder) if inside else _outside(name, cls, folder), folder)


def require_folder(folder: Path) -> None:
    """Refuse a folder that is not there and could be a slip; a new one is made in a folder that is there."""
    if folder.is_dir() or (folder.parent.is_dir() and not folder.exists()):
        return
    if folder.exists():
        raise SpecError(f"{str(folder)!r} is a file; expected a folder, or a new name for one")
    raise SpecError(
        f"no folder at {str(folder.parent)!r}, in which to make {folder.name!r}; expected an existing one: "
        "make it first"
    )


def write(plan: Draft, folder: Path) -> Scaffold:
    """Write what was planned; nothing is written unless all of it can be."""
    # looked at before anything is written, so that a refusal leaves no half of it
    present = [str(folder / path) for path in plan.new if (folder / path).exists()]
    if present:
        raise SpecError(
            f"{present} exist already and are left as they are; choose another name or folder, or move them "
            "away"
        )
    # new files first, so that the registry never names a module that is not there
    for path, text in {**plan.new, **plan.changed}.items():
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        except OSError as error:
            place = str(folder / path)
            raise SpecError(f"{place!r} cannot be written ({error}); choose another folder") from error
    new, changed = ([folder / path for path in texts] for texts in (plan.new, plan.changed))
    return Scaffold(tuple(new), tuple(changed), plan.steps)


def _class_name(name: str) -> str:
    # the name becomes a module: my_method, but neither MyMethod nor my-method
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise SpecError(
            f"{name!r} is no name for a method; expected lower case letters, digits and _, as in 'my_method'"
        )
    if name in list_methods():
        raise SpecError(f"method {name!r} exists already; choose another name (`vlmprune list` shows all)")
    # my_method -> MyMethod
    cls = "".join(word.capitalize() for word in name.split("_"))
    # name: class, lambda; cls: none -> None; method -> Method, which is imported there
    if keyword.iskeyword(name) or keyword.iskeyword(cls) or cls in _IMPORTED:
        raise SpecError(
            f"{name!r} would make a class {cls!r}, which Python or the generated file uses; choose another "
            "name"
        )
    return cls


def _inside(name: str, cls: str, folder: Path) -> Draft:
    module, test = f"vlmprune.methods.{name}", f"tests/methods/test_{name}.py"
    imports = f"\nimport vlmprune\nfrom {module} import {cls}\n{_RUN_CHECKS}"
    method = f"vlmprune/methods/{name}.py"
    new = {
        Path(method): _METHOD.substitute(name=name, cls=cls, imports=_IMPORTS_INSIDE),
        Path(test): _TEST.substitute(name=name, cls=cls, imports=imports),
        Path("methods", f"{name}.md"): _CARD.substitute(name=name),
        Path("methods", f"{name}.yaml"): _LEDGER.substitute(name=name, test=test),
    }
    steps = (
        f"write the formula in {method} and its transcription in {test}",
        f"pytest {test} && vlmprune verify {name}",
        _LAST_STEP,
        "python docs/readme_tables.py  (the method's line in the README, from the title of its card)",
        f"python docs/capabilities.py --method {name}  (its column in the table of what families can do)",
        "vlmprune bench --count --out kernels/device_counts.csv  (what it asks of a device; a test holds it)",
    )
    return Draft(new, {REGISTRY: _listed(name, f"{module}:{cls}", folder / REGISTRY)}, steps)


def _listed(name: str, target: str, registry: Path) -> str:
    """The registry with the method as the last of its built-in ones."""
    try:
        text = registry.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(
            f"{str(registry)!r} cannot be read ({error}); expected a checkout of vlmprune"
        ) from error
    table = _TABLE.search(text)
    if table is None:
        raise SpecError(f"{str(registry)!r} has no table _BUILTIN = {{...}}; expected that of vlmprune")
    # as the last line of the table, in front of its brace
    return f'{text[: table.end()]}    "{name}": "{target}",\n{text[table.end() :]}'


def _outside(name: str, cls: str, folder: Path) -> Draft:
    module, test = f"vlmprune_{name}", f"test_{name}.py"
    imports = f"import vlmprune\n{_RUN_CHECKS}\n\nfrom {module} import {cls}"
    new = {
        Path(f"{module}.py"): _METHOD.substitute(name=name, cls=cls, imports=_IMPORTS_OUTSIDE),
        Path(test): _TEST.substitute(name=name, cls=cls, imports=imports),
        Path(f"{name}.md"): _CARD.substitute(name=name),
        Path(f"{name}.yaml"): _LEDGER.substitute(name=name, test=test),
    }
    steps = [
        f"pip install pytest -e {quote(str(folder))}",
        f"write the formula in {folder / module}.py and its transcription in {folder / test}",
        f"pytest {quote(str(folder / test))} && vlmprune verify {name}",
        _LAST_STEP,
    ]
    entry_point = ENTRY_POINT.substitute(group=GROUP, name=name, module=module, cls=cls)
    return offered(Draft(new, {}, tuple(steps)), name, (module,), entry_point, folder)


def offered(plan: Draft, name: str, modules: Sequence[str], entry_point: str, folder: Path) -> Draft:
    """With a pyproject.toml that offers the plug-in, or a step that says what to add to the one there is."""
    if (folder / "pyproject.toml").exists():
        named = f"module {modules[0]}" if len(modules) == 1 else f"modules {', '.join(modules)}"
        # a file of somebody else is not changed
        step = f"add to pyproject.toml, which must also install the {named}:\n{entry_point}"
        return Draft(plan.new, plan.changed, (step, *plan.steps))
    # my_method -> vlmprune-my-method, as packages are written
    project = f"vlmprune-{name.replace('_', '-')}"
    listed = ", ".join(f'"{module}"' for module in modules)
    text = _PROJECT.substitute(project=project, entry_point=entry_point, modules=listed)
    return Draft({**plan.new, Path("pyproject.toml"): text}, plan.changed, plan.steps)
