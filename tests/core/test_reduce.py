# SPDX-License-Identifier: Apache-2.0
"""vlmprune.reduce: on plain tensors the rows that prune leaves in a model, merging methods included."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from vlmprune.api import resolve
from vlmprune.core.method import needs_of
from vlmprune.errors import CaptureError, SpecError, UnsupportedError
from vlmprune.hooks.vision.encode import run_encoder
from vlmprune.hooks.vision.pictures import make_units, stack_units
from vlmprune.models import adapter_for
from vlmprune.testing.tiny import tiny_inputs, tiny_model

TEXT = 5
SPECS = [
    "divprune@9",
    "fastervlm@9",
    "fastervlm@0.25",
    "holov@9",
    "pool@9",
    "prumerge",  # counts by itself
    "uniform@9",
    "visionzip@9",
    "vispruner@9",
    "zooprune@9",
    "dense",
]


def rows_in_model(model, inputs, spec):
    """The visual rows (K, D) that enter the language model for the only picture of the only prompt."""
    seen = []
    first = model.model.language_model.layers[0]
    hook = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad(), vlmprune.prune(model, spec):
            model(**inputs)
    finally:
        hook.remove()
    return seen[0][0, 1 + TEXT : -TEXT]  # (K, D): behind BOS and words, before words


def plain_tensors(model, inputs, spec):
    """What a user would have at hand: captured tensors of the picture, named as in VisualTokens."""
    method, adapter = resolve(spec)[0], adapter_for(model)
    capture = adapter.capture(needs_of(method))
    _, (pictures,) = run_encoder(adapter, adapter.modalities[0], inputs, [capture])
    tokens = stack_units(make_units(pictures, [[0]], "image"), pictures, needs_of(method), adapter.projector)
    whats = {need.what for need in needs_of(method)} - {"features"}
    fields = {what: getattr(tokens, what) for what in whats if getattr(tokens, what) is not None}
    return {"grid": tokens.grids, "features": pictures[0].features[None], **fields}


@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_those_that_prune_leaves_in_a_model(spec):
    model, inputs = tiny_model("llava"), tiny_inputs("llava", text_len=TEXT)
    left = vlmprune.reduce(spec, **plain_tensors(model, inputs, spec))
    expected = rows_in_model(model, inputs, spec)
    assert left.counts.tolist() == [len(expected)] and left.keep_idx.shape == left.rows.shape[:2]
    torch.testing.assert_close(left.rows[0], expected, rtol=1e-5, atol=1e-5)


def test_indices_are_those_of_select_and_rows_are_gathered_by_them():
    features = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(1))
    left = vlmprune.reduce("divprune", keep=5, features=features)
    assert left.keep_idx.equal(vlmprune.select("divprune", keep=5, features=features))
    gathered = [one[index] for one, index in zip(features, left.keep_idx, strict=True)]
    assert left.rows.equal(torch.stack(gathered))


def test_merged_rows_keep_the_order_of_the_method():
    """The average of each half of a 2 x 4 picture, at its centre."""
    features = torch.arange(8.0)[None, :, None]
    left = vlmprune.reduce("pool@2", grid=(2, 4), features=features)
    assert left.rows.flatten().tolist() == [(0 + 1 + 4 + 5) / 4, (2 + 3 + 6 + 7) / 4]
    assert bool((left.keep_idx >= 0).all())


def test_units_that_count_by_themselves_are_filled_up():
    attention = torch.full((2, 36), 1 / 36) + torch.linspace(0, 1e-3, 36)
    attention[0, :3], attention[1, 4] = 0.3, 0.9
    tensors = {
        "wide_attention": attention,
        "wide_keys": torch.randn(2, 36, 4),
        "projector": torch.nn.Identity(),
    }
    encoded = torch.randn(2, 36, 3)
    left = vlmprune.reduce("prumerge", **tensors, encoder_features=encoded, features=encoded)
    few, many = sorted(left.counts.tolist())
    assert 1 <= few < many == left.rows.shape[1]
    short = int(left.counts.argmin())
    assert not left.rows[short, few:].any() and bool((left.keep_idx[short, few:] == -1).all())


def test_dense_rows_are_a_choice_of_all():
    features = torch.randn(2, 4, 3)
    left = vlmprune.reduce("dense", features=features)
    assert left.rows.equal(features) and left.keep_idx.tolist() == [[0, 1, 2, 3]] * 2
    left.keep_idx[0, 0] = 3  # a copy of its own in every row
    assert left.keep_idx[1, 0] == 0


def test_what_cannot_be_reduced_is_refused():
    features = torch.randn(1, 4, 3)
    with pytest.raises(CaptureError, match="features"):
        vlmprune.reduce("fastervlm@2", cls_attention=torch.full((1, 4), 0.25))
    with pytest.raises(UnsupportedError, match="needs a model that runs"):
        vlmprune.reduce("tome@2", features=features)
    with pytest.raises(SpecError, match="reduce got 'feature'"):
        vlmprune.reduce("divprune@2", feature=features)
