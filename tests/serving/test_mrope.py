# SPDX-License-Identifier: Apache-2.0
"""Positions of pruned prompts, as an engine is given them in two parts, are those of transformers."""

from __future__ import annotations

import inspect
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch

from vlmprune.errors import UnsupportedError
from vlmprune.serving.vllm.mrope import (
    MRopePlaces,
    grid_extent,
    grid_places,
    refuse_shared_positions,
    split_places,
    with_places,
)
from vlmprune.testing.families.shared import IMAGE_ID
from vlmprune.testing.tiny import tiny_inputs, tiny_model


class Engine:
    """What vLLM's class does with rows and positions."""

    def __init__(self, *, vllm_config, prefix):
        self.seen = []

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = torch.zeros(len(input_ids), 4)
        if multimodal_embeddings is not None:
            embeds[is_multimodal] = torch.cat(multimodal_embeddings)
        return embeds

    def forward(self, input_ids, positions, inputs_embeds=None):
        self.seen.append(positions)


class Model(MRopePlaces, Engine):
    """An item says its grid of tokens."""

    def spans(self, feature, input_tokens):
        yield feature.mm_position.offset, feature.mm_position.length, grid_extent(*feature.grid)


def config(**changed):
    parallel = SimpleNamespace(pipeline_parallel_size=changed.get("stages", 1), enable_dbo=False)
    multimodal = SimpleNamespace(
        mm_encoder_tp_mode=changed.get("mode", "weights"), video_pruning_rate=changed.get("rate")
    )
    return SimpleNamespace(
        parallel_config=parallel,
        model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal),
        speculative_config=changed.get("drafts"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8),
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("size", [None, (280, 112), (56, 280)])
def test_positions_of_a_pruned_prompt_are_those_of_the_tokens_that_stay(family, size):
    """Wide, tall and several pictures, in chunks that cut through them, and of what is generated behind."""
    model, inputs = tiny_model(family), tiny_inputs(family, images=(2,), size=size)
    dense = inputs["input_ids"][0]
    rule = model.model.get_rope_index
    given = {name: value for name, value in inputs.items() if name in inspect.signature(rule).parameters}
    wanted, delta = rule(**given)
    stay = torch.ones(len(dense), dtype=torch.bool)
    stay[(dense == IMAGE_ID).nonzero()[1::3, 0]] = False
    grids = [(1, rows // 2, cols // 2) for _, rows, cols in inputs["image_grid_thw"].tolist()]
    kept = stay[dense == IMAGE_ID].split([rows * cols for _, rows, cols in grids])
    ids = dense[stay].tolist()
    features, at = [], 0
    for token, run in groupby(ids):
        length = len(list(run))
        if token == IMAGE_ID:
            place = SimpleNamespace(offset=at, length=length)
            features.append(SimpleNamespace(mm_position=place, grid=grids[len(features)]))
        at += length

    served = Model(vllm_config=config())
    positions, behind = served.get_mrope_input_positions(ids, features[::-1])
    assert behind + len(ids) == int(delta[0]) + len(dense)
    places = torch.cat([grid_places(*grid)[one] for grid, one in zip(grids, kept, strict=True)])
    rows = with_places(torch.ones(len(places), 4), places)
    tokens, done = torch.tensor(ids), 0
    for start in range(0, len(ids), 7):
        chunk = tokens[start : start + 7]
        pictured = chunk == IMAGE_ID
        count = int(pictured.sum())
        embeds = served.embed_input_ids(chunk, [rows[done : done + count]], is_multimodal=pictured)
        done += count
        assert embeds.sum() == 4 * count
        served.forward(None, positions[:, start : start + 7])
    assert torch.cat(served.seen, dim=1).equal(wanted[:, 0, stay])


def test_places_of_one_step_are_not_those_of_the_next():
    served = Model(vllm_config=config())
    rows, pictured = with_places(torch.ones(3, 4), torch.full((3, 3), 5)), torch.tensor([True] * 3)
    served.embed_input_ids(torch.zeros(3), [rows], is_multimodal=pictured)
    served.forward(None, torch.zeros(3, 3, dtype=torch.int64))
    served.embed_input_ids(torch.zeros(2))
    served.forward(None, torch.zeros(3, 12, dtype=torch.int64))  # more than was promised at the start
    assert served.seen[0].unique().tolist() == [5]
    assert served.seen[1].shape == (3, 12) and served.seen[1].unique().tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_ride_exactly_in_any_precision(dtype):
    places = torch.tensor([[0, 255, 256], [257, 4097, 65535]])
    rows, back = split_places(with_places(torch.ones(2, 4, dtype=dtype), places))
    assert back.equal(places) and rows.dtype == dtype and rows.shape == (2, 4)


def test_a_clip_takes_the_positions_of_its_moments():
    assert grid_places(3, 1, 2, 0.7)[:, 0].tolist() == [0, 0, 0, 0, 1, 1]
    assert (grid_extent(3, 1, 2, 4.0), grid_extent(3, 5, 2, 0.7)) == (9, 5)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"stages": 2}, "pipeline parallelism"),
        ({"drafts": object()}, "speculative decoding"),
        ({"mode": "data"}, "mm_encoder_tp_mode"),
        ({"rate": 0.5}, "video_pruning_rate"),
    ],
)
def test_what_hands_positions_on_elsewhere_is_refused(changed, why):
    refuse_shared_positions(config())
    with pytest.raises(UnsupportedError, match=why):
        refuse_shared_positions(config(**changed))
