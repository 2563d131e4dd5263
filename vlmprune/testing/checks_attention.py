# SPDX-License-Identifier: Apache-2.0
"""Checks of methods that edit attention: nothing is cut, answers equal an eager twin that edits its maps."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..api import prune
from ..core.method import Method
from ..hooks.sequence.cache import cache_name, state_of
from ..hooks.session import Session
from .conformance import RAGGED, Subject, expect, generate, report_of
from .reference import dense_rows, kept_by_hand, language_model, merged_embeddings, placeholder_columns
from .reference_attention import AttentionTwin, visual_columns


def tower_marks(run: Session, inputs: dict[str, Tensor]) -> Tensor | None:
    """(B, S) marks over the slots of a prompt, of a method that makes them from the vision tower."""
    slot = run.slots["attention"]
    if type(slot.method).mark_tokens is Method.mark_tokens:
        return None
    # marks of a prompt are in the state that its cache carries
    with torch.no_grad():
        output = run.adapter.model(**inputs, use_cache=True)
    name = cache_name(inspect.signature(run.adapter.model.forward).parameters)
    state = state_of(output[name])
    if state is None:
        raise AssertionError("the cache carries no marks")
    # marks of the tower are the same in every layer
    return next(iter(state.marks.values())).marked


def edit_equals_eager_twin(subject: Subject) -> None:
    """Greedy answers of a ragged batch equal those of an eager model whose maps are edited, token by
    token."""
    model, inputs = subject.fresh_model(), subject.inputs(RAGGED)
    model.set_attn_implementation("eager")
    # read while nothing is attached
    rows = dense_rows(model, inputs)
    method = subject.method.prepare(language_model(model))
    with subject.prune() as run:
        ids = generate(subject.model, inputs)
        marks = tower_marks(run, inputs)
        expect(marks is None or bool(marks.any()), "nothing was marked")
        expect(
            not report_of(run).pruned and sum(report_of(run).dense_tokens) > 0,
            f"nothing may be cut: {run.last}",
        )
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        visual = visual_columns(model, inputs["input_ids"][row, mask]).tolist()
        # the row without its padding
        own = None if marks is None else marks[row][mask].tolist()
        twin = AttentionTwin(model, method, rows[row], visual, own)
        want = twin.greedy(ids.shape[1])
        expect(ids[row].tolist() == want, f"row {row}: answer {ids[row].tolist()}, twin {want}")


def composes_with_a_cut(subject: Subject) -> None:
    """Beside a cut before the language model the edit works on the kept sequence."""
    model, inputs = subject.fresh_model(), subject.inputs((1,))
    model.set_attn_implementation("eager")
    method = subject.method.prepare(language_model(model))
    with prune(subject.model, f"{subject.spec}+random@9") as run:
        ids = generate(subject.model, inputs)[0].tolist()
        marks = tower_marks(run, inputs)
    expect(
        report_of(run).realised_tokens == [9], f"{report_of(run).realised_tokens} tokens kept, expected [9]"
    )
    plain = visual_columns(model, inputs["input_ids"][0])
    kept = kept_by_hand(
        model, inputs, report_of(run).keep, run.attachment.policy(run.slots["before_lm"].method)
    )[0]
    # text may stand between the rows of a picture (Molmo 2)
    patches = placeholder_columns(model, inputs["input_ids"], merged_embeddings(model, inputs))[0]
    gone = set(patches) - {patches[i] for i in report_of(run).keep[0].keep_idx.tolist()}
    visual = [yes for column, yes in enumerate(plain.tolist()) if column not in gone]
    own = None if marks is None else marks[0, -len(visual) :].tolist()
    want = AttentionTwin(model, method, kept, visual, own).greedy(len(ids))
    expect(ids == want, f"answer {ids}, twin {want}")


CHECKS = {"edit_equals_eager_twin": edit_equals_eager_twin, "composes_with_a_cut": composes_with_a_cut}
