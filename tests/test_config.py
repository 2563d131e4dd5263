# SPDX-License-Identifier: Apache-2.0
"""Configs: every key is checked, and those of the repository are valid."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from vlmprune.errors import SpecError
from vlmprune.evaluation.leaderboard.config import Config, load
from vlmprune.evaluation.leaderboard.published import FOLDER as TABLES
from vlmprune.evaluation.leaderboard.published import Published
from vlmprune.evaluation.stats.summary import budget_of
from vlmprune.registry import list_methods

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
PUBLISHED = sorted(TABLES.glob("*.yaml"))
WHOLE = """
models: [tiny, llava-hf/llava-1.5-7b-hf]
specs: [dense, fastervlm@64, "random(seed=3)@0.25/crop", holov, debias+fastv]
keep: [64, 0.5/crop]
tasks: [shapes, "lmms:gqa"]
seeds: [0, 7, 8]
out: runs/first
split: dev
limit: 50
batch_size: 4
max_new_tokens: 8
dtype: bfloat16
positions: original
published: numbers.yaml
"""


NUMBERS = """
about: three tests
columns: {gqa: "lmms:gqa", mme: null}
entries:
  - {spec: holov@64, source: "arXiv:2510.02912", values: {gqa: 55.3, mme: 1715}, average: 95.8}
  - {spec: holov@64, source: a later table, values: {gqa: 50.0}}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_every_key_arrives(write):
    (write("").parent / "numbers.yaml").write_text(NUMBERS)
    config = load(write(WHOLE))
    assert config.models == ("tiny", "llava-hf/llava-1.5-7b-hf")
    assert [str(spec) for spec in config.specs] == [
        "dense",
        "fastervlm@64",
        "random(seed=3)@0.25/crop",
        "holov@64",
        "holov@0.5/crop",
        "debias+fastv@64",
        "debias+fastv@0.5/crop",
    ]
    assert (config.tasks, config.seeds, config.out) == (("shapes", "lmms:gqa"), (0, 7, 8), "runs/first")
    assert (config.split, config.limit, config.batch_size, config.max_new_tokens) == ("dev", 50, 4, 8)
    assert (config.dtype, config.positions) == ("bfloat16", "original")
    assert config.published.find("holov@64", "lmms:gqa") == pytest.approx(0.553)


def test_what_may_be_left_out_has_a_default(write):
    config = load(write("models: [tiny]\nspecs: [dense]\n"))
    assert (config.tasks, config.seeds, config.out) == (("shapes",), (0, 1, 2), None)
    assert (config.split, config.limit, config.batch_size, config.max_new_tokens) == ("test", None, 32, None)


