# SPDX-License-Identifier: Apache-2.0
"""Families: clips and images in one prompt, budgets per tile and frame, newline and [CLS] slots, what is
refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from available import available
from later_families import param
from torch import Tensor, nn

import vlmprune
from vlmprune.errors import UnsupportedError
from vlmprune.models import adapter_for, families
from vlmprune.testing.conformance import generate, shared_model
from vlmprune.testing.families import family_of
from vlmprune.testing.reference import (
    by_row,
    greedy,
    kept_by_hand,
    logits_of,
    merged_embeddings,
    placeholder_columns,
)
from vlmprune.testing.tiny import tiny_inputs, tiny_model

FRAMES, PER_FRAME = 3, 9


def check_by_hand(
    model: Any, inputs: dict[str, Tensor], spec: str, images: Sequence[int], positions: str = "compact"
) -> Any:
    """Every row answers as the language model does on hand-built embeddings; returns the report."""
    with vlmprune.prune(model, spec, positions=positions) as run:
        ids = generate(model, inputs, max_new_tokens=4)
    for row, kept in enumerate(kept_by_hand(model, inputs, by_row(run.last.keep, images, FRAMES), positions)):
        assert ids[row].tolist() == greedy(model, kept, 4), f"row {row}"
    return run.last


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("images", [(0,), (1,), (2,), (1, 0, 2)])
def test_clips_beside_images_equal_hand_built(images: tuple[int, ...], tower: str) -> None:
    model, inputs = (
        shared_model("llava_onevision", tower, None),
        tiny_inputs("llava_onevision", images=images, video=True),
    )
    report = check_by_hand(model, inputs, "fastervlm(cls=mean)@7", images)
    assert report.realised_tokens == [7] * (sum(images) + len(images))
    assert report.dense_tokens[sum(images) :] == [FRAMES * PER_FRAME] * len(images)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize(
    ("spec", "frames", "clip"),
    [
        ("random@4/crop", [4, 4, 4], 12),
        ("random@20/crop", [9, 9, 9], 27),
        ("random@20/total", None, 20),
        ("random@0.5", None, 13),
    ],
)
def test_budgets_of_a_clip(spec: str, frames: list[int] | None, clip: int, positions: str) -> None:
    model, inputs = (
        shared_model("llava_onevision", None, None),
        tiny_inputs("llava_onevision", images=(0,), video=True),
    )
    report = check_by_hand(model, inputs, spec, (0,), positions)
    assert report.realised_tokens == [clip] and sum(map(len, report.keep)) == clip
    if frames is not None:
        assert [len(one) for one in report.keep] == frames


def test_a_clip_has_one_map_per_frame() -> None:
    model, inputs = (
        shared_model("llava_onevision", None, None),
        tiny_inputs("llava_onevision", images=(1, 0), video=True),
    )
    with vlmprune.prune(model, "fastervlm(cls=mean)@7") as run, torch.no_grad():
        model(**inputs)
    found = [(one.index, one.frame, one.total, one.grids) for one in run.last.keep]
    clips = [
        (clip, frame, PER_FRAME, ((3, 3),)) for clip in (1, 2) for frame in range(FRAMES)
    ]  # the image is picture 0
    assert found[0][:2] == (0, None) and found[1:] == clips
    maps = vlmprune.score(model, inputs, "fastervlm(cls=mean)")
    assert [(one.index, one.frame, len(one), one.grids) for one in maps] == found
    for clip in (1, 2):  # the clip's budget goes to its best tokens over all frames
        scores = torch.cat([one.scores for one in maps if one.frame is not None and one.index == clip])
        kept = torch.cat([one.mask for one in run.last.keep if one.frame is not None and one.index == clip])
        assert kept.nonzero()[:, 0].tolist() == sorted(scores.topk(7).indices.tolist())


def rows_read(model: Any, inputs: dict[str, Tensor], spec: str) -> tuple[Tensor, Any]:
    """(rows (n, D) that the first decoder layer reads of a batch of one, report)."""
    seen: list[Tensor] = []
    layer = model.model.language_model.layers[0]

    def read(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = layer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with vlmprune.prune(model, spec) as run, torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    return seen[0][0], run.last


@pytest.mark.parametrize(
    ("family", "video"), [("llava_next", False), ("llava_onevision", False), ("llava_onevision", True)]
)
@pytest.mark.parametrize("spec", ["random@6", "random@2/crop", "random@9/total", "pool@6"])
def test_newlines_stay_in_place_and_are_not_counted(family: str, video: bool, spec: str) -> None:
    model = shared_model(family, None, None)
    inputs = tiny_inputs(family, images=(1,), video=video)
    rows, report = rows_read(model, inputs, spec)
    newline = model.model.image_newline.detach()
    dense = merged_embeddings(model, inputs)
    newlines = int((dense[0] == newline).all(-1).sum())
    text = dense.shape[1] - newlines - len(placeholder_columns(model, inputs["input_ids"], dense)[0])
    assert newlines > 1 or not video
    assert int((rows == newline).all(-1).sum()) == newlines
    assert len(rows) == text + newlines + sum(report.realised_tokens)


SIZES = [(100, 190), (190, 100), (84, 84), (70, 250), (250, 70), (168, 160)]


def tile_of_every_token(model: Any, size: tuple[int, int]) -> Tensor:
    """(N,) tile of each patch of a LLaVA-NeXT picture: 0 the overview, then tiles in reading order, un-padded
    by the model.
    """
    module = sys.modules[type(model.model).__module__]
    down, across = module.get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, 84)
    rows, cols = torch.meshgrid(torch.arange(down * 6), torch.arange(across * 6), indexing="ij")
    tiles = 1 + rows // 6 * across + cols // 6
    return torch.cat([torch.zeros(36, dtype=torch.long), module.unpad_image(tiles[None], size).flatten()])


@pytest.mark.parametrize("size", SIZES)
def test_a_budget_per_tile_is_spent_in_every_tile(size: tuple[int, int]) -> None:
    model, inputs = shared_model("llava_next", None, None), tiny_inputs("llava_next", images=(1,), size=size)
    tiles = tile_of_every_token(model, size)
    report = check_by_hand(model, inputs, "fastervlm@5/crop", (1,))
    held, kept = tiles.bincount(), tiles[report.keep[0].keep_idx].bincount(minlength=int(tiles.max()) + 1)
    assert report.dense_tokens == [len(tiles)]
    assert kept.tolist() == held.clamp_max(5).tolist()
    scores = vlmprune.score(model, inputs, "fastervlm")[0].scores
    for tile in tiles.unique():
        own = (tiles == tile).nonzero()[:, 0]
        best = own[scores[own].topk(min(5, len(own))).indices]
        assert set(best.tolist()) <= set(report.keep[0].keep_idx.tolist()), f"tile {tile}"


def test_grids_of_a_tiled_picture_are_its_overview_and_its_unpadded_detail() -> None:
    model = shared_model("llava_next", None, None)
    for size in SIZES:
        inputs = tiny_inputs("llava_next", images=(1,), size=size)
        dense = merged_embeddings(model, inputs)
        newlines = int(
            (dense[0] == model.model.image_newline).all(-1).sum()
        )  # one ends each row of the detail
        grids = vlmprune.score(model, inputs, "random")[0].grids
        assert grids[0] == (6, 6) and len(grids) == 2 and grids[1][0] == newlines
        assert sum(rows * cols for rows, cols in grids) == len(
            placeholder_columns(model, inputs["input_ids"], dense)[0]
        )


def test_a_cls_token_that_the_model_reads_is_kept_and_not_counted() -> None:
    model = tiny_model("llava")
    model.config.vision_feature_select_strategy = "full"
    inputs = tiny_inputs(images=(1,))
    ids = inputs["input_ids"][0].tolist()
    ids.insert(ids.index(model.config.image_token_id), model.config.image_token_id)
    inputs = {
        **inputs,
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    dense = merged_embeddings(model, inputs)[0]
    rows, report = rows_read(model, inputs, "fastervlm@9")
    first = ids.index(model.config.image_token_id)
    patches = first + 1 + report.keep[0].keep_idx  # [CLS] stands before them
    wanted = [*range(first + 1), *patches.tolist(), *range(first + 37, len(ids))]
    assert report.dense_tokens == [36] and report.realised_tokens == [9]
    assert torch.equal(rows, dense[wanted])
    want = vlmprune.score(tiny_model("llava"), tiny_inputs(images=(1,)), "fastervlm")[0].keep(9)
    assert report.keep[0].keep_idx.tolist() == want.keep_idx.tolist()


def test_keeping_all_of_a_model_that_reads_cls_is_dense() -> None:
    model, inputs = shared_model("vipllava", None, None), tiny_inputs("vipllava", images=(2,))
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, "fastervlm@9") as run:
            logits = model(**inputs).logits[0, -1]
    kept = kept_by_hand(model, inputs, run.last.keep, "compact")[0]
    torch.testing.assert_close(logits, logits_of(model, kept)[-1], rtol=0, atol=2e-5)
    assert not torch.equal(logits, dense[0, -1])


class Wrapped(nn.Module):
    """Looks like a PEFT model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def get_base_model(self) -> nn.Module:
        return self.inner


