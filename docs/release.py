# SPDX-License-Identifier: Apache-2.0
"""Make a release ready, and say whether it is.

    python docs/release.py check               the version is the same in every file
    python docs/release.py check --tag v0.1.0  also: the tag is that version, and the changelog has a date
    python docs/release.py prepare 0.1.0       write version and date of today into the files

Nothing is uploaded here: pushing the tag starts .github/workflows/release.yml.
"""

from __future__ import annotations

import argparse
import datetime
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.compile(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?")
UNRELEASED = "unreleased"


class Place(NamedTuple):
    """Where the version stands: one line of a file, with the version as group 2."""

    file: str
    line: re.Pattern[str]


PLACES = (
    Place("vlmprune/__init__.py", re.compile(r'^(__version__ = ")([^"]+)(")$', re.MULTILINE)),
    Place("CITATION.cff", re.compile(r"^(version: )(\S+)()$", re.MULTILINE)),
    Place("CHANGELOG.md", re.compile(r"^(## \[)([^\]]+)(\] - )", re.MULTILINE)),  # the newest is the first
)
DATED = re.compile(r"^(## \[[^\]]+\] - )(\S+)$", re.MULTILINE)


def read(root: Path, file: str) -> str:
    return (root / file).read_text(encoding="utf-8")


def versions(root: Path = ROOT) -> dict[str, str]:
    """File -> the version that it names."""
    found = {}
    for place in PLACES:
        match = place.line.search(read(root, place.file))
        if match is None:
            raise SystemExit(f"{place.file} names no version; expected a line like {place.line.pattern!r}")
        found[place.file] = match[2]
    return found


def problems(root: Path = ROOT, tag: str | None = None) -> list[str]:
    """What stands against a release; with ``tag`` also what stands against that one."""
    found = versions(root)
    version = found[PLACES[0].file]
    wrong = [f"{file} has {other}, {PLACES[0].file} has {version}" for file, other in found.items()]
    wrong = [line for line, other in zip(wrong, found.values(), strict=True) if other != version]
    if not VERSION.fullmatch(version):
        wrong.append(f"the version {version!r} is no version; expected one like 0.1.0 or 0.2.0rc1")
    if tag is None:
        return wrong
    if tag != f"v{version}":
        wrong.append(f"the tag is {tag}; expected v{version}")
    date = DATED.search(read(root, "CHANGELOG.md"))
    if date is None or not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date[2]):
        given = date[2] if date else "nothing"
        wrong.append(
            f"CHANGELOG.md dates this version {given!r}; expected a day: run docs/release.py prepare"
        )
    return wrong


def prepare(version: str, day: datetime.date, root: Path = ROOT) -> None:
    """Write the version into every place, and the day into the changelog."""
    if not VERSION.fullmatch(version):
        raise SystemExit(f"{version!r} is no version; expected one like 0.1.0 or 0.2.0rc1")
    newest = versions(root)["CHANGELOG.md"]
    date = DATED.search(read(root, "CHANGELOG.md"))
    if newest != version and (date is None or date[2] != UNRELEASED):
        raise SystemExit(
            f"CHANGELOG.md has no section for {version}, and {newest} is out already; add '## [{version}] - "
            f"{UNRELEASED}' with what changed"
        )
    for place in PLACES:
        text = place.line.sub(rf"\g<1>{version}\g<3>", read(root, place.file), count=1)
        if place.file == "CHANGELOG.md":
            text = DATED.sub(rf"\g<1>{day.isoformat()}", text, count=1)
        (root / place.file).write_text(text, encoding="utf-8")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="say whether the files agree")
    checking.add_argument("--tag", help="the tag that is to be released, such as v0.1.0")
    preparing = commands.add_parser("prepare", help="write a version and the day of today")
    preparing.add_argument("version")
    options = parser.parse_args(words)
    if options.command == "prepare":
        prepare(options.version, datetime.datetime.now(datetime.timezone.utc).date())
        tag = f"v{options.version}"
        print(
            f"Written. Now: git commit -am 'Release {options.version}', git tag {tag}, git push origin {tag}"
        )
        return
    if wrong := problems(tag=options.tag):
        raise SystemExit("\n".join(wrong))
    print(f"{versions()[PLACES[0].file]}: all files agree")


if __name__ == "__main__":
    main()
