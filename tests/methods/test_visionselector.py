# SPDX-License-Identifier: Apache-2.0
"""Trained weights: the scorer against its long form, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_weights import drawn

import vlmprune
from vlmprune.core.tokens import VisualTokens
from vlmprune.core.weights import backbone_of, write_weights
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.methods.textmonkey import SHAPES as BLOCK
from vlmprune.methods.textmonkey import TextMonkey
from vlmprune.methods.visionselector import SHAPES, VisionSelector
from vlmprune.testing.checks_sequence import batch_row_equals_alone, cut_equals_hand_built
from vlmprune.testing.conformance import Subject
from vlmprune.testing.tiny import tiny_inputs, tiny_model


def written(folder: Path, model, method="visionselector", shapes=SHAPES, **facts) -> str:
    backbone = backbone_of(model.config)
    found = drawn(shapes, backbone["hidden_size"])
    write_weights(folder, method, found, {"backbone": backbone, **facts})
    return str(folder)


def test_a_score_is_the_mean_of_products_with_all_tokens(tmp_path: Path) -> None:
    model = tiny_model()
    method = VisionSelector(written(tmp_path, model))
    w = drawn(SHAPES, 64)
    x = torch.randn(2, 9, 64)
    q, k = (x @ w[f"{name}_proj.weight"].T + w[f"{name}_proj.bias"] for name in "qk")
    wanted = (q @ k.transpose(1, 2) / 16**0.5).mean(dim=2)
    torch.testing.assert_close(method.score(VisualTokens(features=x)), wanted, rtol=1e-4, atol=1e-4)
    assert vlmprune.select(method, keep=3, features=x).tolist() == [
        row.topk(3).indices.sort().values.tolist() for row in wanted
    ]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_model_keeps_what_the_scorer_ranks_highest(tmp_path: Path, family: str) -> None:
    folder = written(tmp_path, tiny_model(family))
    subject = Subject(f"visionselector(weights={folder!r})@9", family)
    cut_equals_hand_built(subject)
    batch_row_equals_alone(subject)


def test_the_block_of_textmonkey_makes_rows_of_the_tokens_that_its_filter_keeps(tmp_path: Path) -> None:
    folder = written(tmp_path, tiny_model(), "textmonkey", BLOCK, heads=4)
    subject = Subject(f"textmonkey(weights={folder!r})@9", "llava")
    assert subject.makes_rows
    cut_equals_hand_built(subject)
    x = torch.randn(1, 36, 64)
    method, alone = TextMonkey(weights=folder), TextMonkey()
    merged = method.merge(VisualTokens(features=x), 9)
    kept = vlmprune.select(alone, keep=9, features=x)
    assert torch.equal(merged.slots, kept)
    assert not torch.allclose(merged.features, x[0, kept], atol=1e-2)


def test_an_untrained_block_is_the_filter(tmp_path: Path) -> None:
    found = drawn(BLOCK, 64)
    found["mlp_out.weight"].zero_()
    write_weights(tmp_path, "textmonkey", found, {"backbone": backbone_of(tiny_model().config), "heads": 2})
    x = torch.randn(1, 36, 64)
    merged = TextMonkey(weights=str(tmp_path)).merge(VisualTokens(features=x), 9)
    assert torch.equal(merged.features[0], x[0, merged.slots[0]])


def test_without_weights_the_error_says_how_to_train() -> None:
    with pytest.raises(UnsupportedError, match="vlmprune train visionselector --model"):
        vlmprune.prune(tiny_model(), "visionselector@9")


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    for method, shapes, facts in (("visionselector", SHAPES, {}), ("textmonkey", BLOCK, {"heads": 2})):
        folder = written(tmp_path / method, tiny_model(layers=4), method, shapes, **facts)
        with pytest.raises(UnsupportedError, match="this model is"):
            vlmprune.prune(tiny_model(layers=5), f"{method}(weights={folder!r})@9")


def spoil(folder: Path, what: str) -> None:
    facts = json.loads((folder / "visionselector.json").read_text())
    found = drawn(SHAPES, 64)
    if what == "no json":
        (folder / "visionselector.json").unlink()
    elif what == "no tensors":
        (folder / "visionselector.safetensors").unlink()
    elif what == "not safetensors":
        (folder / "visionselector.safetensors").write_bytes(b"pickle")
    elif what == "of another method":
        (folder / "visionselector.json").write_text(json.dumps({**facts, "method": "rcp"}))
    elif what == "changed":
        (folder / "visionselector.json").write_text(json.dumps({**facts, "sha256": "0"}))
    else:
        if what == "missing":
            del found["q_proj.bias"]
        if what == "extra":
            found["code"] = torch.zeros(1)
        if what == "shape":
            found["k_proj.bias"] = torch.zeros(17)
        if what == "width":
            found = drawn(SHAPES, 32)
        if what == "nan":
            found["q_proj.bias"][0] = torch.nan
        write_weights(folder, "visionselector", found, {"backbone": facts["backbone"]})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no json", "cannot be read"),
        ("no tensors", "cannot be read"),
        ("not safetensors", "expected safetensors"),
        ("of another method", "says format, version and method"),
        ("changed", "SHA-256 differs"),
        ("missing", r"lack \['q_proj.bias'\]"),
        ("extra", r"have \['code'\]"),
        ("shape", "k_proj.bias has shape"),
        ("width", "backbone is 64 wide"),
        ("nan", "not finite"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, what: str, message: str) -> None:
    folder = written(tmp_path, tiny_model())
    spoil(tmp_path, what)
    with pytest.raises(SpecError, match=message):
        VisionSelector(folder)


def test_heads_of_a_block_divide_its_width(tmp_path: Path) -> None:
    for heads in (None, 3, 0, "2"):
        folder = written(tmp_path, tiny_model(), "textmonkey", BLOCK, heads=heads)
        with pytest.raises(SpecError, match="expected heads that divide"):
            TextMonkey(weights=folder)


def test_names_of_the_official_files_are_understood(tmp_path: Path) -> None:
    found = {f"visual.importance_scorer.{name}": value for name, value in drawn(SHAPES, 64).items()}
    write_weights(tmp_path, "visionselector", found, {"backbone": backbone_of(tiny_model().config)})
    with vlmprune.prune(tiny_model(), f"visionselector(weights={str(tmp_path)!r})@9") as run, torch.no_grad():
        run.adapter.model(**tiny_inputs())
    assert run.last.realised_tokens == [9]
