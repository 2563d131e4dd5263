# SPDX-License-Identifier: Apache-2.0
"""The pages: what is generated is current, links and paths lead somewhere, commands and words are real."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
import yaml
from jsonschema import Draft202012Validator
from PIL import Image

from vlmprune.cli import app
from vlmprune.errors import SpecError
from vlmprune.evaluation.leaderboard.config import Config
from vlmprune.registry import get, list_methods
from vlmprune.spec import parse

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlmprune"
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "kernels/*.md")
    for page in ROOT.glob(pattern)
)
COMMANDS = typer.main.get_command(app).commands


def script(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFIG = script("config")
SCHEMA = json.loads(CONFIG.SCHEMA.read_text(encoding="utf-8"))


def anchors(text):
    """Names of the headings of a page, as links call them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- every page -----------------------------------------------------------------------------------


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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


# folders of the repository and of the package, with which a path begins
FOLDERS = {path.name for base in (ROOT, PACKAGE) for path in base.iterdir() if path.is_dir()}
# what readers put their own name for
THEIRS = re.compile(r"\b(?:mine|NAME|test_mine)\b")
# what commands write
WRITTEN = {"runs", "build", "dist"}


def paths_in(text):
    """Files and folders of the repository that a text names in code; without a folder only ``name.py``."""
    code = re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL)
    for word in re.findall(r"(?<![\w./<>-])[\w.-]+(?:/[\w.-]+)*/?", " ".join(code)):
        first, slash, _ = word.partition("/")
        named = first in FOLDERS - WRITTEN if slash else word.endswith(".py")
        if named and (word.endswith("/") or re.search(r"\.(?:py|md|yaml|json|svg|png|csv|sh)$", word)):
            yield word


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_are_there(page):
    bases = (ROOT, PACKAGE, page.parent)
    missing = [
        path
        for path in paths_in(page.read_text(encoding="utf-8"))
        if not THEIRS.search(path) and not any((base / path).exists() for base in bases)
    ]
    assert missing == []


def test_paths_are_told_from_other_words():
    text = (
        "`core/no_such.py` docs/prose.md `llava-hf/llava-1.5-7b` `gone.py`, `runs/x.json`, `hooks/none/`\n"
        "```bash\npython benchmarks/lost.py --out here.json\n```\n"
    )
    assert list(paths_in(text)) == ["core/no_such.py", "gone.py", "hooks/none/", "benchmarks/lost.py"]


def typed(page):
    """Command lines of ours in a page: in blocks of shell, and in the running text."""
    text = page.read_text(encoding="utf-8")
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    lines = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    inline = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [" ".join(line.split(" #")[0].split()) for line in lines + inline]
    return [line for line in found if line.startswith("vlmprune ")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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
        ours = takewhile(lambda word: word != "--", words)  # behind it stand options of vLLM
        used = {word.split("=")[0] for word in ours if word.startswith("--")}
        assert used <= known | {"--debug"}, f"{page.name}: {line}"


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    docs = ROOT / "docs"
    names = [page.relative_to(docs).as_posix() for page in PAGES if docs in page.parents]
    assert len(names) > 20 and [name for name in names if f"({name})" not in index] == ["index.md"]


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


# --- glossary and architecture --------------------------------------------------------------------


def classes():
    """All classes that a module of the package defines for others, as nodes of its syntax tree."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node


def is_method(node):
    """Whether a class is registered under a name for specs: the table of the README explains that."""
    return any(ast.unparse(one).startswith("register(") for one in node.decorator_list)


def explained():
    """Classes in the tables of the glossary: words in code in the first cell of a row."""
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    _, *tables = re.split(r"^## `vlmprune/", page, flags=re.MULTILINE)
    cells = [line.split("|")[1] for table in tables for line in table.splitlines() if line.startswith("| `")]
    return re.findall(r"`(\w+)`", " ".join(cells))


def test_the_glossary_explains_every_public_class():
    missing = sorted({node.name for node in classes() if not is_method(node)} - set(explained()))
    assert missing == [], f"docs/glossary.md says nothing about {missing}"


def test_the_glossary_names_no_class_that_is_gone_and_none_twice():
    words = explained()
    assert sorted(set(words) - {node.name for node in classes()}) == []
    assert sorted({word for word in words if words.count(word) > 1}) == []


def test_the_picture_of_a_forward_is_current_and_its_files_exist():
    forward = script("forward")
    picture = (ROOT / "docs" / "forward.svg").read_text(encoding="utf-8")
    assert picture == forward.drawing(), "run python docs/forward.py docs/forward.svg"
    assert [file for file in forward.files() if not (PACKAGE / file).is_file()] == []


def rules():
    """(what, where) of the tables of docs/architecture.md that name functions in files."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        for one, other, path in re.findall(r"`([\w.]+)`(?: and `([\w.]+)`)? in `([\w/]+\.py)`", line):
            yield from ((name, path) for name in (one, other) if name)


def test_what_the_architecture_names_is_in_the_file_that_it_names():
    found = list(rules())
    assert len(found) >= 12
    for name, path in found:
        source = (PACKAGE / path).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"\b(?:def|class) {part}\b|^{part}\b", source, re.MULTILINE), (
                f"{name} in {path}"
            )


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


