# SPDX-License-Identifier: Apache-2.0
"""Re-weighting inside a model equals an eager twin that edits its attention maps, row by row, token by
token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.methods.var.sinks import find_sink_dims, save_recipe
from vlmprune.testing.conformance import generate
from vlmprune.testing.reference import Kept, kept_by_hand, merged_embeddings
from vlmprune.testing.reference_attention import AttentionTwin, visual_columns
from vlmprune.testing.tiny import LLAVA_FAMILIES, tiny_inputs, tiny_model, tiny_row

# on random tiny models many tokens are mild sinks: thresholds low enough that heads are edited, high enough
# that not all are
OPTIONS = "dims=[7,21],tau=2.0,max_sink_portion=0.6,min_visual_mass=0.1,first_layer=1"
SPEC = f"var({OPTIONS})"
EAGER_TO_EDIT = "var(dims=[7,21,30],tau=1.2,max_sink_portion=0.9,min_visual_mass=0.0,first_layer=1)"


def three_beams(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The three best answers (B, 3, 5), and how likely they are (B, 3)."""
    asked = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad():
        found = model.generate(**inputs, **asked, max_new_tokens=5, do_sample=False)
    return found.sequences[:, -5:].unflatten(0, (-1, 3)), found.sequences_scores.unflatten(0, (-1, 3))


@pytest.mark.parametrize("family", LLAVA_FAMILIES)
def test_answers_equal_an_eager_twin_in_a_ragged_batch(family: str) -> None:
    images = (1, 2, 0, 1)
    model, eager, inputs = tiny_model(family), tiny_model(family), tiny_inputs(family, images=images)
    eager.set_attn_implementation("eager")
    method = vlmprune.parse(SPEC).build()[0].method
    embeds = merged_embeddings(eager, inputs)
    with vlmprune.prune(model, SPEC):
        ids = generate(model, inputs)
        static = generate(model, inputs, cache_implementation="static")
    # several pictures per row with beams are mixed up by transformers up to 5.17, without any hook
    single = tiny_inputs(family, images=(1, 0, 1))
    with vlmprune.prune(model, EAGER_TO_EDIT):
        beams, chances = three_beams(model, single)
        alone = {i: three_beams(model, tiny_row(single, family, i, (1, 0, 1))) for i in (0, 2)}
    edited = 0
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        visual = visual_columns(model, inputs["input_ids"][row, mask]).tolist()
        twin = AttentionTwin(
            eager, method, Kept(embeds[row : row + 1, mask], torch.arange(int(mask.sum()))[None]), visual
        )
        assert ids[row].tolist() == twin.greedy(5), f"row {row}"
        edited += twin.edited
    assert edited > 50, "hardly any head was edited: the comparison says nothing"
    assert torch.equal(static, ids)
    for i, (answers, chance) in alone.items():
        torch.testing.assert_close(chances[i], chance[0], atol=1e-4, rtol=0)
        # two of them may be as likely to the last digit, and then stand in either order
        assert answers[0, 0].tolist() in beams[i].tolist()


def test_the_model_answers_otherwise_than_dense_and_is_left_as_it_was() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, SPEC) as run:
            changed = model(**inputs).logits
        assert run.last.dense_tokens == run.last.realised_tokens == [36]
        assert not torch.allclose(changed, dense, atol=1e-3)
        assert torch.equal(model(**inputs).logits, dense)


def test_keeping_everything_on_sinks_changes_nothing() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, f"var({OPTIONS},sink_keep=1.0)"):
            assert torch.allclose(model(**inputs).logits, dense, atol=2e-5)


def test_it_composes_with_a_cut_before_the_language_model() -> None:
    model, eager, inputs = tiny_model(), tiny_model(), tiny_inputs()
    eager.set_attn_implementation("eager")
    with vlmprune.prune(model, f"{SPEC}+fastervlm@9") as run:
        ids = generate(model, inputs)[0].tolist()
    kept = kept_by_hand(eager, inputs, run.last.keep, "compact")[0]
    columns = visual_columns(model, inputs["input_ids"][0])
    first = int(columns.nonzero()[0])
    visual = [first <= i < first + 9 for i in range(kept.embeds.shape[1])]
    method = vlmprune.parse(SPEC).build()[0].method
    assert ids == AttentionTwin(eager, method, kept, visual).greedy(5)
    assert run.last.realised_tokens == [9]


def test_two_methods_of_one_stage_are_refused() -> None:
    with pytest.raises(vlmprune.VlmPruneError, match="both act in the slot 'before_lm'"):
        vlmprune.prune(tiny_model(), "fastervlm@9+uniform@4")


def test_a_backbone_without_sinks_is_refused_and_the_error_says_what_to_do() -> None:
    model = tiny_model()
    with pytest.raises(vlmprune.VlmPruneError, match=r"no sink dimensions.*var\(dims="):
        vlmprune.prune(model, "var")
    with pytest.raises(vlmprune.VlmPruneError, match="64 dimensions"):
        vlmprune.prune(model, "var(dims=[1415,2533])")


def test_sink_dimensions_are_found_with_one_token() -> None:
    lm = tiny_model(layers=8).model.language_model
    with torch.no_grad():
        lm.embed_tokens.weight[:, [5, 40]] += 60.0
    assert find_sink_dims(lm, tau=4.0) == (5, 40)


def test_a_recipe_holds_what_the_search_found_and_belongs_to_its_backbone(tmp_path: Path) -> None:
    model, path = tiny_model(layers=8), tmp_path / "recipe.yaml"
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[:, [5, 40]] += 60.0
    assert save_recipe(model, path, tau=4.0) == (5, 40)
    with vlmprune.prune(model, f"var(recipe={str(path)!r},tau=4.0)") as run:
        assert run.slots["attention"].method.dims == (5, 40)
    with pytest.raises(vlmprune.VlmPruneError, match="this backbone is"):
        vlmprune.prune(tiny_model(layers=4), f"var(recipe={str(path)!r},tau=4.0)")
    with pytest.raises(vlmprune.VlmPruneError, match="cannot be read"):
        vlmprune.prune(model, f"var(recipe={str(tmp_path / 'none.yaml')!r},tau=4.0)")
