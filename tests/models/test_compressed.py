# SPDX-License-Identifier: Apache-2.0
"""Models that drop tokens of clips by themselves: budgets count from what is left; both are reported."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from available import available, skip_without
from torch import Tensor

import vlmprune
from vlmprune.core.budget import Budget
from vlmprune.core.report import Report
from vlmprune.errors import CaptureError, GridError, InvariantError, SpecError, UnsupportedError
from vlmprune.hooks.sequence.cache import cache_in, cache_name
from vlmprune.models import adapter_for
from vlmprune.testing.conformance import generate
from vlmprune.testing.reference import dense_rows
from vlmprune.testing.tiny import tiny_inputs, tiny_model

FRAME = 36  # tokens of a frame of a tiny clip


def compressed_clips(rows: int = 2, share: float = 0.6) -> tuple[Any, dict[str, Tensor]]:
    """VideoLLaMA 3, and clips of which about a share of the tokens is left, another one of each."""
    model = available("video_llama_3")
    dense = tiny_inputs("video_llama_3", images=(0,) * rows, video=True)
    ids = dense["input_ids"]
    holds = ids == model.config.video_token_id
    mask = torch.rand(int(holds.sum()), generator=torch.Generator().manual_seed(3)) < share
    stays = dense["attention_mask"].bool()
    stays[holds] = mask
    short = [row[keep] for row, keep in zip(ids, stays, strict=True)]
    pads = [torch.zeros(max(map(len, short)) - len(row), dtype=ids.dtype) for row in short]
    left = [torch.cat([pad, row]) for pad, row in zip(pads, short, strict=True)]
    valid = [torch.cat([pad, torch.ones_like(row)]) for pad, row in zip(pads, short, strict=True)]
    changed = {"input_ids": torch.stack(left), "attention_mask": torch.stack(valid)}
    return model, {**dense, **changed, "video_compression_mask": mask}


def row_of(inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One clip of the batch alone, without padding."""
    valid = inputs["attention_mask"][number].bool()
    grids = inputs["video_grid_thw"]
    patches = grids.prod(dim=1).tolist()
    sizes = (grids.prod(dim=1) // inputs["video_merge_sizes"] ** 2).tolist()
    return {
        "input_ids": inputs["input_ids"][number, valid][None],
        "attention_mask": torch.ones(1, int(valid.sum()), dtype=torch.long),
        "pixel_values_videos": inputs["pixel_values_videos"].split(patches)[number],
        "video_grid_thw": grids[number : number + 1],
        "video_merge_sizes": inputs["video_merge_sizes"][number : number + 1],
        "video_compression_mask": inputs["video_compression_mask"].split(sizes)[number],
    }


def report_of(model: Any, inputs: dict[str, Tensor], spec: str) -> Report:
    with vlmprune.prune(model, spec) as run:
        generate(model, inputs)
    assert run.last is not None
    return run.last


def test_budgets_count_from_what_the_model_itself_leaves() -> None:
    model, inputs = compressed_clips()
    left = [int(one.sum()) for one in inputs["video_compression_mask"].split(3 * FRAME)]
    report = report_of(model, inputs, "divprune@0.5")
    assert report.encoded_tokens == [3 * FRAME] * 2 and report.dense_tokens == left
    assert report.realised_tokens == [Budget.of(0.5).count(count) for count in left]
    said = f"(the model itself left these of {6 * FRAME})"
    assert said in str(report) and said in report._repr_html_()
    assert [one.available for one in report.keep] == [
        int(one.sum()) for one in inputs["video_compression_mask"].split(FRAME)
    ]
    assert [one.grid for one in report.keep] == [(6, 6)] * 6
    assert "the model itself left" in repr(report.keep[0])


@pytest.mark.parametrize("spec", ["divprune@9", "fastervlm(cls=mean)@0.25", "random@9", "zooprune@9"])
def test_the_language_model_reads_the_kept_tokens_of_those_that_are_left(spec: str) -> None:
    model, inputs = compressed_clips(rows=1)
    left = inputs["video_compression_mask"].nonzero()[:, 0]
    with vlmprune.prune(model, spec) as run, torch.no_grad():
        pruned = model(**inputs).logits[0, -1]
    assert run.last is not None
    kept = torch.cat([one.keep_idx + number * FRAME for number, one in enumerate(run.last.keep)])
    assert torch.isin(kept, left).all() and len(kept) == run.last.realised_tokens[0] < len(left)
    holds = inputs["input_ids"][0] == model.config.video_token_id
    stays = ~holds
    stays[holds.nonzero()[:, 0][torch.searchsorted(left, kept)]] = True
    rows = dense_rows(model, inputs)[0].columns(stays.nonzero()[:, 0])
    with torch.no_grad():
        output = model.model.language_model(inputs_embeds=rows.embeds, use_cache=False)
        want = model.lm_head(output.last_hidden_state)[0, -1]
        dense = model(**inputs).logits[0, -1]
    torch.testing.assert_close(pruned, want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(pruned, dense, atol=1e-3)


@pytest.mark.parametrize("spec", ["divprune@0.25", "fastervlm(cls=mean)@9", "fastv@9", "mmtok@9"])
def test_a_row_of_a_batch_keeps_what_it_keeps_alone(spec: str) -> None:
    model, inputs = compressed_clips()
    together = report_of(model, inputs, spec)
    for number in range(2):
        alone = report_of(model, row_of(inputs, number), spec)
        here = [one for one in together.keep if one.index == number]
        assert [one.keep_idx.tolist() for one in here] == [one.keep_idx.tolist() for one in alone.keep]
        assert alone.dense_tokens == together.dense_tokens[number : number + 1]


def test_all_of_what_is_left_is_dense() -> None:
    model, inputs = compressed_clips()
    with torch.no_grad():
        dense = model(**inputs).logits[:, -1]
        with vlmprune.prune(model, "divprune@1.0") as run:
            pruned = model(**inputs).logits[:, -1]
    assert torch.equal(pruned, dense) and run.last is not None and not run.last.pruned


def test_merged_rows_and_later_calls_name_patches_of_the_whole_clip() -> None:
    model, inputs = compressed_clips(rows=1)
    spec = "visionzip(cls=mean,place=after)@9"
    report = report_of(model, inputs, spec)
    joins = torch.cat([one.joins for one in report.keep])
    mask = inputs["video_compression_mask"]
    assert len(joins) == 3 * FRAME and (joins[~mask] == -1).all() and (joins[mask] >= 0).any()
    named = joins[joins >= 0].unique()
    assert mask[named].all()


def test_a_mask_that_drops_nothing_leaves_the_clip_as_it_is() -> None:
    model = available("video_llama_3")
    inputs = tiny_inputs("video_llama_3", images=(0,), video=True)
    whole = torch.ones(3 * FRAME, dtype=torch.bool)
    report = report_of(model, inputs | {"video_compression_mask": whole}, "evs@0.5")
    assert report.keep[1].left is None and report.encoded_tokens == report.dense_tokens == [3 * FRAME]
    assert [one.keep_idx.tolist() for one in report.keep] == [
        one.keep_idx.tolist() for one in report_of(model, inputs, "evs@0.5").keep
    ]


def test_scores_are_of_what_is_left() -> None:
    model, inputs = compressed_clips()
    maps = vlmprune.score(model, inputs, "fastervlm(cls=mean)")
    assert [len(one) for one in maps] == [
        int(one.sum()) for one in inputs["video_compression_mask"].split(3 * FRAME)
    ]


def test_what_needs_rows_and_columns_is_refused_where_some_are_gone() -> None:
    model, inputs = compressed_clips(rows=1)
    for spec in ("evs@0.5", "pool@9"):
        with pytest.raises(GridError, match="rows and columns"), vlmprune.prune(model, spec):
            generate(model, inputs)
    with (
        pytest.raises(InvariantError, match="budget without '/crop'"),
        vlmprune.prune(model, "random@4/crop"),
    ):
        generate(model, inputs)


def test_a_mask_of_another_length_is_refused() -> None:
    model, inputs = compressed_clips(rows=1)
    adapter, mask = adapter_for(model), inputs["video_compression_mask"]
    with pytest.raises(CaptureError, match="one entry for each of 108"):
        vlmprune.score(model, inputs | {"video_compression_mask": mask.repeat(2)}, "fastervlm(cls=mean)")
    assert adapter.compresses == ("video",)


def test_keep_maps_remember_what_was_left(tmp_path: Any) -> None:
    model, inputs = compressed_clips(rows=1)
    one = report_of(model, inputs, "divprune@0.5").keep[1]
    for name in ("map.json", "map.safetensors"):
        one.save(tmp_path / name)
        again = vlmprune.KeepMap.load(tmp_path / name)
        assert torch.equal(again.left, one.left) and again.available == one.available < again.total
    assert one.replay.total == one.available
    with pytest.raises(InvariantError, match="expected all of them among those"):
        vlmprune.KeepMap(torch.tensor([0, 1]), 4, ((2, 2),), left=torch.tensor([1, 2]))


def sampling_model(rate: float) -> tuple[Any, dict[str, Tensor]]:
    """Nemotron-H Omni that drops a share of a clip by itself (EVS), and a clip whose second step is calm."""
    skip_without("nemotron_h_omni")
    model, inputs = tiny_model("nemotron_h_omni"), tiny_inputs("nemotron_h_omni", images=(0,), video=True)
    model.video_pruning_rate = rate
    pixels = inputs["pixel_values_videos"]
    pixels[:, 1] = pixels[:, 0] + 0.1 * pixels[:, 1]
    return model, inputs


def test_what_nemotron_drops_by_itself_is_what_evs_drops() -> None:
    model, inputs = sampling_model(0.5)
    with vlmprune.prune(model, "divprune@1.0") as run:
        own = generate(model, inputs)
    assert torch.equal(own, generate(model, inputs))
    model.video_pruning_rate = 0.0
    with vlmprune.prune(model, "evs@0.5") as other:
        ids = generate(model, inputs)
    assert run.last is not None and other.last is not None and torch.equal(ids, own)
    assert run.last.dense_tokens == other.last.realised_tokens == [54]
    assert run.last.encoded_tokens == other.last.encoded_tokens == [3 * FRAME]
    assert run.last.sequence == (71, 71) and other.last.sequence == (125, 71)
    for one, two in zip(run.last.keep, other.last.keep, strict=True):
        assert torch.equal(one.keep_idx, two.keep_idx) and torch.equal(one.left, two.keep_idx)


@pytest.mark.parametrize("spec", ["divprune@0.25", "fastervlm(cls=mean)@9", "mmtok@9"])
def test_decoding_goes_on_behind_both_cuts(spec: str) -> None:
    """The mask that generate hands to a decode step has the columns that the model took out of the prompt."""
    model, inputs = sampling_model(0.5)
    with vlmprune.prune(model, spec) as run:
        ids = generate(model, inputs, max_new_tokens=6)
        again = generate(model, inputs, max_new_tokens=6, use_cache=False)
        beams = generate(model, inputs, max_new_tokens=4, num_beams=2)
        without = generate(model, inputs, max_new_tokens=4, num_beams=2, use_cache=False)
    assert torch.equal(ids, again) and torch.equal(beams, without)
    assert run.last is not None and run.last.dense_tokens == [54] and run.last.realised_tokens[0] < 54


@pytest.mark.parametrize("spec", ["divprune@9", "divprune@1.0"])
def test_a_mask_of_all_columns_goes_on_behind_both_cuts(spec: str) -> None:
    """A loop by hand hands on the mask of the whole prompt, of which the model took columns out."""
    model, inputs = sampling_model(0.5)
    length = inputs["input_ids"].shape[1]
    name = cache_name(inspect.signature(model.forward).parameters)

    def answer(masked: bool) -> list[int]:
        output, found = model(**inputs, use_cache=True), []
        for step in range(1, 4):
            found.append(int(output.logits[0, -1].argmax()))
            given = {"input_ids": torch.tensor([found[-1:]]), name: cache_in(output), "use_cache": True}
            mask = {"attention_mask": torch.ones(1, length + step, dtype=torch.long)} if masked else {}
            output = model(**given, **mask)
        return found

    with vlmprune.prune(model, spec) as run, torch.no_grad():
        assert answer(masked=True) == answer(masked=False)
    assert run.last is not None and run.last.decode_steps == 3


def test_a_turn_that_begins_with_placeholders_of_the_clip_is_refused() -> None:
    """generate takes the tokens that the model itself dropped for new ones."""
    model, inputs = sampling_model(0.5)
    name = cache_name(inspect.signature(model.forward).parameters)
    with vlmprune.prune(model, "divprune@9"):
        made = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([made.sequences, torch.tensor([[5, 6]])], dim=1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), name: cache_in(made)}
        with pytest.raises(UnsupportedError, match="cannot be continued by generate"):
            model.generate(**given, max_new_tokens=1)


def test_nemotron_reads_the_kept_tokens_of_those_that_it_left() -> None:
    model, inputs = sampling_model(0.5)
    with vlmprune.prune(model, "fastervlm(cls=mean)@9") as run, torch.no_grad():
        pruned = model(**inputs).logits[0, -1]
    assert run.last is not None
    kept = torch.cat([one.keep_idx + number * FRAME for number, one in enumerate(run.last.keep)])
    holds = inputs["input_ids"][0] == model.config.image_token_id
    stays = ~holds
    stays[holds.nonzero()[:, 0][kept]] = True
    model.video_pruning_rate = 0.0  # its own choice is in ``kept`` already
    rows = dense_rows(model, inputs)[0].columns(stays.nonzero()[:, 0])
    with torch.no_grad():
        want = model.language_model(inputs_embeds=rows.embeds, use_cache=False).logits[0, -1]
    torch.testing.assert_close(pruned, want, atol=1e-5, rtol=1e-4)


def test_clips_are_scored_by_the_attention_of_nemotrons_tower() -> None:
    model, inputs = sampling_model(0.0)
    maps = vlmprune.score(model, inputs, "fastervlm(cls=mean)")
    tower, prefix = model.vision_model, model.config.vision_config.num_summary_tokens
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps_of = tower(inputs["pixel_values_videos"][0], output_attentions=True).attentions[-1]
    received = maps_of.mean(dim=(1, 2))[:, prefix:].unflatten(1, (12, 12))  # (steps, rows, cols) of patches
    tokens = received.unflatten(1, (6, 2)).unflatten(3, (6, 2)).mean(dim=(2, 4)).flatten(1)
    assert [one.frame for one in maps] == [0, 1, 2]
    torch.testing.assert_close(torch.stack([one.scores for one in maps]), tokens, atol=1e-6, rtol=1e-4)


def test_images_and_clips_of_nemotron_come_in_calls_of_their_own() -> None:
    with pytest.raises(SpecError, match="reads one of both in a call"):
        tiny_inputs("nemotron_h_omni", images=(1, 0), video=True)
