# SPDX-License-Identifier: Apache-2.0
"""The table of what families can do: complete, true where it is measured again, and shown by the command line."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from zlib import crc32

import pytest
from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.models import families
from vlmprune.testing.capabilities import CAPABILITIES, measure, method_names, stale, table

ROOT = Path(__file__).parents[1]
CELLS = [(family, "capability", name) for family in families() for name in CAPABILITIES]
CELLS += [(family, "method", name) for family in families() for name in method_names()]
# one cell of every row anew in each default run, always the same ones
FEW = [(f, kind, names[crc32(f.encode()) % len(names)]) for f in families() for kind, names in (("method", method_names()),)]


def test_the_table_has_every_family_method_and_capability() -> None:
    assert stale(table()) == [], "run python docs/capabilities.py"


def test_a_table_that_lacks_something_is_stale() -> None:
    found = copy.deepcopy(table())
    row = found["families"].pop("llava")
    del row["methods"]["fastv"], found["families"]["vipllava"]["capabilities"]["beams"]
    assert stale(found) == ["family llava", "vipllava: capability beams"]


@pytest.mark.parametrize(
    ("family", "kind", "name"), [*FEW, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS if cell not in FEW)]
)
def test_the_table_says_what_is_measured_again(family: str, kind: str, name: str) -> None:
    known = table()["families"][family][{"capability": "capabilities", "method": "methods"}[kind]][name]
    again = measure(family, **{kind: name})
    if again.startswith("not measured") or known.startswith("not measured"):
        pytest.skip(again if again.startswith("not measured") else known)
    assert again.split(":")[0] == known.split(":")[0], f"run python docs/capabilities.py --family {family}"


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
