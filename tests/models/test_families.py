# SPDX-License-Identifier: Apache-2.0
"""Families that merge patches, read clips or see pictures of any size: which patch is in which token, and
what is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar

import pytest
import torch
from available import available
from later_families import param
from torch import Tensor, nn

import vlmprune
from vlmprune.core.method import Method, Need, What
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, InvariantError, UnsupportedError
from vlmprune.hooks.sequence.cache import cache_name
from vlmprune.hooks.vision.tower import find_blocks
from vlmprune.models import adapter_for
from vlmprune.speed.memory import memory_profile
from vlmprune.testing.conformance import generate, shared_model
from vlmprune.testing.families import layout_of
from vlmprune.testing.families.layouts import FRAMES
from vlmprune.testing.reference import by_row, dense_rows, greedy, kept_by_hand, logits_of
from vlmprune.testing.tiny import tiny_inputs, tiny_model

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LATE = ("glm4v", "mistral3", "lighton_ocr", "cohere2_vision", "aya_vision", "lfm2_vl", "ovis2", "qwen3_5")
NEW = ("gemma4", "paddleocr_vl", "kimi_k25", "ernie4_5_vl_moe", "cosmos3_edge", "exaone4_5", "qianfan_ocr")
NEW += ("hyperclovax_vision_v2", "qwen2_5_omni_thinker")
MERGING = ("internvl", *QWEN, "idefics3", "smolvlm", "gemma3", *LATE, *NEW)
TYPED = ("paligemma", "gemma3")
WITH_CLIPS = {
    "llava_next_video": 9,
    "video_llava": 36,
    "qwen2_vl": 36,
    "qwen2_5_vl": 36,
    "qwen3_vl": 36,
}  # tokens per frame


# --- which patch stands behind which token --------------------------------------------------------


@dataclass(frozen=True)
class FirstKeys(Method):
    """Scores a token by its attention keys in the first block of the tower, which depend on its own patches
    only.
    """

    needs: ClassVar[tuple[Need | What, ...]] = (Need("keys", 1), "features")

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.cat([tokens.need("keys"), tokens.need("features")], dim=-1).norm(dim=-1)


@torch.no_grad()
def blind(family: str) -> Any:
    """A model whose tower mixes nothing, so that features too depend on a token's own patches only."""
    model = tiny_model(family)
    blocks = find_blocks(adapter_for(model).vision_tower)
    for name, module in blocks.named_modules():
        asks = ("q_proj", "k_proj", "qkv", ".q", ".k")
        first = name.startswith("0.") and name.removesuffix(".linear").endswith(asks)
        if isinstance(module, nn.Linear) and not first:
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    return model


