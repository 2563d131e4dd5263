# SPDX-License-Identifier: Apache-2.0
"""The site: its pages run, its hook finds everything, and every error message has a remedy."""

from __future__ import annotations

import importlib.util
import io
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from page_blocks import blocks_of, kept, promised, run_block, stand_in
from PIL import Image

import vlmprune
from vlmprune.models import _REGISTERED
from vlmprune.registry import get, list_methods, unregister

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NEW = ("index", "quickstart", "when_not", "refine", "api")
PAGES = [DOCS / f"{name}.md" for name in NEW] + sorted((DOCS / "howto").glob("*.md"))


def script(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MESSAGES, WEBSITE = script("messages"), script("website")


# --- what the pages show runs ---------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_and_print_what_they_say(page, tmp_path, monkeypatch):
    blocks = blocks_of(page)
    assert blocks, f"{page.name} shows no Python: take it off the list"
    stand_in(tmp_path, monkeypatch)
    monkeypatch.setattr("vlmprune.models._REGISTERED", dict(_REGISTERED))
    torch.manual_seed(0)
    before, names = set(list_methods()), {"__name__": "__main__"}
    try:
        for block in blocks:
            said = run_block(block, str(page), names)
            for line, promise in promised(block).items():
                assert line in said, f"nothing was printed where {promise!r} is promised"
                assert kept(promise, said[line]), f"{said[line]!r} is not {promise!r}"
    finally:
        for added in set(list_methods()) - before:
            unregister(added)


def test_promises_are_read_and_compared():
    code = "x = 1\nprint(x)  # 1\nprint('no promise')\n"
    assert promised(code) == {2: "1"} and run_block(code, "page", {})[2] == "1"
    assert kept("36 of 144, ...", "36 of 144, and more") and kept("(..., ...)", "(12, 3)")
    assert not kept("1", "2") and not kept("1", "10") and not kept("a...", "b")


def test_the_columns_that_are_explained_are_those_of_the_table():
    from vlmprune.evaluation.report.columns import COLUMNS

    page = (DOCS / "howto" / "read_leaderboard.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(explained) > 8 and [name for name in explained if name not in {c.title for c in COLUMNS}] == []


# --- every error message has a remedy -------------------------------------------------------------


def test_every_message_of_the_package_is_in_a_group_of_the_page():
    left = MESSAGES.missing(MESSAGES.groups())
    assert left == {}, (
        "docs/troubleshooting.md has no section for these; run python docs/messages.py --missing"
    )


def test_no_group_names_a_file_without_messages_or_twice():
    known, found = MESSAGES.groups(), MESSAGES.messages()
    paths = [path for group in known for path in group.files]
    assert len(known) > 10 and len(paths) == len(set(paths))
    for group in known:
        own = [one.file for one in found if MESSAGES.group_of(one.file, known) == group]
        for path in group.files:
            assert any(file == path or file.startswith(path) for file in own), f"{path} in {group.heading!r}"


def test_every_class_of_errors_is_explained():
    page, classes = MESSAGES.PAGE.read_text(encoding="utf-8"), MESSAGES.error_classes()
    assert {"SpecError", "TrainingError", "VlmPruneError"} <= classes
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(classes)


SOURCE = '''
def f(x, y):
    """Not a message."""
    expected = "expected more"
    if x:
        raise SpecError(f"got {x!r}; {expected}")
    raise VlmPruneError("one " + ("thing" if y else "other") + f" of {y}")
'''


def test_messages_are_read_from_the_source(tmp_path):
    (tmp_path / "new.py").write_text(
        "class VlmPruneError(Exception): ...\nclass SpecError(VlmPruneError): ...\n" + SOURCE
    )
    hole = MESSAGES.HOLE
    assert [one.text for one in MESSAGES.messages(tmp_path)] == [
        f"got {hole}; expected more",
        f"one thing of {hole}",
        f"one other of {hole}",
    ]
    assert set(MESSAGES.missing([], tmp_path)) == {"new.py"}
    assert MESSAGES.missing(MESSAGES.groups("## Any\n\n<!-- messages: new.py -->\n"), tmp_path) == {}


def test_known_messages_are_among_them():
    texts = {one.text for one in MESSAGES.messages()}
    assert any("attached already; detach it first" in text for text in texts)
    assert any(
        text.endswith("needs a budget: give keep=64 (tokens) or keep=0.25 (fraction)") for text in texts
    )
    assert len(texts) > 500


# --- the hook of the site -------------------------------------------------------------------------


def test_links_to_files_beside_docs_become_pages_or_words():
    turn = WEBSITE.linked
    assert turn("[a](../README.md#methods)", "docs/x.md", "x.md") == "[a](gallery.md)"
    assert turn("[a](../../CONTRIBUTING.md#add-a-method)", "docs/howto/x.md", "howto/x.md") == (
        "[a](../contributing.md#add-a-method)"
    )
    assert turn("[a](docs/families.md)", "CONTRIBUTING.md", "contributing.md") == "[a](families.md)"
    assert turn("[a](accuracy.md)", "benchmarks/README.md", "benchmarks/time.md") == "[a](accuracy.md)"
    assert turn("[a](../configs)", "docs/x.md", "x.md") == "[a](configs.md)"
    assert turn("[a](../tests)", "docs/x.md", "x.md") == "a"
    assert turn("[a](../tests)", "docs/x.md", "x.md", "https://host/code") == "[a](https://host/code/tests)"
    assert turn("[a](https://host/b) [c](#here)", "docs/x.md", "x.md") == "[a](https://host/b) [c](#here)"
    assert turn("```\n[a](../tests)\n```", "docs/x.md", "x.md") == "```\n[a](../tests)\n```"


def test_lists_get_the_empty_line_that_they_need():
    assert WEBSITE.spaced("text\n* a\n  more\n* b\n\nend") == "text\n\n* a\n  more\n* b\n\nend"
    assert WEBSITE.spaced("text\n1. a\n2. b") == "text\n\n1. a\n2. b"
    assert WEBSITE.spaced("37 tokens of\n576. Papers") == "37 tokens of\n576. Papers"
    assert WEBSITE.spaced("```\ntext\n* a\n```") == "```\ntext\n* a\n```"


def test_every_method_is_in_the_gallery_with_a_picture_or_the_reason_why_not():
    page = WEBSITE.gallery_page()
    own = [name for name in list_methods() if get(name).__module__.startswith("vlmprune.")]
    for name in own:
        assert page.count(f"### `{name}`\n") == 1 and f"(methods/{name}.md)" in page
        drawn = f"(gallery/{name}.png)" in page
        assert drawn == (name in WEBSITE.drawn())
    assert page.count("**Idea.**") == page.count("**Equation.**") == len(own)


def test_the_gallery_keeps_its_pictures_and_links_on_the_site():
    page = SimpleNamespace(file=SimpleNamespace(generated_by=None, src_uri="gallery.md"))
    markdown = (DOCS / "gallery.md").read_text(encoding="utf-8")
    made = WEBSITE.on_page_markdown(markdown, page, SimpleNamespace(repo_url=None), None)
    assert all(f"](gallery/{name}.png)" in made for name in WEBSITE.drawn())
    assert "[The whole card](methods/fastervlm.md)" in made


def test_each_panel_is_cut_out_of_the_picture_of_all_methods():
    panels = WEBSITE.panels()
    assert panels.keys() == WEBSITE.drawn().keys() and len(set(panels.values())) == len(panels)
    assert all(content.startswith(b"\x89PNG") for content in panels.values())


def test_the_panel_of_a_method_is_its_own():
    gallery = script("gallery")

    def head(picture):  # what stands above it, as numbers
        return np.asarray(picture.convert("L").crop((0, 0, gallery.SIZE, gallery.HEAD)), dtype=float)

    titles = {name: head(gallery.titled(one.spec)) for name, one in WEBSITE.drawn().items()}
    for name, content in WEBSITE.panels().items():
        own = head(Image.open(io.BytesIO(content)))
        far = {other: np.abs(own - title).mean() for other, title in titles.items()}
        assert min(far, key=far.get) == name, (
            "draw docs/gallery_all.png or gallery_clips.png again, or number its panels otherwise"
        )


def test_tables_of_models_commands_and_names_have_everything():
    from vlmprune.capabilities import table
    from vlmprune.cli import app

    models = WEBSITE.models_table()
    assert all(f"| `{family}` |" in models for family in table()["families"])
    commands = WEBSITE.commands_page()
    assert all(f"## `vlmprune {one.name}`" in commands for one in app.registered_commands)
    assert "    vlmprune run [IMAGE] [QUESTION] [OPTIONS]\n" in commands
    assert "    vlmprune agreement RUN... [OPTIONS]\n" in commands
    assert "    vlmprune serve MODEL [OPTIONS] [-- VLLM OPTIONS...]\n" in commands
    assert "| `--prune` | `fastervlm@0.25` | Spec" in commands and "| `--data` | must be given |" in commands
    names = re.findall(r"^::: vlmprune\.(\w+)$", WEBSITE.names_page(), re.MULTILINE)
    assert sorted(names) == sorted(set(vlmprune.__all__) - {"__version__"})


def test_the_page_of_troubleshooting_lists_the_messages_under_their_group():
    page = WEBSITE.filled(MESSAGES.PAGE.read_text(encoding="utf-8"))
    assert "<!-- messages" not in page
    section = page.split("## Loading a model")[1].split("\n## ")[0]
    assert "holds no config.json; expected what save" in section.replace("&#95;", "_")
    other = page.split("## Serving")[1].split("\n## ")[0]
    assert "config.json" not in other


def test_every_notebook_is_a_page_with_what_its_cells_showed():
    pages = WEBSITE.notebook_pages()
    assert len(pages) == len(list((ROOT / "notebooks").glob("*.ipynb"))) > 6
    for source, page in pages.items():
        assert WEBSITE.OUTSIDE[source] == f"notebooks/{page.name}.md"
        assert page.text.startswith("# ") and "```python\n" in page.text and 'class="output"' in page.text
        assert "base64" not in page.text and all(f'src="{name}"' in page.text for name in page.pictures)
        assert all(content.startswith(b"\x89PNG") for content in page.pictures.values())
    assert "18 of 144 visual tokens" in pages["notebooks/01_scores.ipynb"].text


def test_a_family_that_was_not_measured_is_said_to_be():
    row = {"methods": {"a": {"runs": "not measured: so"}, "b": {"runs": "no: b cannot"}}}
    able = {"video": "not measured: so", "compile": "not measured: so"}
    line = WEBSITE.models_line("new", row | {"capabilities": able})
    assert line == "| `new` | not measured | not measured | everything |"
    row["methods"]["c"] = {"runs": "yes"}
    assert WEBSITE.models_line("new", row | {"capabilities": able | {"flash": "yes"}}, ["compile"]).endswith(
        "not measured: video |"
    )
    line = WEBSITE.models_line("new", row | {"capabilities": able | {"video": "yes", "flash": "no: none"}})
    assert line == "| `new` | 1 of 3, 1 not measured | yes | **no flash**; not measured: compile |"


class Loader(yaml.SafeLoader):
    """Reads what MkDocs reads."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def navigation(entries: Any):
    for entry in entries if isinstance(entries, list) else entries.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from navigation(entry)


def test_every_page_is_in_the_navigation():
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    named = list(navigation(settings["nav"]))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(named) == len(set(named))
    assert pages - set(named) == set()
    assert set(named) - pages <= set(WEBSITE.OUTSIDE.values())
    assert all((ROOT / source).is_file() for source in WEBSITE.OUTSIDE)


def test_no_page_that_is_linked_is_missing_on_the_site():
    sources = [
        path.relative_to(ROOT).as_posix() for path in (*DOCS.rglob("*.md"), *WEBSITE.CARDS.glob("*.md"))
    ]
    sources += [source for source in WEBSITE.OUTSIDE if source.endswith(".md")]
    lost = []
    for source in sources:
        for line, code in WEBSITE.lines_of((ROOT / source).read_text(encoding="utf-8")):
            for found in [] if code else WEBSITE.LINK.finditer(line):
                path = (ROOT / source).parent / found[3].partition("#")[0]
                file = Path(os.path.normpath(path)).relative_to(ROOT).as_posix()
                if file.endswith(".md") and file not in WEBSITE.places():
                    lost.append(f"{source}: {file}")
    assert len(sources) > 80 and lost == [], "name these in OUTSIDE of docs/website.py"


def test_every_config_is_shown_whole_and_says_what_it_is():
    page = WEBSITE.configs_page()
    for path in (ROOT / "configs").glob("*.yaml"):
        part = page.partition(f"## {path.name}\n\n")[2].partition("\n## ")[0]
        said, keys = part.split("```yaml\n")
        assert len(said.split()) > 5 and "$schema" not in part
        assert yaml.safe_load(keys.partition("\n```")[0]) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_each_part_of_a_card_is_a_paragraph_of_its_own():
    joined = [
        f"{card.name}: {found[0]}"
        for card in WEBSITE.CARDS.glob("*.md")
        for found in re.finditer(r"(?<=\S\n)\*\*[A-Z][^*]+\*\*", card.read_text(encoding="utf-8"))
    ]
    assert joined == [], "put an empty line in front, or they run into the paragraph above"


def test_a_card_leads_to_its_papers_and_has_its_ledger_behind():
    assert "[arXiv:2403.06764](https://arxiv.org/abs/2403.06764) (ECCV" in WEBSITE.card_page("fastv")
    names = {path.stem for path in WEBSITE.CARDS.glob("*.md")}
    assert len(names) > 40
    for name in names:
        claims = (WEBSITE.CARDS / f"{name}.yaml").read_text(encoding="utf-8")
        entries = yaml.safe_load(claims)["entries"] or []
        box = WEBSITE.card_page(name).partition("\n??? note")[2]
        assert box.count("\n    **") == box.count("    - here: ") == len(entries)
        assert box.count("    - here: not measured") == sum(entry["ours"] is None for entry in entries)
