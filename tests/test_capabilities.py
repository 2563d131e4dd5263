# SPDX-License-Identifier: Apache-2.0
"""The table of what families can do: complete, true where it is measured again, and shown by the command
line.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from later_families import FIRST, sampled, slow_tests_run
from typer.testing import CliRunner

from vlmprune.capabilities import table
from vlmprune.cli import app
from vlmprune.models import families
from vlmprune.testing.capabilities import CAPABILITIES, OF_METHODS, cell, method_names, spec_for, stale

ROOT = Path(__file__).parents[1]
METHODS = method_names()
# in each default run one method of the first families runs anew, and of some one thing that another can do;
# always the same ones. Compiling takes minutes: test_compiled does it by default
OFTEN = [f for f in families() if f in FIRST or sampled(f, 4)]
FEW = [(f, METHODS[crc32(f.encode()) % len(METHODS)], None) for f in OFTEN]
HERE = [name for name in OF_METHODS if name != "compile" and (name != "flash" or torch.cuda.is_available())]
FEW += [
    (f, METHODS[crc32(f[::-1].encode()) % len(METHODS)], HERE[crc32(f.encode()) % len(HERE)])
    for f in OFTEN
    if sampled(f"{f} can", 3)
]


def cells() -> Iterator[tuple[str, str | None, str | None]]:
    """All of the table."""
    for family in families():
        yield from ((family, None, name) for name in CAPABILITIES)
        for method in METHODS:
            yield from ((family, method, name) for name in (None, *OF_METHODS))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is not test_the_table_says_what_is_measured_again:
        return
    found: list[Any] = list(FEW)
    if slow_tests_run(metafunc.config):
        few = set(FEW)
        found += [pytest.param(*one, marks=pytest.mark.slow) for one in cells() if one not in few]
    metafunc.parametrize(("family", "method", "capability"), found)


def test_the_table_has_every_family_method_and_capability() -> None:
    assert stale(table()) == [], "run python docs/capabilities.py"


def test_a_table_that_lacks_something_is_stale() -> None:
    found = copy.deepcopy(table())
    row = found["families"].pop("llava")
    del row["methods"]["fastv"], found["families"]["vipllava"]["capabilities"]["beams"]
    del (
        found["families"]["vipllava"]["methods"]["var"]["batch"],
        found["families"]["vipllava"]["methods"]["pool"],
    )
    assert stale(found) == [
        "family llava",
        "vipllava: capability beams",
        "vipllava: method pool",
        "vipllava: var: batch",
    ]


def test_the_table_says_what_is_measured_again(
    family: str, method: str | None, capability: str | None
) -> None:
    row = table()["families"][family]
    known = row["capabilities"] if method is None else row["methods"][method]
    spec, name = (spec_for(family), capability) if method is None else (known["spec"], capability or "runs")
    if name not in known:
        pytest.skip(known["runs"])
    again = cell(family, spec, capability)
    for one in (again, known[name]):
        if one.startswith("not measured"):
            pytest.skip(one)
    assert again.split(":")[0] == known[name].split(":")[0], (
        f"run python docs/capabilities.py --family {family}"
    )


def test_the_page_is_the_data() -> None:
    spec = importlib.util.spec_from_file_location("capabilities_page", ROOT / "docs" / "capabilities.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(table()["families"])


def test_list_families_shows_it() -> None:
    plain = CliRunner().invoke(app, ["list", "--families"])
    assert plain.exit_code == 0 and all(family in plain.stdout for family in families())
    data = json.loads(CliRunner().invoke(app, ["list", "--families", "--json"]).stdout)
    assert data == table()["families"]