def what_was_captured(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Per picture (N, width) keys beside features."""
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Look(FirstKeys):
        def score(self, tokens: VisualTokens) -> Tensor:
            seen.append(torch.cat([tokens.need("keys"), tokens.need("features")], dim=-1)[0])
            return super().score(tokens)

    vlmprune.score(model, inputs, Look())
    return seen


def with_other_patch(inputs: dict[str, Tensor], patch: int) -> dict[str, Tensor]:
    pixels = inputs["pixel_values"].clone()
    if pixels.ndim < 4 or "image_grid_thw" in inputs:
        (pixels.flatten(0, -2) if pixels.ndim < 4 else pixels)[patch] += 1
    else:
        side = int(inputs["image_sizes"][0, 1] if "image_sizes" in inputs else pixels.shape[-1]) // 14
        row, col = patch // side * 14, patch % side * 14
        pixels.flatten(0, -4)[0, :, row : row + 14, col : col + 14] += 1
    return {**inputs, "pixel_values": pixels}


@pytest.mark.parametrize("family", [param("lands", family, one_in=3) for family in MERGING])
def test_what_is_captured_lands_on_the_token_that_its_patch_becomes(family: str) -> None:
    available(family)
    model, inputs = blind(family), tiny_inputs(family, images=(1, 1))
    plain, width = what_was_captured(model, inputs), 32 // 4
    for patch in (0, 1, 17, 77, 143):
        changed = [
            (a != b)
            for a, b in zip(plain, what_was_captured(model, with_other_patch(inputs, patch)), strict=True)
        ]
        by_keys, by_features = (
            [one[:, part].any(dim=1) for one in changed] for part in (slice(0, width), slice(width, None))
        )
        assert sum(int(one.sum()) for one in by_features) == 1, f"patch {patch} is in one token"
        assert all(torch.equal(a, b) for a, b in zip(by_keys, by_features, strict=True)), f"patch {patch}"


@pytest.mark.parametrize(
    "family",
    [param("projector", family, one_in=2) for family in (*MERGING, "llava", "llava_next", "paligemma")],
)
def test_the_projector_makes_the_features_of_what_it_is_said_to_read(family: str) -> None:
    """Methods run it on rows of their own: on its own rows it has to give what the model reads."""
    model, inputs = available(family), tiny_inputs(family, images=(1, 2))
    checked = 0

    @dataclass(frozen=True)
    class Look(Method):
        needs: ClassVar[tuple[Need | What, ...]] = ("encoder_features", "features", "projector")

        def score(self, tokens: VisualTokens) -> Tensor:
            nonlocal checked
            projector, features = tokens.need("projector"), tokens.need("features")
            made = projector(tokens.need("encoder_features")).reshape(features.shape)
            torch.testing.assert_close(made, features, atol=1e-5, rtol=1e-4)
            checked += 1
            return features.norm(dim=-1)

    vlmprune.score(model, inputs, Look())
    assert checked == 3


@pytest.mark.parametrize("family", ["glm4v", "kimi_k25", "ernie4_5_vl_moe"])
def test_clips_that_are_read_in_another_way_are_refused(family: str) -> None:
    model, inputs = available(family), tiny_inputs(family)
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    with (
        pytest.raises(UnsupportedError, match="give the frames as images"),
        vlmprune.prune(model, "random@9"),
    ):
        model.model.get_video_features(pixels, video_grid_thw=grid)


@pytest.mark.parametrize("family", QWEN)
def test_received_attention_of_a_packed_tower_is_that_of_every_picture_alone(family: str) -> None:
    model, inputs = available(family), tiny_inputs(family, images=(2, 1), video=True)
    adapter = adapter_for(model)
    scores = vlmprune.score(model, inputs, "fastervlm(cls=mean)")
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = inputs[f"{kind}_grid_thw"].tolist()
        want = slow_received(adapter, inputs[pixels], inputs[f"{kind}_grid_thw"])
        found = [one.scores for one in scores if (one.frame is None) == (kind == "image")]
        assert len(found) == sum(frames for frames, _, _ in grids)
        torch.testing.assert_close(torch.cat(found), want, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def slow_received(adapter: Any, pixels: Tensor, grid: Tensor) -> Tensor:
    """(tokens,) mean attention that the last block pays to each token's patches, one softmaxed map per
    frame."""
    tower = adapter.vision_tower
    block, seen = tower.blocks[-1].attn, []
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    merged = []
    see = tower.merger.register_forward_hook(lambda module, args, output: merged.append(output))
    try:
        final = tower(pixels, grid_thw=grid).pooler_output
    finally:
        hook.remove()
        see.remove()
    args, kwargs = seen[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    cos, sin = kwargs["position_embeddings"]
    heads = block.num_heads
    q, k, _ = block.qkv(hidden).unflatten(-1, (3, heads, -1)).unbind(1)  # (S, H, d)
    rotated = [
        x * cos[:, None] + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin[:, None]
        for x in (q, k)
    ]
    lengths = [rows * cols for frames, rows, cols in grid.tolist() for _ in range(frames)]
    received = []
    for q, k in zip(*(x.split(lengths) for x in rotated), strict=True):
        maps = torch.einsum("qhd,khd->hqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        received.append(maps.mean(dim=(0, 1)))
    in_tower = torch.cat(received).unflatten(0, (-1, 4)).mean(1)
    # the order of the tower's tokens, found by looking where each of its merged rows went
    order = (final[:, None] == merged[0][None]).all(-1).float().argmax(dim=1)
    return in_tower[order]


# --- clips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "clip"), [("random@4/crop", 4 * FRAMES), ("fastervlm(cls=mean)@7", 7)])
@pytest.mark.parametrize("family", WITH_CLIPS)
def test_clips_beside_images_equal_hand_built(family: str, spec: str, clip: int) -> None:
    model, images = available(family), (1, 0)
    inputs, positions = tiny_inputs(family, images=images, video=True), adapter_for(model).positions[-1]
    with vlmprune.prune(model, spec, positions=positions) as run:
        ids = generate(model, inputs, max_new_tokens=3)
    assert run.last.dense_tokens[1:] == [FRAMES * WITH_CLIPS[family]] * 2
    assert run.last.realised_tokens[1:] == [clip] * 2
    for row, kept in enumerate(kept_by_hand(model, inputs, by_row(run.last.keep, images, FRAMES), positions)):
        assert ids[row].tolist() == greedy(model, kept, 3), f"row {row}"


@pytest.mark.parametrize("family", WITH_CLIPS)
def test_a_budget_over_the_whole_prompt_is_shared_by_frames_and_images(family: str) -> None:
    model, inputs = available(family), tiny_inputs(family, images=(1,), video=True)
    with vlmprune.prune(model, "random@20/total") as run, torch.no_grad():
        model(**inputs)
    assert sum(run.last.realised_tokens) == 20 == sum(map(len, run.last.keep))
    frames = [one for one in run.last.keep if one.frame is not None]
    assert [one.total for one in frames] == [WITH_CLIPS[family]] * FRAMES


def peak_bytes(family: str, frames: int) -> int:
    """Of a forward that keeps 64 tokens of a clip; weights and pixels not counted."""
    model, inputs = available(family), tiny_inputs(family, images=(0,), video=True, frames=frames)
    with vlmprune.prune(model, "fastervlm(cls=mean)@64") as run:
        peak = max(memory_profile(lambda: model(**inputs), model))
    assert run.last.realised_tokens == [64] and run.last.dense_tokens == [frames * WITH_CLIPS[family]]
    return peak


@pytest.mark.parametrize("family", ["llava_next_video", "qwen2_vl"])
def test_memory_grows_linearly_in_frames(family: str) -> None:
    peaks = {frames: peak_bytes(family, frames) for frames in (8, 16, 32)}
    assert peaks[32] - peaks[16] < 1.2 * 2 * (peaks[16] - peaks[8]), peaks
    assert peaks[32] < 4e9


# --- 2-D positions, and features added after layers -----------------------------------------------


@pytest.mark.parametrize("family", QWEN)
def test_two_dimensional_positions_stay(family: str) -> None:
    model, inputs = available(family), tiny_inputs(family, images=(1,))
    with pytest.raises(UnsupportedError, match="positions='original'"):
        vlmprune.attach(model, "uniform@9", positions="compact")
    dense, seen = dense_rows(model, inputs)[0], []
    layer = adapter_for(model).language_model
    with vlmprune.prune(model, "uniform@9") as run, torch.no_grad():
        hook = layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    columns = [
        *range(first),
        *(first + run.last.keep[0].keep_idx).tolist(),
        *range(first + 36, inputs["input_ids"].shape[1]),
    ]
    assert torch.equal(seen[0]["position_ids"], dense.positions[..., columns])


def test_stacked_features_matter() -> None:
    """The references of the other checks would not notice their loss if they were too small to change an
    answer.
    """
    model, inputs = available("qwen3_vl"), tiny_inputs("qwen3_vl", images=(1,))
    kept = dense_rows(model, inputs)[0]
    without = type(kept)(kept.embeds, kept.positions)
    assert len(kept.stacked) == 3 and greedy(model, kept, 6) != greedy(model, without, 6)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_cut_between_stacked_layers_equals_its_twin(layer: int) -> None:
    from vlmprune.testing.checks_inside import cut_equals_twin
    from vlmprune.testing.conformance import Subject

    available("qwen3_vl")
    cut_equals_twin(Subject(f"fastv(layer={layer})@9", "qwen3_vl"))


# --- tokens that attend both ways -----------------------------------------------------------------


@pytest.mark.parametrize("family", TYPED)
def test_attending_both_ways_matters(family: str) -> None:
    """The references of the other checks would not notice a causal mask if it hardly changed the logits."""
    model, inputs = available(family), tiny_inputs(family, images=(1,))
    kept = dense_rows(model, inputs)[0]
    causal = replace(kept, blocks=torch.full_like(kept.blocks, -1))
    assert (logits_of(model, kept)[-1] - logits_of(model, causal)[-1]).abs().max() > 0.1


@pytest.mark.parametrize("text", ["gemma", "gemma2"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_an_answer_behind_the_prompt_stays_causal(text: str, positions: str) -> None:
    """As in training: PaliGemma's prompt attends both ways, the answer behind it to what comes before it."""
    available("paligemma")
    model, inputs = shared_model("paligemma", None, text), tiny_inputs("paligemma", images=(1,), text_len=6)
    inputs["token_type_ids"][0, -6:] = 1
    with vlmprune.prune(model, "uniform@9", positions=positions) as run, torch.no_grad():
        logits = model(**inputs).logits[0, -7:]
    (kept,) = kept_by_hand(model, inputs, run.last.keep, positions)
    assert kept.blocks.tolist() == [0] * (kept.embeds.shape[1] - 6) + [-1] * 6
    torch.testing.assert_close(logits, logits_of(model, kept)[-7:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["gemma3", "gemma3_sliding"])
def test_the_window_bounds_what_an_image_sees_of_itself(text: str) -> None:
    """With a window of 8 a kept token sees later ones of its image, and earlier ones that are near."""
    available("gemma3")
    model, inputs = shared_model("gemma3", None, text), tiny_inputs("gemma3", images=(2,), text_len=3)
    with vlmprune.prune(model, "uniform@12", positions="original") as run, torch.no_grad():
        logits = model(**inputs).logits[0, -3:]
    (kept,) = kept_by_hand(model, inputs, run.last.keep, "original")
    assert kept.blocks[kept.blocks >= 0].tolist() == [0] * 12 + [1] * 12
    torch.testing.assert_close(logits, logits_of(model, kept)[-3:], atol=1e-4, rtol=1e-4)


def test_types_that_are_too_few_are_refused() -> None:
    """They would be read as those of other tokens."""
    model, inputs = available("gemma3"), tiny_inputs("gemma3")
    inputs["token_type_ids"] = inputs["token_type_ids"][:, 3:]
    wanted = pytest.raises(InvariantError, match=r"token_type_ids has shape \(1, 44\).*each of 47")
    with wanted, vlmprune.prune(model, "uniform@9"), torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("family", TYPED)
def test_a_cache_cut_in_one_turn_takes_an_image_in_the_next(family: str) -> None:
    """The first image's tokens are held, the second one's attend both ways among themselves only."""
    model, first = available(family), tiny_inputs(family, images=(1,), seed=1)
    second = tiny_inputs(family, images=(1,), seed=2)
    with vlmprune.prune(model, "uniform@9", positions="original") as run, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        maps = run.last.keep
        given = {
            **second,
            "attention_mask": torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1]),
        }
        logits = model(**given, **{cache_name(signature(model.forward).parameters): cache}).logits[0, -1]
        maps = [*maps, *run.last.keep]
    both = {
        name: torch.cat([first[name], second[name]], dim=0 if name == "pixel_values" else 1) for name in first
    }
    (kept,) = kept_by_hand(model, both, maps, "original")
    late = kept.positions[0] - kept.positions[0, 0] >= first["input_ids"].shape[1]
    # the second prompt is a block of its own, the first does not see it
    blocks = (
        torch.where(late & (kept.blocks >= 0), kept.blocks + 1, kept.blocks)
        if family == "paligemma"
        else kept.blocks
    )
    assert len(maps) == 2 and 0 < int(late.sum()) < len(late)
    torch.testing.assert_close(
        logits, logits_of(model, replace(kept, blocks=blocks))[-1], atol=1e-4, rtol=1e-4
    )


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "spec", "hint"),
    [
        ("internvl", "visionzip@9", "visionzip(cls='mean')"),
        ("qwen2_vl", "fastervlm@9", "cls='mean'"),
        ("qwen2_5_vl", "fastervlm(cls=mean,layer=-2)@9", "layer=[-3, -1]"),
        ("smolvlm", "fastervlm@9", "cls='mean'"),
        ("paligemma", "fastervlm@9", "cls='mean'"),
    ],
)
def test_what_a_tower_cannot_give_is_refused_when_attached(family: str, spec: str, hint: str) -> None:
    model = available(family)
    with pytest.raises(UnsupportedError, match=re.escape(hint)):
        vlmprune.attach(model, spec)
    assert not any("vlmprune" in type(value).__module__ for value in model.model.__dict__.values())


