# SPDX-License-Identifier: Apache-2.0
"""Captured quantities against an eager twin that returns its attention maps, and their order against
perturbed patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.core.method import OF_TOWER, Method, Need
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, UnsupportedError
from vlmprune.hooks.vision.capture import VisionCapture, find_blocks
from vlmprune.testing.conformance import shared_model
from vlmprune.testing.reference import merged_embeddings, placeholder_columns
from vlmprune.testing.tiny import tiny_inputs, tiny_model

NEEDS = ("cls_attention", "received_attention", "keys", "cls_features")


@dataclass(frozen=True)
class KeyNorm(Method):
    """Scores a token by the length of its attention key."""

    needs: ClassVar[tuple[str, ...]] = ("keys",)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.need("keys").norm(dim=-1)


def twin(tower: str) -> Any:
    model = tiny_model("llava", tower)
    model.set_attn_implementation("eager")
    return model.model.vision_tower


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 84, 84, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def captured(
    tower: str, needs: tuple[str, ...], layer: int | None = None, layers: tuple[int, ...] = (-2,)
) -> dict[str, Tensor]:
    module = shared_model("llava", tower, None).model.vision_tower
    asked = [Need(what, layer) if what in OF_TOWER else Need(what) for what in needs]
    with VisionCapture(module, asked, layers) as record:
        module(pixels())
    return {need.what: value for need, value in record.take().items()}


@torch.no_grad()
def attentions(tower: str) -> tuple[Tensor, ...]:
    """Per block (T, H, S, S)."""
    return twin(tower)(pixels(), output_attentions=True).attentions


@pytest.mark.parametrize("layer", [None, -1, -2, 1, 4])
def test_cls_attention_is_the_cls_row_of_an_eager_twin(layer: int | None) -> None:
    block = {None: 2, -1: 3, -2: 2, 1: 0, 4: 3}[layer]
    want = attentions("clip")[block][:, :, 0, 1:]
    got = captured("clip", ("cls_attention",), layer)["cls_attention"]
    assert got.shape == (2, 4, 36) and got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("tower", "first"), [("siglip", 0), ("clip", 1)])
def test_received_attention_is_the_column_mean_of_an_eager_twin(tower: str, first: int) -> None:
    want = attentions(tower)[2].mean(dim=(1, 2))[:, first:]  # [CLS] asks too, but is not scored
    got = captured(tower, ("received_attention",))["received_attention"]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_keys_are_the_projected_keys_averaged_over_heads() -> None:
    module = shared_model("llava", "clip", None).model.vision_tower
    hidden = module(pixels(), output_hidden_states=True).hidden_states[2]  # what block 2 takes
    block = find_blocks(module)[2]
    want = block.self_attn.k_proj(block.layer_norm1(hidden)).view(2, 37, 4, 8).mean(2)[:, 1:]
    torch.testing.assert_close(captured("clip", ("keys",))["keys"], want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_cls_features_are_the_cls_rows_of_the_feature_layers_side_by_side() -> None:
    states = (
        shared_model("llava", "clip", None)
        .model.vision_tower(pixels(), output_hidden_states=True)
        .hidden_states
    )
    got = captured("clip", ("cls_features",), layers=(-2, 1, -2))["cls_features"]
    torch.testing.assert_close(
        got, torch.cat([states[i][:, :1] for i in (-2, 1, -2)], dim=-1), rtol=0, atol=0
    )


def test_capturing_changes_no_output_and_leaves_no_hook() -> None:
    module = shared_model("llava", "clip", None).model.vision_tower
    with torch.no_grad():
        want = module(pixels()).last_hidden_state
        hooks = [len(m._forward_hooks) for m in module.modules()]
        with VisionCapture(module, NEEDS, (-2,)):
            assert torch.equal(module(pixels()).last_hidden_state, want)
    assert [len(m._forward_hooks) for m in module.modules()] == hooks


def test_a_tower_that_did_not_run_is_an_error() -> None:
    module = shared_model("llava", "clip", None).model.vision_tower
    with VisionCapture(module, NEEDS, (-2,)) as record:
        pass
    with pytest.raises(CaptureError, match="cls_attention"):
        record.take()


def test_installing_twice_is_refused() -> None:
    capture = VisionCapture(shared_model("llava", "clip", None).model.vision_tower, NEEDS, (-2,))
    capture.install()
    try:
        with pytest.raises(CaptureError, match="installed already"):
            capture.install()
    finally:
        capture.remove()
        capture.remove()


def test_layers_outside_the_tower_and_missing_cls_are_refused() -> None:
    module = shared_model("llava", "clip", None).model.vision_tower
    for layer in (0, 5, -5):
        with pytest.raises(UnsupportedError, match=r"layers -4..-1 and 1..4"):
            VisionCapture(module, [Need("keys", layer)], (-2,))
    with pytest.raises(UnsupportedError, match="cls='mean'"):
        VisionCapture(shared_model("llava", "siglip", None).model.vision_tower, ("cls_attention",), (-2,))
    with pytest.raises(UnsupportedError, match="no attention blocks"):
        VisionCapture(torch.nn.Linear(2, 2), NEEDS, (-2,))


def test_a_block_without_attention_is_named() -> None:
    block = find_blocks(shared_model("llava", "clip", None).model.vision_tower)[0]
    tower = torch.nn.Sequential(block, torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="a Linear of this vision tower has no attention"):
        VisionCapture(tower, [Need("keys", 2)], (1,))


@torch.no_grad()
def columns_fed_by(model: Any, inputs: dict[str, Tensor], crop: int, patch: int) -> set[int]:
    """Columns of the dense merged embeddings that change when one patch of one crop changes before the
    projector.
    """

    def shift(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        rows = args[0].clone()
        rows[crop, rows.shape[1] - 36 + patch] += 1
        return (rows,)

    before = merged_embeddings(model, inputs)
    handle = model.model.multi_modal_projector.register_forward_pre_hook(shift)
    try:
        after = merged_embeddings(model, inputs)
    finally:
        handle.remove()
    return set((before != after).any(-1)[0].nonzero()[:, 0].tolist())


def scores_with_long_key(model: Any, inputs: dict[str, Tensor], crop: int, patch: int) -> Tensor:
    """Scores of all images and frames when the key of one patch of one crop is made very long."""

    def lengthen(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[crop, output.shape[1] - 36 + patch] += 1000
        return output

    # hidden_states[-2] is the output of the last but one block: the same index
    block = find_blocks(model.model.vision_tower)[model.config.vision_feature_layer]
    handle = block.self_attn.k_proj.register_forward_hook(lengthen)
    try:
        return torch.cat([one.scores for one in vlmprune.score(model, inputs, KeyNorm())])
    finally:
        handle.remove()


# (family, tower, images, crops of the tower); llava_onevision sees one crop of each of several images
ORDERS = [
    ("llava", "clip", 1, 1),
    ("llava", "siglip", 2, 2),
    ("llava_next", "clip", 1, 5),
    ("llava_next", "siglip", 2, 10),
    ("llava_onevision", "siglip", 1, 7),
    ("llava_onevision", "clip", 2, 2),
]


@pytest.mark.parametrize(("family", "tower", "images", "crops"), ORDERS)
def test_every_score_belongs_to_the_embedding_of_its_own_patch(
    family: str, tower: str, images: int, crops: int
) -> None:
    """Long key in, highest score out at the index whose column that very patch feeds; patches cropped away
    have no score.
    """
    model = shared_model(family, tower, None)
    inputs = tiny_inputs(family, images=(images,))
    columns = placeholder_columns(model, inputs["input_ids"], merged_embeddings(model, inputs))[0]
    found = 0
    for crop in {0, crops // 2, crops - 1}:
        for patch in (0, 8, 17, 22, 35):
            fed = columns_fed_by(model, inputs, crop, patch)
            scores = scores_with_long_key(model, inputs, crop, patch)
            assert len(scores) == len(columns)
            found += bool(fed)
            best = columns[int(scores.argmax())]
            assert best in fed if fed else scores.max() < 100, (
                f"crop {crop} patch {patch}: column {best}, fed {fed}"
            )
    assert found >= 5
    with pytest.raises(IndexError):
        columns_fed_by(model, inputs, crops, 0)  # the number of crops above is right


def test_scores_of_video_frames_belong_to_their_own_frames() -> None:
    model = shared_model("llava_onevision", None, None)
    inputs = tiny_inputs("llava_onevision", images=(0,), video=True)
    columns = placeholder_columns(model, inputs["input_ids"], merged_embeddings(model, inputs))[0]
    for frame, patch in [(0, 0), (1, 16), (2, 35)]:
        index = int(scores_with_long_key(model, inputs, frame, patch).argmax())
        assert index // 9 == frame and columns[index] in columns_fed_by(model, inputs, frame, patch)