def test_wrapped_models_are_unwrapped() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    with vlmprune.prune(Wrapped(model), "random@9") as run, torch.no_grad():
        model(**inputs)
    assert run.last.realised_tokens == [9] and adapter_for(Wrapped(model)).model is model


def causal_lm() -> nn.Module:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def foreign(model_type: str) -> nn.Module:
    module = nn.Linear(1, 1)
    module.config = SimpleNamespace(
        model_type=model_type, vision_config=SimpleNamespace(model_type="clip_vision_model")
    )
    return module


def wrapped(model: nn.Module) -> nn.Module:
    """As DistributedDataParallel holds a model."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    return Wrapper()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "llava", "from_pretrained"),
        (lambda: None, "from_pretrained"),
        (causal_lm, "no vision tower"),
        (lambda: shared_model("llava", None, None).model, "part of a llava model"),
        (lambda: shared_model("llava", None, None).model.vision_tower, "no vision tower"),
        (lambda: shared_model("llava", None, None).model.language_model, "no vision tower"),
        (lambda: nn.DataParallel(shared_model("llava", None, None)), "one process per device"),
        (
            lambda: foreign("kosmos-2"),
            r"'kosmos-2' is not supported: a resampler .*; families with an adapter: \['aria'",
        ),
        (lambda: foreign("mllama"), r"cross-attention.*'qwen2_5_vl'.*Run it dense"),
        (
            lambda: foreign("llava_nxt"),
            r"'llava_nxt' is not supported; .*Run it dense, or .*vlmprune\.select",
        ),
        (
            lambda: foreign("internvl_chat"),
            r"authors' code; .* ends in -hf, such as OpenGVLab/InternVL3-1B-hf",
        ),
        (
            lambda: wrapped(shared_model("llava", None, None)),
            r"Wrapper wraps a model; give the one inside, its \.module",
        ),
        (lambda: nn.Linear(2, 2), "no vision tower"),
    ],
)
def test_what_cannot_be_pruned_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        vlmprune.attach(make(), "random@9")


@pytest.mark.parametrize("model_type", ["llava_nxt", "llama4", "vision-encoder-decoder"])
def test_no_other_model_type_is_suggested(model_type: str) -> None:
    """A model type is a fact about a model: it cannot be typed in another way."""
    with pytest.raises(UnsupportedError) as error:
        adapter_for(foreign(model_type))
    assert "Did you mean" not in str(error.value) and "vlmprune.select" in str(error.value)


def test_an_unknown_vision_tower_is_refused() -> None:
    model = tiny_model("llava")
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(UnsupportedError, match="'pixtral' vision tower; supported towers are"):
        adapter_for(model)


WITH_CLS = ("llava", "vipllava", "llava_next", "llava_next_video", "video_llava", "internvl", "qianfan_ocr")


@pytest.mark.parametrize("family", [param("parts", family) for family in families()])
def test_every_family_finds_its_parts(family: str) -> None:
    adapter = adapter_for(available(family))
    assert adapter.model_type == family == adapter.config.model_type
    assert len(adapter.language_model.layers) == 4
    assert isinstance(adapter.projector, nn.Module) == family_of(family).reads_tower
    assert adapter.cls == (family in WITH_CLS)
