# SPDX-License-Identifier: Apache-2.0
"""A release: one version in every file, and what ``docs/release.py`` refuses."""

from __future__ import annotations

import datetime
import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

import vlmprune

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("docs_release", ROOT / "docs" / "release.py")
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)
DAY = datetime.date(2026, 12, 1)
FILES = [place.file for place in release.PLACES]


@pytest.fixture
def copy(tmp_path):
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def change(root, file, old, new):
    text = (root / file).read_text(encoding="utf-8")
    assert old in text
    (root / file).write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_files_of_this_checkout_agree():
    assert release.problems() == [] and set(release.versions().values()) == {vlmprune.__version__}


@pytest.mark.parametrize("file", FILES)
def test_one_file_with_another_version_is_named(copy, file):
    change(copy, file, vlmprune.__version__, "9.9.9")
    named = FILES if file == FILES[0] else [file]
    found = release.problems(copy)
    assert found and all(any(name in line for line in found) for name in named if name != FILES[0])


def test_a_tag_needs_its_version_and_a_day(copy):
    release.prepare("0.1.0", DAY, copy)
    assert release.problems(copy, "v0.1.0") == []
    assert release.problems(copy, "v0.2.0") == ["the tag is v0.2.0; expected v0.1.0"]
    change(copy, "CHANGELOG.md", "2026-12-01", "unreleased")
    (wrong,) = release.problems(copy, "v0.1.0")
    assert "'unreleased'" in wrong and "prepare" in wrong


def test_prepare_writes_every_place_and_nothing_else(copy):
    change(copy, "CHANGELOG.md", "## [0.1.0] - ", "## [0.2.0] - unreleased\n\nNew.\n\n## [0.1.0] - ")
    before = {file: (copy / file).read_text(encoding="utf-8").splitlines() for file in FILES}
    release.prepare("0.2.0", DAY, copy)
    assert set(release.versions(copy).values()) == {"0.2.0"}
    for file, lines in before.items():
        after = (copy / file).read_text(encoding="utf-8").splitlines()
        assert sum(old != new for old, new in zip(lines, after, strict=True)) == 1
    assert "## [0.2.0] - 2026-12-01\n" in (copy / "CHANGELOG.md").read_text(encoding="utf-8")


def test_prepare_refuses_what_is_no_version_or_has_no_section(copy):
    with pytest.raises(SystemExit, match="no version"):
        release.prepare("one", DAY, copy)
    release.prepare("0.1.0", DAY, copy)
    with pytest.raises(SystemExit, match=r"no section for 0\.2\.0"):
        release.prepare("0.2.0", DAY, copy)


def test_the_workflow_checks_the_tag_builds_and_uploads_without_a_password():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    commands = [step["run"] for step in build["steps"] if "run" in step]
    assert "python docs/release.py check --tag" in commands[0] and ".ci/release" in commands[1]
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}
    assert not re.search("password|secrets|token", str(publish["steps"]))
    assert os.access(ROOT / ".ci" / "release", os.X_OK)


def test_the_citation_names_authors_and_the_place_of_a_doi():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    facts = yaml.safe_load(text)
    assert facts["authors"] and facts["title"].startswith("vlmprune") and facts["license"] == "Apache-2.0"
    # no number that leads nowhere: it stands there as a comment until an archive gives one
    assert "doi" in facts or re.search(r"^# doi: ", text, re.MULTILINE)
