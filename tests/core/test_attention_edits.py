# SPDX-License-Identifier: Apache-2.0
"""Edits of weights, of logits and of head outputs inside a model equal an eager twin, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import vlmprune
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.hooks.sequence.cache import state_of
from vlmprune.methods.act import ACT
from vlmprune.methods.paint import LOCAL, PAINT, SUMMARY
from vlmprune.methods.var.sinks import backbone
from vlmprune.methods.vhr import VHR
from vlmprune.testing.checks_attention import composes_with_a_cut, edit_equals_eager_twin
from vlmprune.testing.conformance import Subject, generate
from vlmprune.testing.reference import dense_rows
from vlmprune.testing.reference_attention import AttentionTwin, visual_columns
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row

ACT_SPEC = "act(threshold=0.05,first_layer=1)"
PAINT_SPEC = "paint(first_layer=1)"
CELLS = [
    ("act(threshold=0.05,first_layer=1,edit=all,min_queries=4,spare=column0)", "llava"),
    pytest.param("act(threshold='2/L',first_layer=1,edit=last)", "qwen2_vl", marks=pytest.mark.slow),
    ("paint(first_layer=1,cls=mean,summary=3)", "qwen3_vl"),
    pytest.param("vhr(layers=[0,-1],alpha=3.0,variant=squared_guarded)", "gemma3", marks=pytest.mark.slow),
    ("vhr", "paligemma"),
]
VAR_SPEC = "var(dims=[7,21,30],tau=1.2,max_sink_portion=0.9,min_visual_mass=0.0,first_layer=1)"
SPECS = [ACT_SPEC, PAINT_SPEC, "vhr"]
# one of each kind of slot by default
SAMPLED = [ACT_SPEC, pytest.param(PAINT_SPEC, marks=pytest.mark.slow), "vhr"]


@pytest.mark.parametrize(("spec", "family"), CELLS)
def test_answers_of_a_ragged_batch_equal_an_eager_twin(spec: str, family: str) -> None:
    edit_equals_eager_twin(Subject(spec, family))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl", "smolvlm", "qwen2_5_vl"])
@pytest.mark.parametrize("spec", [ACT_SPEC, "paint(first_layer=1,cls=mean)", "vhr"])
def test_the_twin_on_other_families(spec: str, family: str) -> None:
    edit_equals_eager_twin(Subject(spec, family))
    composes_with_a_cut(Subject(spec, family))


@pytest.mark.parametrize("spec", SAMPLED)
def test_a_batch_row_answers_as_it_does_alone_with_beams_and_static_caches(spec: str) -> None:
    model, images = tiny_model(), (1, 0, 1)
    inputs = tiny_inputs(images=images)
    with vlmprune.prune(model, spec):
        beams = generate(model, inputs, num_beams=3)
        alone = [generate(model, tiny_row(inputs, "llava", i, images), num_beams=3)[0] for i in (0, 2)]
        greedy = generate(model, inputs)
        static = generate(model, inputs, cache_implementation="static")
        without = generate(model, inputs, use_cache=False)
    assert torch.equal(beams[[0, 2]], torch.stack(alone))
    assert torch.equal(greedy, static)
    assert torch.equal(greedy, without)


@pytest.mark.parametrize("spec", SPECS)
def test_it_changes_the_model_and_leaves_it_as_it_was(spec: str) -> None:
    model, inputs, text = tiny_model(), tiny_inputs(), tiny_inputs(images=(0,))
    with torch.no_grad():
        dense, plain = model(**inputs).logits, model(**text).logits
        with vlmprune.prune(model, spec) as run:
            assert not torch.allclose(model(**inputs).logits, dense, atol=1e-2)
            assert torch.equal(model(**text).logits, plain)
            assert run.last.note == "no images in this call"
        assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize(
    "spec", ["act(beta=1.0,threshold=0.05)", "paint(alpha=0.0,beta=0.0)", "vhr(alpha=1.0)"]
)
def test_strength_zero_is_dense_to_the_bit(spec: str) -> None:
    model, inputs = tiny_model(), tiny_inputs(images=(1, 1))
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, spec):
            assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("spec", [*SAMPLED, VAR_SPEC])
def test_it_composes_with_a_cut_inside_the_language_model(spec: str) -> None:
    model, inputs = tiny_model(), tiny_inputs(images=(1, 1))
    with vlmprune.prune(model, f"{spec}+fastv(layer=2)@9") as run:
        together = generate(model, inputs)
        assert run.last.tokens_per_layer == [36, 36, 9, 9]
        for row in range(2):
            assert torch.equal(generate(model, tiny_row(inputs, "llava", row, (1, 1)))[0], together[row])
        with torch.no_grad():
            edited = model(**inputs).logits
    with vlmprune.prune(model, "fastv(layer=2)@9"), torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, edited, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_a_second_turn_goes_on_with_what_the_first_one_found(spec: str) -> None:
    model, inputs = tiny_model(), tiny_inputs()
    more = torch.tensor([[7, 9, 11]])
    with vlmprune.prune(model, spec), torch.no_grad():
        first = model(**inputs, use_cache=True)
        marks = {layer: one.marked for layer, one in state_of(first.past_key_values).marks.items()}
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
        both = model(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values)
        state = state_of(both.past_key_values)
        assert all(torch.equal(state.marks[layer].marked, one) for layer, one in marks.items())
        one_by_one = model(**inputs, use_cache=True).past_key_values
        for column in range(3):
            step = model(
                input_ids=more[:, column : column + 1],
                attention_mask=mask[:, : mask.shape[1] - 2 + column],
                past_key_values=one_by_one,
            )
    if spec != PAINT_SPEC:  # which edits the last row of a call only
        assert torch.allclose(both.logits[0, -1], step.logits[0, -1], atol=1e-4)


def test_marks_are_those_of_an_eager_tower() -> None:
    model, eager, images = tiny_model(), tiny_model(), (1, 2)
    inputs = tiny_inputs(images=images)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
        with vlmprune.prune(model, PAINT_SPEC):
            cache = model(**inputs, use_cache=True).past_key_values
    first, late = (maps[block][:, :, 0, 1:].sum(1).double() for block in (0, -2))  # (pictures, N)
    wanted = []
    for low_block, g in zip(first, late, strict=True):
        low, high = g.quantile(0.25), g.quantile(0.75)
        marks = torch.zeros(len(g), dtype=torch.int8)
        marks[low_block.argsort(descending=True, stable=True)[: len(g) // 4]] = LOCAL
        marks[g > high + 1.5 * (high - low)] = SUMMARY
        wanted.append(marks)
    found = state_of(cache).marks[1].marked
    columns = inputs["input_ids"] == model.config.image_token_id
    assert torch.equal(found[columns], torch.cat(wanted))
    assert not found[~columns].any()


def test_newlines_of_tiles_are_in_no_set() -> None:
    model, inputs = tiny_model("llava_next"), tiny_inputs("llava_next")
    with vlmprune.prune(model, "paint(first_layer=1,local_ratio=1.0,summary=0)") as run, torch.no_grad():
        marked = state_of(model(**inputs, use_cache=True).past_key_values).marks[1].marked
    assert int((marked == LOCAL).sum()) == run.last.dense_tokens[0]
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) > run.last.dense_tokens[0]


def recipe(path: Path, model: object, heads: dict) -> str:
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads")
    written = dict(zip(names, backbone(model.model.language_model.config), strict=True))
    path.write_text(yaml.safe_dump({**written, "heads": heads}), encoding="utf-8")
    return f"act(threshold=0.05,recipe={str(path)!r})"


def test_a_recipe_edits_its_heads_only(tmp_path: Path) -> None:
    model, inputs = tiny_model(), tiny_inputs(images=(1, 2))
    spec = recipe(tmp_path / "heads.yaml", model, {1: [3, 0], 2: [1]})
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    method = vlmprune.parse(spec).build()[0].method.prepare(eager.model.language_model)
    with vlmprune.prune(model, spec):
        ids = generate(model, inputs)
    rows = dense_rows(eager, inputs)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        visual = visual_columns(eager, inputs["input_ids"][row, mask]).tolist()
        twin = AttentionTwin(eager, method, rows[row], visual)
        assert ids[row].tolist() == twin.greedy(5)
        assert twin.edited
    with vlmprune.prune(model, ACT_SPEC):
        assert not torch.equal(generate(model, inputs), ids)


def test_recipes_of_other_backbones_and_heads_that_are_not_there_are_refused(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "heads.yaml"
    spec = recipe(path, model, {1: [0]})
    with pytest.raises(SpecError, match="this backbone is"):
        vlmprune.prune(tiny_model(layers=5), spec)
    for heads in ({9: [0]}, {1: [99]}, {1: [0, 0]}, {}):
        with pytest.raises(SpecError, match="expected distinct heads"):
            vlmprune.prune(model, recipe(path, model, heads))
    path.write_text("heads: 3")
    with pytest.raises(SpecError, match="cannot be read"):
        vlmprune.prune(model, f"act(recipe={str(path)!r})")


def test_marks_of_single_tokens_are_refused_beside_merging() -> None:
    for other in ("visionzip@9", "tome@9"):
        with pytest.raises(UnsupportedError, match="marks single tokens"):
            vlmprune.prune(tiny_model(), f"{PAINT_SPEC}+{other}")


def test_vhr_needs_text_and_the_whole_conversation() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    columns = inputs["input_ids"][0] == model.config.image_token_id
    bare = {**inputs, "input_ids": inputs["input_ids"][:, columns]}
    bare["attention_mask"] = torch.ones_like(bare["input_ids"])
    with vlmprune.prune(model, "vhr"), torch.no_grad():
        with pytest.raises(UnsupportedError, match="holds nothing else"):
            model(**bare)
        cache = model(**tiny_inputs(images=(0,)), use_cache=True).past_key_values
        held = cache.get_seq_length()
        longer = torch.ones(1, held + inputs["input_ids"].shape[1], dtype=torch.long)
        with pytest.raises(UnsupportedError, match="give all turns in one call"):
            model(**{**inputs, "attention_mask": longer}, past_key_values=cache)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ACT(threshold="L/5"), "expected a number such as 0.1, or '5/L'"),
        (lambda: ACT(threshold=-0.1), "threshold"),
        (lambda: ACT(spare="none"), "spare"),
        (lambda: ACT(first_layer=9).acts_on(4), "leaves no layer"),
        (lambda: PAINT(first_layer=4).acts_on(4), "leaves no layer"),
        (lambda: PAINT(local_ratio=1.5), "local_ratio"),
        (lambda: VHR(layers=(7,)).acts_on(4), "decoder layers of -4..3"),
        (lambda: VHR(variant="official"), "variant"),
    ],
)
def test_options_are_checked(make, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_layers_of_vhr_are_scaled_to_the_depth() -> None:
    assert VHR().acts_on(32) == [1, *range(18, 32)]
    assert VHR().acts_on(4) == [1, 2, 3]
    assert VHR(layers=(-1, 0)).acts_on(4) == [0, 3]


def test_a_row_whose_mass_lies_on_sinks_is_left_alone() -> None:
    rows = torch.tensor([[[[0.0, 0.4, 0.6], [0.2, 0.4, 0.4]]]])
    sinks = torch.tensor([[[False, True, True]]])
    edited = ACT(beta=0.5).reweight(rows, sinks, sinks[0])
    assert torch.equal(edited[0, 0, 0], rows[0, 0, 0])
    torch.testing.assert_close(edited[0, 0, 1], torch.tensor([0.6, 0.2, 0.2]))
