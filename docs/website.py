# SPDX-License-Identifier: Apache-2.0
"""What the site has beyond the pages of docs/: a hook of MkDocs, named in mkdocs.yml.

The pages are written for a reader of the repository. Here links to files beside docs/ are turned to their
page on the site, cards of methods and a few other files become pages, and comments such as
``<!-- site: gallery -->`` are replaced by what is made from the package.
"""

from __future__ import annotations

import importlib.util
import io
import json
import posixpath
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "methods"
# files of the repository that are pages of the site too; the home page says what the README says
OUTSIDE = {
    "AGENTS.md": "agents.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks/time.md",
    "benchmarks/accuracy.md": "benchmarks/accuracy.md",
    "benchmarks/tiny/README.md": "benchmarks/tiny.md",
    "kernels/README.md": "kernels.md",
    "kernels/compile_gate.md": "compile_gate.md",
    "vlmprune/assets/tiny/card.md": "tiny_card.md",
    "vlmprune/assets/natural/card.md": "natural_card.md",
    "vlmprune/assets/video/card.md": "video_card.md",
    "vlmprune/assets/weights/tiny/card.md": "weights_card.md",
    "notebooks/README.md": "notebooks/index.md",
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
OUTSIDE |= {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in NOTEBOOKS}
INSTEAD = {
    "README.md": "index.md",
    "README.md#methods": "gallery.md",
    "methods": "gallery.md",
    "configs": "configs.md",
}
FENCE = re.compile(r"^(?: {0,3})(```|~~~)")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?!https?:|mailto:)([^)\s]+)\)")
ITEM = re.compile(r"^(?:[-*+]|\d+\.) ")
FIRST = re.compile(r"^(?:[-*+]|1\.) ")  # "576. Papers" behind a line of text goes on with its sentence
KEEP, TOKENS, DEPTH = 18, 144, 8  # of docs/gallery_all.png
UNKNOWN = "not measured"  # how such a cell of the table of capabilities begins
PAPER, ARXIV = re.compile(r"(?<![\[/\w`])arXiv:(\d{4}\.\d{4,5})"), r"[\g<0>](https://arxiv.org/abs/\1)"
# key of an entry of a ledger -> how the page says it
CLAIM = {
    "paper": "paper",
    "official": "official code",
    "ours": "here",
    "tolerance": "how close",
    "reproduce": "again",
}
PARTS = ("Idea", "Equation", "When it fails")  # of a card, in the gallery