@pytest.mark.parametrize(
    ("family", "spec", "hint"),
    [
        ("qwen2_vl", "zooprune@9", "estimator='zo'"),
        ("idefics3", "zooprune@9", "estimator='zo'"),
        ("gemma3", "zooprune@9", "estimator='zo'"),
        ("qwen3_vl", "visionzip(cls=mean)@9", "become.*place='after'"),
        ("qwen2_vl", "sparsevlm(version=plus)@0.5", "v1.5"),
    ],
)
def test_what_a_projector_or_positions_cannot_give_is_refused_in_the_call(
    family: str, spec: str, hint: str
) -> None:
    model, inputs = available(family), tiny_inputs(family)
    with pytest.raises(UnsupportedError, match=hint), vlmprune.prune(model, spec), torch.no_grad():
        model(**inputs)


def test_attention_over_a_padded_picture_is_refused_and_other_methods_run() -> None:
    model, inputs = available("idefics3"), tiny_inputs("idefics3")
    side = layout_of("idefics3").pixels
    mask = torch.ones(1, 1, side, side, dtype=torch.long)
    mask[..., side // 2 :] = 0
    with (
        pytest.raises(UnsupportedError, match="divprune"),
        vlmprune.prune(model, "fastervlm(cls=mean)@9"),
        torch.no_grad(),
    ):
        model(**inputs, pixel_attention_mask=mask)
    with vlmprune.prune(model, "divprune@9") as run, torch.no_grad():
        model(**inputs, pixel_attention_mask=mask)
    assert run.last.realised_tokens == [9]


@pytest.mark.parametrize("change", [{"image_grid_thw": None}, {"image_grid_thw": torch.tensor([[1, 4, 4]])}])
def test_grids_that_do_not_fit_the_pixels_are_refused(change: dict[str, Any]) -> None:
    model, inputs = available("qwen2_vl"), tiny_inputs("qwen2_vl")
    with pytest.raises(CaptureError, match="image_grid_thw"):
        vlmprune.score(model, inputs | change, "fastervlm(cls=mean)")
