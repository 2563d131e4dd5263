# SPDX-License-Identifier: Apache-2.0
"""Weights that come with the package: small, of the bundled model alone, and what recipe and card say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import vlmprune
from vlmprune.core.weights import SHIPPED, SHIPPED_FOR, backbone_of, checked_facts, folder_of
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.evaluation.tasks.shapes import shapes
from vlmprune.training.run import TRAINED

ROOT = Path(__file__).parents[2]
RECIPE = yaml.safe_load((ROOT / "benchmarks" / "trained" / "recipe.yaml").read_text())
FOLDER = SHIPPED / "tiny"
METHODS = sorted(path.stem for path in FOLDER.glob("*.json"))
MiB = 1024 * 1024


@pytest.fixture(scope="module")
def tiny():
    return vlmprune.load("tiny")


def spec_of(method: str) -> str:
    return f"{method}(weights=tiny)" + ("" if method == "dyvte" else "@0.5")


def test_every_file_belongs_to_a_pair_and_is_small() -> None:
    assert [path.name for path in SHIPPED.iterdir()] == [*SHIPPED_FOR] and METHODS
    files = {f"{method}.{ending}" for method in METHODS for ending in ("json", "safetensors")}
    assert {path.name for path in FOLDER.iterdir()} == files | {"card.md"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 2 * MiB


def test_every_method_that_can_be_trained_has_weights() -> None:
    assert {*METHODS} == {*TRAINED} == {*RECIPE}


@pytest.mark.parametrize("method", METHODS)
def test_they_are_what_the_recipe_makes(method, tiny) -> None:
    facts, made = checked_facts("tiny", method), RECIPE[method]
    assert facts["backbone"] == backbone_of(tiny[0].config)
    data = facts["data"]
    assert data == {"source": "shapes", "fingerprint": shapes().fingerprint, "samples": made["samples"]}
    for name, value in made["pace"].items():
        assert facts["settings"][name] == value, name
    assert facts["dev"]["questions"] == made["dev"] and facts["dev"]["keep"] == made.get("keep")
    with safe_open(FOLDER / f"{method}.safetensors", "pt") as held:
        kinds = {held.get_tensor(name).dtype for name in held.keys()}  # noqa: SIM118
    assert kinds == {torch.float16 if made.get("half") else torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_the_card_says_what_was_measured(method) -> None:
    found, card = checked_facts("tiny", method)["dev"], (FOLDER / "card.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith(f"| `{method}` |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:3] == [f"{100 * found[name]:.1f}" for name in ("before", "after")]
    others = {
        name: score for name, score in found.items() if name not in ("questions", "keep", "before", "after")
    }
    assert cells[3] == ", ".join(f"{name} {100 * score:.1f}" for name, score in others.items())


@pytest.mark.parametrize("method", METHODS)
def test_they_prune_the_bundled_model_and_no_other(method, tiny) -> None:
    picture, question, _ = vlmprune.example()
    inputs = vlmprune.encode(*tiny, picture, question)
    with torch.no_grad(), vlmprune.prune(tiny[0], spec_of(method)) as done:
        tiny[0].generate(**inputs, max_new_tokens=2)
    tokens = done.last.tokens_per_layer
    assert tokens is None or min(tokens) < 144
    if method in ("visionselector", "textmonkey"):
        assert done.last.realised_tokens == [72]
    with pytest.raises(UnsupportedError, match="this model is"):
        vlmprune.prune(vlmprune.load("natural")[0], spec_of(method))


@pytest.mark.parametrize("method", METHODS)
def test_they_prune_a_model_in_half_precision(method) -> None:
    model, processor = vlmprune.load("tiny")
    inputs = vlmprune.encode(model.to(torch.bfloat16), processor, *vlmprune.example()[:2])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad(), vlmprune.prune(model, spec_of(method)) as done:
        model.generate(**inputs, max_new_tokens=2)
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16 and bool(logits.isfinite().all())
    if method != "dyvte":  # its gates may let the tokens of one prompt stay
        assert min(done.last.tokens_per_layer) < 144


def test_pruners_of_rcp_say_themselves_how_many_stay(tiny) -> None:
    picture, question, _ = vlmprune.example()
    with torch.no_grad(), vlmprune.prune(tiny[0], "rcp(weights=tiny)") as done:
        tiny[0](**vlmprune.encode(*tiny, picture, question))
    read, cuts = done.last.tokens_per_layer, checked_facts("tiny", "rcp")["layers"]
    assert read[: cuts[0]] == [144] * cuts[0] and 0 < read[-1] < 72
    assert sorted(read, reverse=True) == read


def test_a_folder_of_ones_own_has_a_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert folder_of("tiny") == FOLDER and folder_of("./tiny") == Path("tiny")
    with pytest.raises(SpecError, match=r"'\./tiny' cannot be read"):
        vlmprune.prune(vlmprune.load("tiny")[0], "visionselector(weights='./tiny')@36")


def test_other_weights_make_other_cells(tmp_path) -> None:
    from vlmprune.evaluation.leaderboard.identity import trained

    method = METHODS[0]
    first = trained(spec_of(method))
    assert first == {"trained": {method: json.loads((FOLDER / f"{method}.json").read_text())["sha256"]}}
    assert trained("fastervlm@0.5") == trained("debias+fastervlm@0.5") == {}