def script(name: str) -> ModuleType:
    """One of the scripts beside this one; docs/ is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"docs/{name}.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- links and layout -----------------------------------------------------------------------------


@cache
def places() -> dict[str, str]:
    """Path in the repository -> page or picture of the site."""
    inside = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".png", ".svg", ".json")]
    found = {path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs").as_posix() for path in inside}
    found |= {f"methods/{card.name}": f"methods/{card.name}" for card in CARDS.glob("*.md")}
    return found | OUTSIDE | INSTEAD


def linked(text: str, source: str, home: str, repository: str | None = None) -> str:
    """A page of the repository with its links as the site has them.

    Args:
        source: path of the page in the repository. home: its path on the site.
        repository: address of the code. Without it, a link to what is no page becomes plain text.
    """

    def turn(found: re.Match[str]) -> str:
        bang, label, target = found.groups()
        path, sharp, anchor = target.partition("#")
        if not path or "`" in target:
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        place = places().get(f"{file}{sharp}{anchor}")
        if place is not None and sharp:
            anchor = sharp = ""
        place = place or places().get(file)
        if place is None:
            return f"[{label}]({repository}/{file})" if repository and not bang else label
        return f"{bang}[{label}]({posixpath.relpath(place, posixpath.dirname(home) or '.')}{sharp}{anchor})"

    return "\n".join(line if fenced else LINK.sub(turn, line) for line, fenced in lines_of(text))


def lines_of(text: str) -> list[tuple[str, bool]]:
    """Each line with whether it is code: in a fence, or indented like it."""
    found, fence = [], ""
    for line in text.splitlines():
        mark = FENCE.match(line)
        if fence:
            found.append((line, True))
            fence = "" if mark and mark[1] == fence else fence
            continue
        fence = mark[1] if mark else ""
        found.append((line, bool(mark) or line.startswith("    ")))
    return found


def spaced(text: str) -> str:
    """Lists with an empty line in front: GitHub starts a list behind any line, Python-Markdown does not."""
    made: list[str] = []
    listing = False
    for line, code in lines_of(text):
        if not line.strip():
            listing = False
        elif not code and ITEM.match(line):
            behind = bool(made and made[-1].strip()) and not listing
            listing = not behind or bool(FIRST.match(line))
            if behind and listing:
                made.append("")
        made.append(line)
    return "\n".join(made)


# --- cards of methods -----------------------------------------------------------------------------


def card_page(name: str, repository: str | None = None) -> str:
    """A card with links to its papers; behind it the ledger, of which it speaks."""
    place = f"methods/{name}.md"
    text = linked((CARDS / f"{name}.md").read_text(encoding="utf-8"), place, place, repository)
    lines = [line if code else PAPER.sub(ARXIV, line) for line, code in lines_of(text)]
    # a card has one heading, and its equations need the room of a table of contents
    return "---\nhide: [toc]\n---\n\n" + "\n".join([*lines, "", *ledger(name)]) + "\n"


def ledger(name: str) -> list[str]:
    """The claims of methods/NAME.yaml, in a box that is closed until it is wanted."""
    plain = script("messages").escaped
    made = ['??? note "The ledger: what was compared with what, and how to do it again"']
    for entry in yaml.safe_load((CARDS / f"{name}.yaml").read_text(encoding="utf-8"))["entries"] or []:
        said = {title: entry[key] for key, title in CLAIM.items() if entry[key] is not None}
        said.setdefault("here", "not measured")
        made += ["", f"    **{plain(entry['what'])}**", ""]
        made += [f"    - {title}: {plain(str(value))}" for title, value in said.items()]
    return made


# --- what is made from the package ----------------------------------------------------------------


def card_parts(name: str) -> dict[str, str]:
    """Paragraphs of a card by the words that they begin with."""
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    pieces = re.split(r"^\*\*([^*]+?)[.:]?\*\*[.:]?", text, flags=re.MULTILINE)
    return {head: body.strip("\n ") for head, body in zip(pieces[1::2], pieces[2::2], strict=True)}


class Panel(NamedTuple):
    """One picture of a method.

    Args:
        file: the picture of docs/ that it is cut out of. number: its place there; 0 is that of all tokens.
        count, columns: of the panels of that picture.
    """

    spec: str
    file: str
    number: int
    count: int
    columns: int


@cache
def drawn() -> dict[str, Panel]:
    """Method -> its panel."""
    from vlmprune.spec import parse

    gallery = script("gallery")
    sheets = {
        "gallery_all.png": (gallery.every_spec(KEEP, TOKENS, DEPTH), gallery.COLUMNS),
        "gallery_clips.png": (gallery.clip_specs(), gallery.CLIP_COLUMNS),
    }
    found: dict[str, Panel] = {}
    for file, (specs, columns) in sheets.items():
        for number, spec in enumerate(specs, start=1):
            name = parse(spec).parts[0].name
            found.setdefault(name, Panel(spec, file, number, len(specs) + 1, columns))
    return found


@cache
def panels() -> dict[str, bytes]:
    """A PNG for each method that is drawn, cut out of the picture of all of them."""
    from PIL import Image

    gallery = script("gallery")
    files = {one.file for one in drawn().values()}
    sheets = {file: Image.open(ROOT / "docs" / file) for file in files}
    found = {}
    for name, one in drawn().items():
        whole, rows = sheets[one.file], -(-one.count // one.columns)
        wide, tall = gallery.SIZE + gallery.GAP, (whole.height - gallery.HEAD + gallery.GAP) // rows
        down, right = divmod(one.number, one.columns)
        corner = (right * wide, gallery.HEAD + down * tall)
        box = (*corner, corner[0] + gallery.SIZE, corner[1] + tall - gallery.GAP)
        if box[2] > whole.width or tall * rows != whole.height - gallery.HEAD + gallery.GAP:
            raise ValueError(f"docs/{one.file} has other panels; draw it again with docs/gallery.py")
        file = io.BytesIO()
        whole.crop(box).save(file, "PNG", optimize=True)
        found[name] = file.getvalue()
    return found


def undrawn(name: str) -> str:
    """Why a method has no picture."""
    from vlmprune.registry import get

    cls = get(name)
    if name == "rcp":
        return "it needs weights that were trained for the model."
    if cls.slot == "attention":
        return "it keeps every token and changes what attention gives to them."
    if cls.slot == "decode":
        return "it chooses anew for every token of the answer."
    if cls.slot == "picture":
        return "the bundled model reads pictures of one size, so that a smaller one has as many tokens."
    if cls.slot == "answer":
        return "it keeps every token; [Look twice](refine.md) says what it cuts out of a picture."
    return "it keeps all tokens, or none of them."


def gallery_page() -> str:
    """All methods: picture, idea, equation and weakness, by the place where they act."""
    tables = script("readme_tables")
    sections: dict[str, list[str]] = {}
    for name in tables.names():
        cls = tables.get(name)
        own = "Baselines" if not cls.paper and not cls.wraps else tables.WHERE[cls.slot].capitalize()
        sections.setdefault("Around another method" if cls.wraps else own, []).append(name)
    made = [f"## {title}\n\n" + "\n".join(map(entry, names)) for title, names in sections.items()]
    return "\n\n".join(made)


def entry(name: str) -> str:
    """One method of the gallery."""
    parts = card_parts(name)
    title = (CARDS / f"{name}.md").read_text(encoding="utf-8").partition("\n")[0].partition(": ")[2]
    if name in drawn():
        left = f"![what {drawn()[name].spec} keeps](gallery/{name}.png)"
    else:
        left = f"*Not drawn: {undrawn(name)}*"
    said = "\n\n".join(f"**{head}.** {parts[head]}" for head in PARTS if head in parts)
    said = linked(spaced(said), f"methods/{name}.md", "gallery.md")
    return (
        f"### `{name}`\n\n{title[:1].upper()}{title[1:]}.\n\n"
        f'<div class="method" markdown>\n<div markdown>\n\n{left}\n\n</div>\n'
        f'<div markdown="block">\n\n{said}\n\n[The whole card](methods/{name}.md)\n\n</div>\n</div>\n'
    )


def models_table() -> str:
    """Every declared family, and what was measured with it."""
    table = json.loads((ROOT / "vlmprune" / "assets" / "capabilities.json").read_text(encoding="utf-8"))
    families = table["families"]
    first = next(iter(families.values()))["capabilities"]
    # what no family was measured with is said once
    nowhere = [
        name
        for name in first
        if all(row["capabilities"][name].startswith(UNKNOWN) for row in families.values())
    ]
    lines = ["| family | methods that run | clips | not, or not measured |", "|---|---|---|---|"]
    lines += [models_line(family, row, nowhere) for family, row in families.items()]
    told = f"\n\nNot measured with any family: {', '.join(nowhere)}." if nowhere else ""
    return "\n".join(lines) + told


def models_line(family: str, row: dict[str, Any], nowhere: Sequence[str] = ()) -> str:
    """One line of the table of models, without what is ``nowhere`` measured."""
    able = row["capabilities"]
    told = [cells["runs"] for cells in row["methods"].values()]
    runs, unknown = told.count("yes"), sum(cell.startswith(UNKNOWN) for cell in told)
    if not runs and all(cell.startswith(UNKNOWN) for cell in able.values()):
        return f"| `{family}` | {UNKNOWN} | {UNKNOWN} | everything |"
    count = f"{runs} of {len(told)}" + f", {unknown} {UNKNOWN}" * (unknown > 0)
    clips = "yes" if able["video"] == "yes" else "as images"
    no = [f"**no {name}**" for name, cell in able.items() if cell.startswith("no:") and name != "video"]
    open_ = [name for name, cell in able.items() if cell.startswith(UNKNOWN) and name not in nowhere]
    gaps = no + [f"{UNKNOWN}: {', '.join(open_)}"] * bool(open_)
    return f"| `{family}` | {count} | {clips} | {'; '.join(gaps) or '-'} |"


def configs_page() -> str:
    """Every config of the repository: what its first comment says, and the keys, to be copied."""
    made = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        # without the path to the schema, which holds in the repository alone
        _, about, keys = re.split(r"\A(.*\$schema=.*\n(?:#.*\n)+)", path.read_text(encoding="utf-8"))
        said = [line.removeprefix("# ") for line in about.splitlines()[1:]]
        # a command, of which the page has said already what it needs
        commands = (line.strip().partition("   ")[0] if line.startswith(" ") else "" for line in said)
        told = "\n".join(f"\n    {run}\n" if run else line for run, line in zip(commands, said, strict=True))
        made.append(f"## {path.name}\n\n{told}\n\n```yaml\n{keys.strip()}\n```")
    return "\n\n".join(made)


def commands_page() -> str:
    return str(script("commands").page())


def names_page() -> str:
    """The public names with their docstrings, classes behind functions."""
    import vlmprune

    plain = [name for name in vlmprune.__all__ if not name.startswith("__")]
    functions = [name for name in plain if not isinstance(getattr(vlmprune, name), type)]
    classes = [name for name in plain if name not in functions]
    parts = [
        f"## {title}\n\n" + "\n\n".join(f"::: vlmprune.{name}" for name in names)
        for title, names in (("Functions", functions), ("Classes", classes))
    ]
    return "\n\n".join(parts)


@cache
def notebook_pages() -> dict[str, Any]:
    """Path of a notebook in the repository -> its page."""
    return {f"notebooks/{path.name}": script("notebooks").page_of(path) for path in NOTEBOOKS}


MADE: dict[str, Callable[[], str]] = {
    "gallery": gallery_page,
    "models": models_table,
    "configs": configs_page,
    "commands": commands_page,
    "names": names_page,
}
COMMENT = re.compile(r"^<!-- site: (\w+) -->$", re.MULTILINE)


def filled(text: str) -> str:
    """A page with what its comments ask for."""
    messages = script("messages")
    text = COMMENT.sub(lambda found: MADE[found[1]](), text)
    known = messages.groups(text)
    marks = iter(known)
    return messages.MARK.sub(lambda found: messages.listed(next(marks), known), text)


# --- hooks of MkDocs ------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and pictures that are not in docs/."""
    from mkdocs.structure.files import File

    for card in CARDS.glob("*.md"):
        made = card_page(card.stem, config.repo_url or None)
        files.append(File.generated(config, f"methods/{card.name}", content=made))
    for source, home in OUTSIDE.items():
        text = (
            notebook_pages()[source].text
            if source in notebook_pages()
            else (ROOT / source).read_text(encoding="utf-8")
        )
        made = linked(text, source, home, config.repo_url or None)
        files.append(File.generated(config, home, content=made))
    for name, content in panels().items():
        files.append(File.generated(config, f"gallery/{name}.png", content=content))
    for source, page in notebook_pages().items():
        files.append(File.generated(config, source, content=(ROOT / source).read_bytes()))
        for name, content in page.pictures.items():
            files.append(File.generated(config, f"notebooks/{page.name}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns a page of the repository to one of the site."""
    if page.file.generated_by is None:
        source = f"docs/{page.file.src_uri}"
        # in this order: what fills a page has the links of the site already
        markdown = filled(linked(markdown, source, page.file.src_uri, config.repo_url or None))
    return spaced(markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Leaves out what examples in docstrings say to doctest."""
    return re.sub(r'\s*<span class="[^"]*"># doctest: \+SKIP</span>', "", html)
