# SPDX-License-Identifier: Apache-2.0
"""The pages in docs/: what is generated is current, links lead somewhere, commands and blocks are real."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from vlmprune.cli import app
from vlmprune.errors import SpecError
from vlmprune.evaluation.leaderboard.config import Config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
COMMANDS = typer.main.get_command(app).commands


def script(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFIG = script("config")


def anchors(text):
    """Names of the headings of a page, as links call them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- every page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, _, anchor in re.findall(
        r"\]\((?!https?:)([^)#]*)(#([^)]+))?\)", page.read_text(encoding="utf-8")
    ):
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), (
                f"{page.name} links to {target}#{anchor}"
            )


def typed(page):
    """Command lines of ours in a page: in blocks of shell, and in the running text."""
    text = page.read_text(encoding="utf-8")
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    lines = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    inline = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [" ".join(line.split(" #")[0].split()) for line in lines + inline]
    return [line for line in found if line.startswith("vlmprune ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    for line in typed(page):
        _, name, *words = shlex.split(line)
        if name.startswith("-"):
            continue
        assert name in COMMANDS, f"{page.name}: {line}"
        known = {
            option
            for parameter in COMMANDS[name].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= known | {"--debug"}, f"{page.name}: {line}"


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in index]
    assert missing == ["index.md"]


def spoken():
    """All text that the package can say: its string literals, with a blank for what is filled in."""
    for path in (ROOT / "vlmprune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "_" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_that_have_a_section_are_those_of_the_package():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^## `(.+)`$", page, re.MULTILINE)
    said = list(spoken())
    assert len(quoted) >= 6
    for message in [*quoted, "no images in this call", "disabled"]:
        assert any(message in text for text in said), f"no message of the package holds {message!r}"


# --- config keys ----------------------------------------------------------------------------------


def test_the_reference_of_config_keys_is_current():
    assert CONFIG.PAGE.read_text(encoding="utf-8") == CONFIG.page(), "run python docs/config.py"


def test_every_key_that_is_known_is_in_the_reference_and_no_other():
    with pytest.raises(SpecError) as error:
        Config.of({"no such key": 1})
    known = re.search(r"expected (\[.*?\])", str(error.value))[1]
    documented = re.findall(r"^\| `(\w+)` \|", CONFIG.page(), re.MULTILINE)
    assert sorted(documented) == sorted(yaml.safe_load(known)) and len(documented) == len(set(documented))


def test_the_example_with_all_keys_is_a_config():
    values = yaml.safe_load(CONFIG.EXAMPLE)
    assert sorted(values) == sorted(re.findall(r"^\| `(\w+)` \|", CONFIG.page(), re.MULTILINE))
    config = Config.of(values, ROOT / "configs")
    assert [str(spec) for spec in config.specs] == [
        "fastervlm@192",
        "fastervlm@0.25",
        "fastervlm@64/crop",
        "divprune@64",
        "fastv(layer=2)@192",
        "fastv(layer=2)@0.25",
        "fastv(layer=2)@64/crop",
    ]


def test_every_default_in_the_reference_is_the_real_one():
    shown = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| `([^`]+)` \|", CONFIG.page(), re.MULTILINE))
    config = Config.of({"models": ["tiny"], "specs": ["dense"]}).plain()
    assert {key: yaml.safe_load(text) for key, text in shown.items()} == {key: config[key] for key in shown}
    assert {"tasks", "seeds", "split", "batch_size", "dtype"} == set(shown)


# --- the README's picture -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "telling"),
    [
        ([1, 0, 1, 1, 1], True),
        ([1, 0, 1, 1, 0], True),
        ([1, 0, 1, 0, 0], False),  # most of the methods must hold
        ([1, 1, 1, 1, 1], False),  # random is right too
        ([0, 0, 1, 1, 1], False),  # the model does not know it
    ],
)
def test_the_picture_is_chosen_by_its_rule(scores, telling):
    records = [SimpleNamespace(score=score) for score in scores]
    assert script("gallery").telling(records) is telling


@pytest.mark.slow
def test_the_picture_is_the_one_that_the_rule_gives(tmp_path):
    gallery = script("gallery")
    gallery.main([str(tmp_path / "gallery.png")])
    drawn, shipped = (np.asarray(Image.open(folder / "gallery.png")) for folder in (tmp_path, ROOT / "docs"))
    assert drawn.shape == shipped.shape and (drawn != shipped).mean() < 0.01
