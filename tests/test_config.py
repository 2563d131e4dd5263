# SPDX-License-Identifier: Apache-2.0
"""Configs: every key is checked, and those of the repository are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmprune.config import Config, load
from vlmprune.errors import SpecError
from vlmprune.registry import list_methods

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
WHOLE = """
models: [tiny, llava-hf/llava-1.5-7b-hf]
specs: [dense, fastervlm@64, "random(seed=3)@0.25/crop"]
tasks: [gqa]
seeds: [0, 7]
out: runs/first
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_every_key_arrives(write):
    config = load(write(WHOLE))
    assert config.models == ("tiny", "llava-hf/llava-1.5-7b-hf")
    assert [str(spec) for spec in config.specs] == ["dense", "fastervlm@64", "random(seed=3)@0.25/crop"]
    assert (config.tasks, config.seeds, config.out) == (("gqa",), (0, 7), "runs/first")


def test_what_may_be_left_out_has_a_default(write):
    config = load(write("models: [tiny]\nspecs: [dense]\n"))
    assert (config.tasks, config.seeds, config.out) == ((), (0,), None)


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
        ("models: [tiny]\nmodels: [other]\nspecs: [dense]", "a key is given twice"),
        ("models: [tiny\nspecs: [dense]", "not readable as YAML"),
        ("models: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_what_is_wrong_is_named(write, text, message):
    path = write(text)
    with pytest.raises(SpecError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


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