def refused_by_schema(values):
    """What the JSON Schema says against a config."""
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(values)]


def test_the_schema_is_current_and_has_every_key():
    assert CONFIG.SCHEMA.read_text(encoding="utf-8") == CONFIG.schema(), "run python docs/config.py"
    Draft202012Validator.check_schema(SCHEMA)
    documented = re.findall(r"^\| `(\w+)` \|", CONFIG.page(), re.MULTILINE)
    assert sorted(SCHEMA["properties"]) == sorted(documented)
    assert all(rule["description"] for rule in SCHEMA["properties"].values())


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_schema_accepts_every_config_and_each_names_it(path):
    text = path.read_text(encoding="utf-8")
    assert refused_by_schema(yaml.safe_load(text)) == []
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, re.MULTILINE)
    assert (path.parent / named).resolve() == CONFIG.SCHEMA


def test_the_schema_accepts_the_example_and_every_default():
    assert refused_by_schema(yaml.safe_load(CONFIG.EXAMPLE)) == []
    plain = Config.of({"models": ["tiny"], "specs": ["dense"]}).plain()
    assert refused_by_schema(plain) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"models": "tiny"},
        {"models": []},
        {"specs": [64]},
        {"specs": ["dense", "dense"]},
        {"keep": [0]},
        {"keep": [1.5]},
        {"keep": ["64/picture"]},
        {"keep": [64, 64]},
        {"seeds": [0, 1]},
        {"seeds": [0, 1, -1]},
        {"limit": 0},
        {"batch_size": "many"},
        {"dtype": "float8"},
        {"positions": "left"},
        {"no_such_key": 1},
        {"tasks": None},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_package_refuses(changed):
    values = {"models": ["tiny"], "specs": ["fastervlm"], "keep": [64]} | changed
    assert refused_by_schema(values)
    with pytest.raises(SpecError):
        Config.of(values)


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


def test_the_picture_of_all_methods_has_every_one_that_chooses_by_a_budget():
    specs = script("gallery").every_spec(18, 144, 8)
    names = {parse(spec).parts[0].name for spec in specs}
    own = [name for name in list_methods() if get(name).__module__.startswith("vlmprune.")]
    chooses_none = {"dense", "blind", "dyvte", "var", "downsample", "act", "paint", "vhr", "dycoke_decode"}
    chooses_none |= {"carve"}
    of_clips = {name for name in own if get(name).clips}
    assert names == {*own} - chooses_none - of_clips - {"rcp"}  # needs weights of a user
    assert "visionselector(weights=tiny)@18" in specs  # has weights of the package
    of_frames = {parse(spec).parts[0].name for spec in script("gallery").clip_specs()}
    assert of_frames == {"random"} | of_clips
    # schedules that cannot meet 18 tokens, and those inside the tower, whose budget is one of each crop
    assert {"pyramiddrop@0.5", "fitprune@0.25", "flowcut@18/crop", "mmr+fastervlm@18"} <= {*specs}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [("gallery.png", []), ("gallery_all.png", ["--all"]), ("gallery_clips.png", ["--clips"])],
)
def test_the_picture_is_the_one_that_the_rule_gives(tmp_path, name, words):
    gallery = script("gallery")
    gallery.main([str(tmp_path / name), *words])
    drawn, shipped = (np.asarray(Image.open(folder / name)) for folder in (tmp_path, ROOT / "docs"))
    assert drawn.shape == shipped.shape and (drawn != shipped).mean() < 0.01
