# SPDX-License-Identifier: Apache-2.0
"""Methods of several slots in one spec: counts in every layer, and rows of a batch as they are alone."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from vlmprune.core.combine import AS_INNER, VERBS_OF_INNER
from vlmprune.core.method import SLOTS, VERBS, Method
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row

IMAGES = (1, 2)
# what each of four decoder layers reads of a picture of 36 tokens; fractions are of these 36
COUNTS = {
    # 36, 14, 14, 6 read half of 36 on average; 12 are left when the first cut comes
    "visionzip@12+pyramiddrop(layers=[1,3])@0.5": [12, 12, 12, 6],
    "visionzip@12+fastv(layer=2)@0.5": [12, 12, 12, 12],
    "visionzip@12+fastv(layer=2)@4": [12, 12, 4, 4],
    "debias+fastervlm@9": [9, 9, 9, 9],
    "mmr+debias+fastervlm@9": [9, 9, 9, 9],
    "mmr(importance=rank)+hiprune@9": [9, 9, 9, 9],
    "debias+fastervlm@18+fastv(layer=1)@4": [18, 4, 4, 4],
}
# what a wrapper does not take over from the method inside
OF_THE_WRAPPER = {
    *("name", "paper", "licence", "wraps", "calibrated"),  # says it of itself
    *("score", "select", "ranking", "merge", "merge_ranked", "check_model"),  # asks the one inside in its own
    *("counts", "own"),  # a budget is all that may be wrapped
    "landing",  # cuts are those of the method inside, which has the option
    # of slots in which nothing is ranked
    *("rows", "mark_values", "acts_on", "heads_of", "prepare", "mark", "mark_columns", "mark_tokens"),
    *("looks_from", "shortens_at", *(verb for slot in SLOTS for verb in VERBS[slot])),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava")


@pytest.mark.parametrize(("spec", "counts"), COUNTS.items())
def test_every_layer_reads_what_the_spec_says_and_rows_are_as_alone(model, spec, counts):
    inputs = tiny_inputs("llava", images=IMAGES)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)  # as generate counts them
    with vlmprune.prune(model, spec) as run, torch.no_grad():
        together = model(**inputs, position_ids=positions).logits[:, -1]
        assert run.last.layer_tokens == [counts] * sum(IMAGES)
        assert run.last.realised_tokens == [counts[-1]] * sum(IMAGES)
        for row in range(len(IMAGES)):
            alone = model(**tiny_row(inputs, "llava", row, IMAGES)).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "error", "reason"),
    [
        ("fastervlm@9+divprune@4", UnsupportedError, "both act in the slot 'before_lm'"),
        ("flowcut@12/crop+fastervlm@9", UnsupportedError, "reads all of them behind it"),
        ("mmr+hiprune@9", SpecError, r"write mmr\(importance=rank\)\+hiprune@64"),
        ("mmr+divprune@9", SpecError, "divprune has none"),
        ("debias+mmr+fastervlm@9", SpecError, "'mmr' is a wrapper itself"),
        ("mmr+evs@9", UnsupportedError, "mmr reads the frames of one clip"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_its_reason(model, spec, error, reason):
    with pytest.raises(error, match=reason):
        vlmprune.attach(model, spec)


def test_of_every_attribute_it_is_said_whether_wrappers_have_it():
    there = {name for name in vars(Method) if not name.startswith("_")}
    assert there == {*AS_INNER, *VERBS_OF_INNER} | OF_THE_WRAPPER
    assert not {*AS_INNER, *VERBS_OF_INNER} & OF_THE_WRAPPER
