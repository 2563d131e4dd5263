# SPDX-License-Identifier: Apache-2.0
"""Every error message that the package can raise, read from its source; docs/troubleshooting.md has a remedy
for each group of them.

    python docs/messages.py            list all messages by file
    python docs/messages.py --missing  list files whose messages belong to no group yet; exit code 1 if any

A group is a section of the page. It names its files in a comment, ``<!-- messages: spec.py core/ -->``; where
several fit, the longest path holds. The site puts the messages in the place of the comment, so that its
search finds them.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, PAGE = ROOT / "vlmprune", ROOT / "docs" / "troubleshooting.md"
HOLE = "\N{HORIZONTAL ELLIPSIS}"  # what a message fills in
MARK = re.compile(r"^<!-- messages: (.+?) -->$", re.MULTILINE)


class Message(NamedTuple):
    """What an error says, with a hole for each value; ``file`` is relative to the package."""

    file: str
    line: int
    error: str
    text: str


@cache
def _trees(package: Path) -> dict[str, ast.Module]:
    """Each file as syntax."""
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def error_classes(package: Path = PACKAGE) -> set[str]:
    """Names of the children of VlmPruneError, and its own."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for tree in _trees(package).values()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    found = {"VlmPruneError"}
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return found


@cache
def messages(package: Path = PACKAGE) -> tuple[Message, ...]:
    """All of them, in the order of files and lines; what only passes on another error says nothing itself."""
    classes = error_classes(package)
    found = []
    for name, tree in _trees(package).items():
        for scope, call in _calls(tree, classes):
            for text in _texts(call.args[0], scope) if call.args else []:
                if len(re.findall(r"[a-z]{2,}", text)) > 1:
                    error = ast.unparse(call.func)
                    found.append(Message(name, call.lineno, error, " ".join(text.split())))
    return tuple(sorted(dict.fromkeys(found), key=lambda one: (one.file, one.line)))


def _calls(tree: ast.Module, classes: set[str]) -> Iterator[tuple[ast.AST, ast.Call]]:
    """Where errors are made, with the function around, in which names of texts are looked up."""
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes:
            around = [one for one in functions if one.lineno <= node.lineno <= (one.end_lineno or 0)]
            yield max(around, key=lambda one: one.lineno, default=tree), node


def _texts(node: ast.AST, scope: ast.AST, depth: int = 0) -> list[str]:
    """What an expression can say: one text for each branch of a condition."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, scope, depth) + _texts(node.orelse, scope, depth)
    if isinstance(node, ast.BinOp):
        return [
            left + right for left in _texts(node.left, scope, depth) for right in _texts(node.right, scope)
        ]
    if isinstance(node, ast.JoinedStr):
        return ["".join(_part(part, scope, depth) for part in node.values)]
    if isinstance(node, ast.Name) and depth < 2:
        values = [
            one.value
            for one in ast.walk(scope)
            if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == node.id
        ]
        return [text for value in values for text in _texts(value, scope, depth + 1)] or [HOLE]
    return [HOLE]


def _part(part: ast.expr, scope: ast.AST, depth: int) -> str:
    """A piece of an f-string; a value that is one known text in all cases is written out."""
    if isinstance(part, ast.FormattedValue):
        found = _texts(part.value, scope, depth + 1)
        return found[0] if len(found) == 1 else HOLE
    return _texts(part, scope, depth)[0]


class Group(NamedTuple):
    """A section of the page: its heading, and the files whose messages it explains."""

    heading: str
    files: tuple[str, ...]


def groups(page: str | None = None) -> list[Group]:
    """In the order of the page."""
    text = PAGE.read_text(encoding="utf-8") if page is None else page
    found = []
    for mark in MARK.finditer(text):
        headings = re.findall(r"^## (.+)$", text[: mark.start()], re.MULTILINE)
        found.append(Group(headings[-1], tuple(mark[1].split())))
    return found


def group_of(file: str, known: list[Group]) -> Group | None:
    """The group with the longest path that fits."""
    fitting = [
        (len(path), group)
        for group in known
        for path in group.files
        if file == path or (path.endswith("/") and file.startswith(path))
    ]
    return max(fitting, key=lambda one: one[0])[1] if fitting else None


def missing(known: list[Group], package: Path = PACKAGE) -> dict[str, list[Message]]:
    """Files with messages that no section explains."""
    left: dict[str, list[Message]] = {}
    for message in messages(package):
        if group_of(message.file, known) is None:
            left.setdefault(message.file, []).append(message)
    return left


def listed(group: Group, known: list[Group]) -> str:
    """The messages of a group as Markdown, in a box that is closed until it is wanted."""
    own = [one for one in messages() if group_of(one.file, known) == group]
    lines = sorted({f"{one.text} ({one.error})" for one in own}, key=str.lower)
    rows = "\n".join(f"    - {escaped(line)}" for line in lines)
    return f'??? note "The {len(lines)} messages of this group"\n\n{rows}\n'


def escaped(text: str) -> str:
    """Plain text for Markdown: no character of it makes a link, an emphasis or a tag."""
    return re.sub(r"([\\`*_\[\]<>|&])", lambda found: f"&#{ord(found[1])};", text)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--missing", action="store_true", help="only those that belong to no group")
    options = parser.parse_args(words)
    left = missing(groups() if options.missing else [])
    for file, found in left.items():
        print(f"{file}:")
        for one in found:
            print(f"  {one.line}: {one.error}: {one.text}")
    if options.missing and left:
        raise SystemExit("add these files to a group of docs/troubleshooting.md, or write a section for them")


if __name__ == "__main__":
    main()
