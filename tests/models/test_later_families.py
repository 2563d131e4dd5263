# SPDX-License-Identifier: Apache-2.0
"""What single families of the later ones have that others do not: experts by modality, something of every
token beside its hidden state, keys that layers share, towers whose last block does not attend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from available import available
from later_families import sampled
from torch import Tensor

import vlmprune
from vlmprune.errors import CaptureError, GridError, InvariantError, UnsupportedError
from vlmprune.models import adapter_for
from vlmprune.models.unread import Molmo2Adapter
from vlmprune.testing.checks_generation import drafts_are_no_prompt, second_turn
from vlmprune.testing.checks_model import training_works
from vlmprune.testing.checks_sequence import batch_row_equals_alone, cut_equals_hand_built, numbered
from vlmprune.testing.conformance import Subject, generate
from vlmprune.testing.families import FAMILIES, Family
from vlmprune.testing.reference import dense_rows, logits_of
from vlmprune.testing.tiny import tiny_inputs, tiny_model
from vlmprune.testing.tiny_configs import missing


@pytest.mark.parametrize(
    "check",
    [cut_equals_hand_built, batch_row_equals_alone, second_turn, training_works],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("text", ["gemma4", "gemma4_small"])
def test_gemma4_with_and_without_something_beside_every_token(text: str, check: Any) -> None:
    available("gemma4", text)
    check(Subject("divprune@9", "gemma4", None, text))


def test_what_stands_beside_gemma4s_tokens_matters() -> None:
    """The references would not notice its loss if it hardly changed the logits."""
    model, inputs = available("gemma4", "gemma4_small"), tiny_inputs("gemma4")
    kept = dense_rows(model, inputs)[0]
    other = replace(kept, beside=kept.beside.flip(1))
    assert kept.beside.shape[:2] == kept.embeds.shape[:2]
    assert (logits_of(model, kept)[-1] - logits_of(model, other)[-1]).abs().max() > 0.01


def test_drafts_behind_a_prompt_with_token_types_are_text() -> None:
    available("gemma4")
    drafts_are_no_prompt(Subject("fastv(layer=1)@9", "gemma4"))


def test_cuts_inside_are_refused_where_layers_read_what_would_not_follow() -> None:
    """Keys that layers share."""
    available("gemma4")
    for model in (available("gemma4", "gemma4_small"), tiny_model("gemma4", num_kv_shared_layers=2)):
        with pytest.raises(UnsupportedError, match=r"read the keys of earlier ones.*'divprune@64'"):
            vlmprune.attach(model, "fastv@9")


@pytest.mark.parametrize("spec", ["fastv@9", "var", "random@20+fastv@9"])
def test_gemma3n_is_pruned_before_its_language_model_only(spec: str) -> None:
    with pytest.raises(UnsupportedError, match=r"several states of every token.*'divprune@64'"):
        vlmprune.attach(available("gemma3n"), spec)


def test_molmo_adds_features_to_its_placeholders() -> None:
    """Rows that a method makes would lack the placeholder if the features were taken as they are."""

    class Checked(Molmo2Adapter):
        checks_features = True

    model, inputs = available("molmo2"), tiny_inputs("molmo2", images=(1, 2, 0))
    with vlmprune.prune(model, "divprune@9", adapter=Checked) as run:
        generate(model, inputs)
    assert run.last.dense_tokens == [36, 36 + 24, 36 + 18] and run.last.grids[1] == ((6, 6), (4, 6))


def test_what_molmo_cannot_do_is_refused() -> None:
    model, inputs = available("molmo2"), tiny_inputs("molmo2")
    table, grid = inputs["image_token_pooling"], torch.tensor([[1, 6, 6]])
    with (
        pytest.raises(UnsupportedError, match="give the frames as images"),
        vlmprune.prune(model, "random@9"),
    ):
        model.model.get_video_features(inputs["pixel_values"], table, grid)
    mixed = tiny_model("molmo2", rope_scaling_layers=[0, 1])
    with pytest.raises(UnsupportedError, match="rotate by other angles"):
        vlmprune.attach(mixed, "fastv@9")
    with vlmprune.prune(mixed, "divprune@9") as run:
        generate(mixed, inputs)
    assert run.last.realised_tokens == [9]


def test_clips_that_perception_lm_encodes_as_images_are_refused() -> None:
    model, inputs = available("perception_lm"), tiny_inputs("perception_lm")
    ids = inputs["input_ids"]
    clip = torch.where(ids == model.config.image_token_id, model.config.video_token_id, ids)
    only = {"input_ids": clip, "pixel_values_videos": inputs["pixel_values"]}
    both = {"input_ids": torch.cat([ids, clip], dim=1), "pixel_values": inputs["pixel_values"].flip(-1)}
    for given in (only, both | {"pixel_values_videos": inputs["pixel_values"]}):
        with (
            pytest.raises(InvariantError),
            vlmprune.prune(model, "random@9"),
            torch.no_grad(),
        ):
            model(**given)


def test_places_that_do_not_fit_gemma4s_patches_are_refused() -> None:
    model, inputs = available("gemma4"), tiny_inputs("gemma4")
    places = inputs["image_position_ids"]
    with pytest.raises(CaptureError, match="image_position_ids has shape"):
        vlmprune.score(model, inputs | {"image_position_ids": places[:, :-1]}, "fastervlm(cls=mean)")
    mixed = places.clone()
    mixed[0, [0, 1]] = mixed[0, [1, 0]]
    with pytest.raises(UnsupportedError, match="do not stand row by row"):
        vlmprune.score(model, inputs | {"image_position_ids": mixed}, "fastervlm(cls=mean)")


def test_dart_is_refused_where_padding_has_numbers_and_runs_where_it_has_none() -> None:
    """Its norm of rotated keys depends on their positions, which this family shifts by the padding."""
    family = "hyperclovax_vision_v2"
    model, ragged = available(family), tiny_inputs(family, images=(1, 2, 0))
    both = "norm='l2', variant='exact'"
    for spec, instead in (("dart@9", "norm='l2'"), ("dart(variant=official)@9", both)):
        why = f"numbers padding too.*use {instead}, or give one prompt"
        with pytest.raises(UnsupportedError, match=why), vlmprune.prune(model, spec):
            generate(model, ragged)
    with vlmprune.prune(model, "dart@9") as run:
        generate(model, tiny_inputs(family))
        assert run.last.realised_tokens == [9]
        with torch.no_grad():  # positions that leave padding out
            model(**ragged, position_ids=numbered(ragged))
        assert run.last.realised_tokens == [9, 9, 9]
    batch_row_equals_alone(Subject("dart(norm=l2)@9", family))


def last_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[0, -1]


def test_ernies_experts_of_pictures_follow_the_cut() -> None:
    """Each token is sent to experts by its type: after a cut by the type of the token that stands there."""
    model, inputs = available("ernie4_5_vl_moe"), tiny_inputs("ernie4_5_vl_moe")
    types = (inputs["input_ids"] == model.config.image_token_id).int()
    typed = inputs | {"moe_mm_token_type_ids": types}
    seen: list[dict[str, Any]] = []
    with vlmprune.prune(model, "divprune@9") as run:
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        pruned = last_logits(model, typed)
        hook.remove()
    first = int(types[0].argmax())
    columns = [*range(first), *(first + run.last.keep[0].keep_idx).tolist()]
    columns += range(first + 36, types.shape[1])
    assert torch.equal(seen[0]["moe_mm_token_type_ids"], types[:, columns])
    kept = dense_rows(model, inputs)[0].columns(torch.tensor(columns))
    with torch.no_grad():
        output = model.model.language_model(
            inputs_embeds=kept.embeds,
            position_ids=kept.positions,
            attention_mask=torch.ones(1, len(columns), dtype=torch.long),
            moe_mm_token_type_ids=types[:, columns],
            use_cache=False,
        )
        want = model.lm_head(output.last_hidden_state)[0, -1]
    torch.testing.assert_close(pruned, want, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(pruned, last_logits(model, inputs), atol=1e-2)


def test_the_last_block_that_attends_is_read_where_others_stand_behind_it() -> None:
    model, inputs = available("lfm3_vl"), tiny_inputs("lfm3_vl")
    capture = adapter_for(model).capture(["received_attention"])
    kinds = model.config.vision_config.layer_types
    assert kinds[-1] == "conv" and [kinds[block] for block in capture.blocks_of.values()] == [
        "full_attention"
    ]
    with vlmprune.prune(model, "fastervlm(cls=mean)@9") as run:
        generate(model, inputs, max_new_tokens=1)
    assert run.last.realised_tokens == [9]


def read_by(model: Any, inputs: dict[str, Tensor], spec: str) -> tuple[dict[str, Any], Any]:
    """What the language model is given while a method is attached, and the report."""
    seen: list[dict[str, Any]] = []
    with vlmprune.prune(model, spec) as run, torch.no_grad():
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
    return seen[0], run.last


def test_what_granites_layers_add_follows_the_cut() -> None:
    """The mask of columns and the features of each layer, newlines included, also in a ragged batch."""
    model, inputs = available("granite4_vision"), tiny_inputs("granite4_vision", images=(1, 2, 0))
    dense, _ = read_by(model, inputs, "divprune@1.0")
    given, report = read_by(model, inputs, "divprune@9")
    assert set(given["deepstack_features"]) == {0, 1, 2, 3} and report.realised_tokens == [9, 9, 9]
    newline = model.model.image_newline
    for layer, rows in given["deepstack_features"].items():
        kept, start = [], 0
        for one in report.keep:
            own = dense["deepstack_features"][layer][start:]
            special = (own == newline).all(-1)
            patches = (~special).nonzero()[: one.total, 0]
            length = int(patches[-1]) + 2  # a newline ends every picture
            stays = special[:length].clone()
            stays[patches[one.keep_idx]] = True
            kept.append(own[:length][stays])
            start += length
        assert torch.equal(rows, torch.cat(kept))
    assert int(given["vision_mask"].sum()) == len(rows)
    with pytest.raises(UnsupportedError, match="a method that keeps tokens"):
        vlmprune.attach(model, "pool@9")
    with pytest.raises(UnsupportedError, match="add features to tokens of the uncut sequence"):
        vlmprune.attach(model, "fastv@9")


def test_the_mark_behind_deepseeks_pictures_stays_and_is_not_counted() -> None:
    model, inputs = available("deepseek_ocr2"), tiny_inputs("deepseek_ocr2", images=(1, 2))
    given, report = read_by(model, inputs, "random@5")
    # the whole picture alone, then with two crops and with one
    assert report.dense_tokens == [36, 108, 72] and report.realised_tokens == [5, 5, 5]
    marks = (given["inputs_embeds"] == model.model.view_separator).all(-1)
    assert marks.sum(dim=1).tolist() == [1, 2]


def test_nemotron_is_cut_below_its_causal_language_model() -> None:
    model, inputs = available("nemotron_h_omni"), tiny_inputs("nemotron_h_omni", images=(1, 2))
    adapter = adapter_for(model)
    assert adapter.inner is model and adapter.language_model is model.language_model.model
    with vlmprune.prune(model, "uniform@9") as run:
        generate(model, inputs)
    assert run.last.realised_tokens == [9, 9, 9] and run.last.grids == [((6, 6),), ((4, 10),), ((10, 4),)]
    # what the tokens in front of the patches receive is no score of a patch
    with vlmprune.prune(model, "fastervlm(cls='mean')@9") as run:
        generate(model, inputs)
    assert run.last.realised_tokens == [9, 9, 9]
    for spec in ("fastv@9", "var"):
        with pytest.raises(UnsupportedError, match="few of whose layers attend"):
            vlmprune.attach(model, spec)
    with (
        pytest.raises(CaptureError, match=r"pixel_values_videos has shape .* as processed"),
        vlmprune.prune(model, "random@9"),
    ):
        model.get_video_features(torch.zeros(2, 3, 84, 84))
    with (
        pytest.raises(CaptureError, match="image_grid_hw is missing"),
        vlmprune.prune(model, "random@9"),
    ):
        model.get_image_features(inputs["pixel_values"], None)
    with pytest.raises(UnsupportedError, match="is a part of a nemotron_h_omni model"):
        adapter_for(PartOf(model.config))


def test_states_are_read_through_the_final_norm_of_lfm2_which_has_another_name() -> None:
    model, inputs = available("lfm2_vl"), tiny_inputs("lfm2_vl")
    with vlmprune.prune(model, "dart@9") as run:
        generate(model, inputs)
    assert run.last.realised_tokens == [9]


def test_drafts_are_refused_where_they_cannot_be_told_from_the_prompt() -> None:
    model, inputs = available("qwen2_5_omni_thinker"), tiny_inputs("qwen2_5_omni_thinker", text_len=9)
    drafts = {"prompt_lookup_num_tokens": 3, "eos_token_id": 2**20}
    with pytest.raises(UnsupportedError, match="generate without drafts"), vlmprune.prune(model, "fastv@9"):
        generate(model, inputs, **drafts)
    with vlmprune.prune(model, "divprune@9") as run:
        generate(model, inputs, **drafts)
    assert run.last.realised_tokens == [9]


class PartOf(torch.nn.Module):
    """Something with the config of a whole model and no decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def generate(self) -> None:
        raise NotImplementedError


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="this one runs it; the refusal is of later ones"
)
def test_llama4_is_refused_since_transformers_cannot_run_it() -> None:
    """When this fails it can be run, and the refusal has to go."""
    text = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size_mlp": 64}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "num_local_experts": 2}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 84, "patch_size": 14, "projector_output_dim": 64, "vision_output_dim": 64}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    model = transformers.Llama4ForConditionalGeneration(config)
    with pytest.raises(AttributeError, match="image_outputs"), torch.no_grad():
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(UnsupportedError, match=r"transformers 5.24 cannot run it"):
        adapter_for(model)


