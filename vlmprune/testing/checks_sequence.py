# SPDX-License-Identifier: Apache-2.0
"""Checks of one forward: what the language model reads, in which order, at which positions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..api import prune, score
from ..core.keepmap import KeepMap
from ..errors import UnsupportedError
from .checks_inside import counts_follow_the_schedule, cut_equals_twin, gates_experts
from .conformance import RAGGED, Subject, close, expect, generate, report_of
from .reference import (
    dense_rows,
    entered,
    greedy,
    kept_by_hand,
    language_model,
    legible,
    logits_of,
    placeholder_columns,
    read_rows,
)


def keep_all_is_dense(subject: Subject) -> None:
    """keep = all: logits equal bit for bit, ids equal."""
    if subject.keeps_nothing:
        raise UnsupportedError(f"{subject.method.name} keeps nothing, whatever there is")
    cuts = subject.method.budgeted or subject.method.counts == "own"
    everything = subject.with_keep(1.0) if cuts else subject
    for images in ((1,), RAGGED):
        inputs = subject.inputs(images)
        with torch.no_grad():
            dense = subject.model(**inputs).logits
        ids = generate(subject.model, inputs)
        with everything.prune() as run, torch.no_grad():
            logits = subject.model(**inputs).logits
            expect(
                torch.equal(logits, dense),
                f"logits differ by {float((logits - dense).abs().max()):.1e} with everything kept",
            )
            expect(torch.equal(generate(subject.model, inputs), ids), "ids differ with everything kept")
            expect(
                report_of(run).realised_tokens == report_of(run).dense_tokens,
                "tokens were dropped at keep = 1.0",
            )


def cut_equals_hand_built(subject: Subject) -> None:
    """Cutting equals running the language model on hand-built kept embeddings, or its slow twin; both
    position policies.
    """
    if subject.inside:
        return cut_equals_twin(subject)
    if subject.makes_rows:
        return merged_rows_are_read(subject)
    inputs = subject.inputs(RAGGED)
    for positions in subject.policies:
        with subject.prune(positions=positions) as run:
            ids = generate(subject.model, inputs)
            maps = report_of(run).keep
            rows = [
                subject.model(**subject.row(inputs, i, RAGGED)).logits[0, -1].detach()
                for i in range(len(RAGGED))
            ]
        for i, kept in enumerate(kept_by_hand(subject.model, inputs, maps, positions, subject.keeps_nothing)):
            want = greedy(subject.model, kept, ids.shape[1])
            expect(ids[i].tolist() == want, f"{positions} row {i}: answer {ids[i].tolist()}, by hand {want}")
            close(rows[i], logits_of(subject.model, kept)[-1], f"{positions} row {i} logits")
    return None


def merged_rows_are_read(subject: Subject) -> None:
    """A merging method: text rows untouched and in order, the announced number of rows, decoding from those
    rows by hand.
    """
    model = subject.fresh_model()
    model.set_attn_implementation("eager")
    for images in ((1,), (2,)):
        inputs = subject.inputs(images)
        whole = dense_rows(model, inputs)[0]
        dense = whole.embeds[0]
        patches = set(placeholder_columns(model, inputs["input_ids"], dense[None])[0])
        # text and newlines
        others = torch.stack([dense[c] for c in range(len(dense)) if c not in patches])
        with prune(model, subject.spec, positions=legible(model, whole)) as run:
            ids = generate(model, inputs)[0]
            rows = entered(model, inputs)[0]
            report, kept = report_of(run), read_rows(model, inputs, whole)[0]
        visual = sum(report.realised_tokens)
        expect(
            len(rows) == len(others) + visual or report.keep[0].grids != report_of(run).keep[0].grids,
            f"{len(rows)} rows entered, expected {len(others)} + {visual}",
        )
        # one iterator for all: each row is looked for behind the one before, so that order counts
        wanted = iter(rows)
        missing = [i for i, row in enumerate(others) if not any(torch.equal(row, got) for got in wanted)]
        expect(not missing, f"text or newline rows {missing[:5]} were changed, lost or reordered")
        expect(
            any(not any(torch.equal(row, old) for old in dense) for row in rows),
            "no row was merged: all stand in the dense sequence",
        )
        want = greedy(model, kept, len(ids))
        expect(ids.tolist() == want, f"answer {ids.tolist()}, by hand {want}")


def order_and_report(subject: Subject) -> None:
    """Kept indices ascend; realised counts are those of the KeepMaps and of the budget; logits keep the full
    length.
    """
    inputs = subject.inputs(RAGGED)
    with subject.prune() as run, torch.no_grad():
        output = subject.model(**inputs, output_hidden_states=True)
    report, length = report_of(run), inputs["input_ids"].shape[1]
    expect(
        output.logits.shape[1] == length, f"logits have length {output.logits.shape[1]}, expected {length}"
    )
    expect(all(h.shape[1] == length for h in output.hidden_states), "hidden_states have not the full length")
    expect(
        len(report.dense_tokens) == sum(subject.pictures(RAGGED)),
        f"{len(report.dense_tokens)} pictures reported, expected {sum(subject.pictures(RAGGED))}",
    )
    expect(all(bool((one.keep_idx.diff() > 0).all()) for one in report.keep), "kept indices do not ascend")
    expect(report.firings.get("encode") == 1, f"hook firings {report.firings}")
    if subject.inside:
        return counts_follow_the_schedule(run)
    budget = run.budget
    kept = [0] * len(report.dense_tokens)
    for one in report.keep:
        kept[one.index] += len(one)  # the frames of a clip share an index
    for have, dense, realised in zip(kept, report.dense_tokens, report.realised_tokens, strict=True):
        if budget is not None and budget.scope == "image":
            expect(
                realised == budget.count(dense),
                f"{realised} tokens realised, the budget gives {budget.count(dense)} of {dense}",
            )
        if not subject.makes_rows:
            expect(have == realised, f"KeepMaps hold {have} tokens, {realised} were realised")
    return None


def batch_row_equals_alone(subject: Subject) -> None:
    """Row i of a ragged, left-padded batch equals running it alone, and right padding changes no row."""
    inputs = subject.inputs(RAGGED)
    with subject.prune() as run:
        together = generate(subject.model, inputs)
        counts = list(report_of(run).realised_tokens)
        alone_counts: list[int] = []
        for i, pictures in enumerate(subject.pictures(RAGGED)):
            row = subject.row(inputs, i, RAGGED)
            alone = generate(subject.model, row)[0]
            expect(
                torch.equal(alone, together[i]),
                f"row {i}: {together[i].tolist()} in the batch, {alone.tolist()} alone",
            )
            alone_counts += report_of(run).realised_tokens if pictures else []
        if run.budget is None or run.budget.scope != "total":
            expect(counts == alone_counts, f"realised {counts} in the batch, {alone_counts} alone")
        # positions are given, or a plain forward would count padding
        right = right_padded(inputs)
        with torch.no_grad():
            left_logits = [row[-1] for row in subject.model(**inputs, position_ids=numbered(inputs)).logits]
            right_logits = subject.model(**right, position_ids=numbered(right)).logits
        tolerance = 2e-4 if gates_experts(subject.model) else 2e-5  # they enlarge rounding
        for i, length in enumerate(right["attention_mask"].sum(1).tolist()):
            close(right_logits[i, length - 1], left_logits[i], f"right-padded row {i}", tolerance)


def right_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with its padding on the right."""
    # stable: real tokens first, and in their order
    order = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    shape = inputs["input_ids"].shape
    return {key: value.gather(1, order) if value.shape == shape else value for key, value in inputs.items()}


