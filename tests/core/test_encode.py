# SPDX-License-Identifier: Apache-2.0
"""Encoded images: what was encoded once is what the encoder would return, and a session is served only what
it asked for.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

import vlmprune
from vlmprune.errors import InvariantError
from vlmprune.hooks.attention_tap import AttentionTap, TappedConfig
from vlmprune.hooks.vision.encode import EncodedImages, run_encoder
from vlmprune.hooks.vision.pictures import Picture
from vlmprune.hooks.vision.tiles import Tiles
from vlmprune.models.base import feature_list
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model

SPECS = ("dense", "fastervlm@9", "fastervlm(layer=1)@9", "divprune@9", "zooprune@9")
FAMILIES = ("llava", "llava_next", "vipllava")
VAR = "var(dims=[7,21],tau=2.0,first_layer=1)"


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in all that they hold; functions are not compared."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Picture | Tiles):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return callable(one) or one == other


@pytest.mark.parametrize("family", FAMILIES)
def test_every_session_is_served_what_it_would_have_seen(family: str) -> None:
    model, inputs = tiny_model(family), tiny_inputs(family, images=(1, 2, 0))
    sessions = [vlmprune.prune(model, spec) for spec in SPECS]
    encoder = EncodedImages(sessions)
    images = encoder.encode(inputs)
    assert len(images) == 3
    for session in sessions:
        with session:
            expected, last = generate(model, inputs), session.last
            with encoder.serving(session, images):
                assert torch.equal(generate(model, inputs), expected)
        assert [k.keep_idx.tolist() for k in session.last.keep] == [k.keep_idx.tolist() for k in last.keep]
        _, (alone,) = run_encoder(session.adapter, encoder.modality, inputs, [session.capture])
        for one, picture in zip(images, alone, strict=True):
            assert same(one.seen[session.capture.key], picture)


def test_served_features_come_as_the_encoder_returns_them() -> None:
    for family in FAMILIES:
        model, inputs = tiny_model(family), tiny_inputs(family, images=(2,))
        session = vlmprune.prune(model, "dense")
        encoder = EncodedImages([session])
        images = encoder.encode(inputs)
        names = ("pixel_values", "image_sizes")
        arguments = {name: inputs[name] for name in names if name in inputs}
        session.attach()
        with torch.no_grad():
            usual = model.model.get_image_features(**arguments)
            with encoder.serving(session, images):
                served = model.model.get_image_features(**arguments)
        session.detach()
        assert type(served) is type(usual)
        assert all(torch.equal(a, b) for a, b in zip(feature_list(served), feature_list(usual), strict=True))


def test_captures_that_record_the_same_are_one() -> None:
    model = tiny_model("llava")
    keys = [
        vlmprune.prune(model, spec).capture.key
        for spec in ("dense", "uniform@9", "fastervlm@9", "fastervlm(layer=1)@9")
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_an_encoder_stops_serving_also_after_an_error_and_serves_nothing_else() -> None:
    model, inputs = tiny_model("llava"), tiny_inputs("llava")
    session = vlmprune.prune(model, "fastervlm@9")
    encoder = EncodedImages([session])
    images = encoder.encode(inputs)
    with pytest.raises(ZeroDivisionError), encoder.serving(session, images):
        1 / 0  # noqa: B018
    assert session.serve is None
    with (
        session,
        encoder.serving(session, []),
        pytest.raises(InvariantError, match="0 images were encoded before"),
    ):
        generate(model, inputs)
    with session, encoder.serving(session, images * 2), pytest.raises((ValueError, InvariantError)):
        generate(model, inputs)
    with session:
        assert generate(model, inputs).shape[0] == 1  # and it encodes for itself again


@pytest.mark.parametrize("spec", ["fastervlm@9", "tome@9/crop", "flowcut@9/crop"])
def test_scores_inside_a_block_are_those_outside_and_wait_for_no_forward(spec: str) -> None:
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    alone = vlmprune.score(model, inputs, "fastervlm")[0].scores
    with vlmprune.prune(model, spec):
        assert torch.equal(vlmprune.score(model, inputs, "fastervlm")[0].scores, alone)


def test_a_session_that_is_used_again_knows_nothing_of_a_block_that_failed() -> None:
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    session = vlmprune.prune(model, "fastervlm@9")
    with pytest.raises(KeyError), session:
        model.model.get_image_features(inputs["pixel_values"])
        raise KeyError("another thing went wrong")
    words = model.get_input_embeddings()(inputs["input_ids"][:, -4:])
    with session, torch.no_grad():
        assert model(inputs_embeds=words).logits.shape[1] == 4


@pytest.mark.parametrize("spec", ["fastervlm@9", "visionzip@9", "tome@9/crop", "fastv@9", VAR, "vhr"])
@pytest.mark.parametrize("when", [1, 2])
def test_attaching_that_is_interrupted_leaves_nothing(
    spec: str, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, install = tiny_model("llava"), [0], AttentionTap.install

    def interrupted(tap: AttentionTap) -> None:
        calls[0] += 1
        if calls[0] == when:
            raise KeyboardInterrupt
        install(tap)

    monkeypatch.setattr(AttentionTap, "install", interrupted)
    try:
        vlmprune.attach(model, spec).detach()
    except KeyboardInterrupt:
        assert calls[0] == when
    else:
        assert calls[0] < when
    modules = list(model.modules())
    assert not any(isinstance(getattr(module, "config", None), TappedConfig) for module in modules)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