UNREAD = [name for name, family in FAMILIES.items() if not family.reads_tower]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if sampled(f, 3) else pytest.mark.slow) for f in UNREAD]
)
def test_what_reads_the_tower_is_refused_where_nothing_is_read(family: str) -> None:
    model = available(family)
    with pytest.raises(UnsupportedError, match="use a method that reads features only"):
        vlmprune.attach(model, "fastervlm(cls=mean)@9")
    assert adapter_for(model).projector is None and adapter_for(model).note == ""


def test_learned_queries_stand_for_no_places() -> None:
    model, inputs = available("idefics2"), tiny_inputs("idefics2")
    with pytest.raises(GridError, match="rows and columns"), vlmprune.prune(model, "pool@9"):
        generate(model, inputs)


def test_a_tiny_model_of_somebody_else_needs_what_builds_it() -> None:
    from vlmprune.testing.families import add_family

    facts: Family = FAMILIES["llava"]
    with pytest.raises(vlmprune.errors.SpecError, match="has no build"):
        add_family(facts)


def test_a_special_mark_starts_pictures_of_the_thinkers() -> None:
    """Their positions are made by that mark: at the beginning of a text it would be taken for a picture."""
    model, inputs = available("qwen3_omni_moe_thinker"), tiny_inputs("qwen3_omni_moe_thinker")
    kept = dense_rows(model, inputs)[0]
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    rows, cols = kept.positions[1:, 0, first : first + 36] - kept.positions[1:, 0, first : first + 1]
    assert rows.tolist() == [n // 6 for n in range(36)] and cols.tolist() == [n % 6 for n in range(36)]


def test_classes_that_carry_two_model_types() -> None:
    for family, config in (("glmga", "GlmgaConfig"), ("shieldgemma2", "ShieldGemma2Config")):
        if missing(family):
            continue
        model = tiny_model(family)
        assert type(model.config).__name__ == config and adapter_for(model).model_type == family