def numbered(inputs: dict[str, Tensor]) -> Tensor:
    """Positions that start at the first token of every row."""
    return (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)


def more_keeps_more(subject: Subject) -> None:
    """Where the method is nested, more budget never removes a token; the same call gives the same tokens."""
    if not subject.method.budgeted:
        return
    inputs = subject.inputs((1,))
    before: list[KeepMap] | None = None
    # 8 leaves room for the [CLS] rows of five crops; a schedule that reads everything first cannot go below
    # its share
    budgets: tuple[int | float, ...] = (0.4, 0.6, 0.8) if subject.inside else (8, 16, 24)
    for keep in (0.5, 0.7, 0.9) if subject.clips else budgets:
        picked = []
        for _ in range(2):  # the second time has to give the same
            with subject.with_keep(keep).prune() as run, torch.no_grad():
                subject.model(**inputs)
            picked.append(report_of(run).keep)
        same = all(a.keep_idx.tolist() == b.keep_idx.tolist() for a, b in zip(*picked, strict=True))
        expect(same, f"keep={keep} gave other tokens the second time")
        if before is not None and subject.method.nested:
            for small, large in zip(before, picked[0], strict=True):
                lost = set(small.keep_idx.tolist()) - set(large.keep_idx.tolist())
                expect(not lost, f"keep={keep} removed tokens {sorted(lost)} that a smaller budget kept")
        before = picked[0]


def highest_scores_are_kept(subject: Subject) -> None:
    """What is cut are the lowest scores, by a plain sort in which the lower index wins ties."""
    if (
        subject.method.kind() != "score" or not subject.method.budgeted or subject.inside
    ):  # the twin ranks by eager attention
        return
    inputs = subject.inputs((1,))
    whole = subject.with_keep(7)
    with whole.prune() as run, torch.no_grad():
        subject.model(**inputs)
    scores = score(subject.model, inputs, subject.method)[0].scores.tolist()
    want = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:7])
    expect(
        report_of(run).keep[0].keep_idx.tolist() == want,
        f"kept {report_of(run).keep[0].keep_idx.tolist()}, highest scores are {want}",
    )


def text_only_is_untouched(subject: Subject) -> None:
    """A call without images is bit-identical and recorded as such; so is the language model called by itself
    after a cut.
    """
    inputs = subject.inputs((0, 0))
    embeds = subject.model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        dense = subject.model(**inputs).logits
        alone = language_model(subject.model)(inputs_embeds=embeds).last_hidden_state
        with subject.prune() as run:
            subject.model(**subject.inputs((1, 1)))
            # nothing of the call before may be left in it
            inside = language_model(subject.model)(inputs_embeds=embeds).last_hidden_state
            logits = subject.model(**inputs).logits
    expect(torch.equal(logits, dense), "a text-only call changed")
    expect(torch.equal(inside, alone), "the language model called by itself changed")
    expect(
        report_of(run).note == "no images in this call", f"text-only call recorded as {report_of(run).note!r}"
    )


CHECKS = {
    "keep_all_is_dense": keep_all_is_dense,
    "cut_equals_hand_built": cut_equals_hand_built,
    "order_and_report": order_and_report,
    "batch_row_equals_alone": batch_row_equals_alone,
    "more_keeps_more": more_keeps_more,
    "highest_scores_are_kept": highest_scores_are_kept,
    "text_only_is_untouched": text_only_is_untouched,
}