def test_plain_values_are_read_again_as_the_same_config(write):
    config = load(write("models: [tiny]\nspecs: [fastervlm, dense]\nkeep: [9, 0.5]\nlimit: 3\n"))
    assert Config.of(config.plain()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a config is a mapping, got NoneType"),
        ("- tiny", "a config is a mapping, got list"),
        ("modles: [tiny]\nspecs: [dense]", "unknown key 'modles'.*Did you mean 'models'"),
        ("specs: [dense]", "the key 'models' is missing"),
        ("models: [tiny]", "the key 'specs' is missing"),
        ("models: tiny\nspecs: [dense]", "models='tiny'; expected a list"),
        ("models: []\nspecs: [dense]", "at least one entry"),
        ("models: ['']\nspecs: [dense]", "models holds ''"),
        ("models: [7]\nspecs: [dense]", "models holds 7, a int; expected str"),
        ("models: [tiny, tiny]\nspecs: [dense]", "models lists 'tiny' twice"),
        ("models: [tiny]\nspecs: [fastervlm@64, ' fastervlm@64 ']", "specs lists 'fastervlm@64' twice"),
        ("models: [tiny]\nspecs: [fastervlm]", "'fastervlm' has no budget"),
        ("models: [tiny]\nspecs: [fasterlvm@64]", "Did you mean 'fastervlm'"),
        ("models: [tiny]\nspecs: [fastervlm(clss=mean)@64]", "no option 'clss'"),
        ("models: [tiny]\nspecs: [dense]\nseeds: [true]", "seeds holds True, a bool; expected int"),
        ("models: [tiny]\nspecs: [dense]\nseeds: null", "seeds=None; expected a list"),
        ("models: [tiny]\nspecs: [dense]\nout: 3", "out=3; expected the path of a folder"),
        ("models: [tiny]\nspecs: [dense]\nseeds: [0, 1]", "expected at least 3 that are not negative"),
        ("models: [tiny]\nspecs: [dense]\nkeep: [9]", "keep=\\[9\\] meets no spec without a budget"),
        ("models: [tiny]\nspecs: [holov]\nkeep: [true]", "keep holds True; expected budgets"),
        ("models: [tiny]\nspecs: [holov]\nkeep: [1.5]", "keep=1.5 is no budget"),
        ("models: [tiny]\nspecs: [holov, holov@9]\nkeep: [9]", "specs lists 'holov@9' twice"),
        (
            "models: [tiny]\nspecs: [dense]\ntasks: [shaeps]",
            "task 'shaeps' is unknown.*Did you mean 'shapes'",
        ),
        ("models: [tiny]\nspecs: [dense]\nlimit: 0", "limit=0; expected an int >= 1"),
        ("models: [tiny]\nspecs: [dense]\nbatch_size: 2.0", "batch_size=2.0; expected an int >= 1"),
        ("models: [tiny]\nspecs: [dense]\ndtype: float61", "Did you mean 'float16'"),
        ("models: [tiny]\nspecs: [dense]\npublished: none.yaml", "none.yaml: cannot be read"),
        ("models: [tiny]\nspecs: [dense]\npublished: llava-1.5-7", "Did you mean 'llava-1.5-7b'"),
        ("models: [tiny]\nmodels: [other]\nspecs: [dense]", "is given twice"),
        ("models: [tiny\nspecs: [dense]", "not readable as YAML"),
        ("models: !!python/object/apply:os.getcwd []", "not readable as YAML"),
        ("models: " + "[" * 3000, "nested too deeply"),
        ("\n\nlimit: " + "9" * 5000, "line 3, column 8: '999.*999' is no int"),
        ("limit: 2001-13-45", "line 1, column 8: '2001-13-45' is no timestamp"),
        ("limit: 2001-12-14t21:59:43.10-99:99", "is no timestamp"),
        ("limit: !!int ''", "'' is no int"),
        ("limit: !!bool 3", "'3' is no bool"),
        ("limit: !!timestamp x", "'x' is no timestamp"),
        ("!!map [a]", "expected a mapping node"),
        ("!!set [a]", "expected a mapping node"),
        ("? [a]\n: b", "unhashable key"),
        ("<<: 3", "expected a mapping"),
        ("a: \0", "not readable as YAML: unacceptable character"),
        (
            "models: [tiny]\nspecs: [dense]\nlimit: 0x" + "f" * 5000,
            "limit=an int beyond 64 bits; expected an int >= 1",
        ),
        (
            "models: [tiny]\nspecs: [dense]\nseeds: [1, 2, 0x" + "f" * 5000 + "]",
            "an int beyond 64 bits.*at least 3",
        ),
        ("models: [tiny]\nspecs: [dense]\ndtype: 0x" + "f" * 5000, "beyond 64 bits"),
        ("models: [tiny]\nspecs: ['']", "specs holds '', an empty text; leave the entry out"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_wrong_is_named(write, text, message):
    path = write(text)
    with pytest.raises(SpecError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["specs: [dense]\nkeep: *i", "specs: *i", "specs: [holov]\nkeep: [*i]"])
def test_a_file_that_unfolds_to_gigabytes_is_refused_in_a_line(write, where):
    """Each of nine lists holds the one before it nine times: 387 million texts."""
    names = "abcdefghi"
    rest = [f"&{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise(names)]
    path = write(f"models: [&a [{', '.join('x' * 9)}], {', '.join(rest)}]\n{where}\n")
    with pytest.raises(SpecError) as caught:
        load(path)
    assert len(str(caught.value)) < 1000


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfd")
    for path in (tmp_path / "none.yaml", tmp_path, binary):
        with pytest.raises(SpecError, match="cannot be read"):
            load(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configs_of_the_repository_are_valid(path):
    assert isinstance(load(path), Config)
    assert len(path.read_text().splitlines()) <= 25


def test_the_quick_config_is_there_and_runs_built_in_methods():
    quick = next(path for path in CONFIGS if path.name == "quick.yaml")
    assert {part.name for spec in load(quick).specs for part in spec.parts} <= set(list_methods())


def test_the_published_protocols_are_there():
    plain, tiled = ["192", "128", "64"], ["640", "320", "160"]
    budgets = {"llava-1.5-7b": plain, "llava-1.5-13b": plain, "llava-next-7b": tiled}
    for name, expected in budgets.items():
        config = load(FOLDER / f"{name}.yaml")
        found = dict.fromkeys(budget_of(str(spec)) for spec in config.specs)
        assert [keep for keep in found if "/" not in keep] == expected
        assert len(config.tasks) == 9 and config.published.name == f"{name}.yaml"
    assert len(load(FOLDER / "video-llava-7b.yaml").tasks) == 3


# --- published numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_numbers_have_a_source_and_a_config_that_shows_them(path):
    found = Published.load(path)
    assert found.entries and all(entry.source for entry in found.entries)
    assert any((config := load(one)).published and config.published.name == path.name for one in CONFIGS)


def test_a_number_is_found_only_where_it_can_be_compared(write):
    found = Published.load(write(NUMBERS))
    assert found.find("holov@64", "lmms:gqa") == pytest.approx(0.553)  # the first entry
    assert found.find("holov@64", "lmms:mme") is None and found.find("holov@32", "lmms:gqa") is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("about: three tests", "abuot: x", "expected a mapping with the keys"),
        ("about: three tests", "about: x\ntokens: many", "tokens is 'many'; expected a whole number from 1"),
        ("about: three tests", "about: x\ncrops: 0", "crops is 0; expected a whole number from 1"),
        ("average: 95.8", "ci: {gqa: 3.0}", "the interval of gqa is 3.0; expected two numbers"),
        ("average: 95.8", "ci: {sqa: [1, 2]}", r"\['sqa'\] are no columns"),
        ("average: 95.8", "measured: here", "measured is 'here'; expected a mapping"),
        ("source: a later table, ", "", "expected spec, source, and values or average"),
        ("gqa: 50.0", "gqqa: 50.0", r"\['gqqa'\] are no columns"),
        ("gqa: 50.0", "gqa: high", "has the value 'high'; expected a number as printed"),
        ("source: a later table", "source: [a]", r"has the source \['a'\]; expected text"),
        ("values: {gqa: 50.0}", "values: [50.0]", r"values is \[50.0\]; expected a mapping"),
        ("holov@64, source: a", "holov @ 64, source: a", "is written 'holov@64'"),
        ("holov@64, source: a", "hollow@64, source: a", "Did you mean 'holov'"),
    ],
)
def test_what_is_wrong_with_published_numbers_is_named(write, old, new, message):
    assert old in NUMBERS
    with pytest.raises(SpecError, match=message):
        Published.load(write(NUMBERS.replace(old, new)))
