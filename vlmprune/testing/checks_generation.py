# SPDX-License-Identifier: Apache-2.0
"""Checks of generate: every mode equals the same mode of a model that is simply given the kept embeddings."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from ..errors import InvariantError, UnsupportedError
from ..hooks.sequence.cache import cache_in, cache_name
from .checks_inside import (
    drafts_are_no_prompt,
    eager_model,
    every_mode_equals_twin,
    second_turn_equals_twin,
    with_any_cache,
)
from .conformance import Subject, expect, generate, report_of
from .families import family_of
from .reference import dense_rows, greedy, kept_by_hand, legible, read_rows
from .reference_inside import masked
from .reference_masks import any_window

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "three sampled answers": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "beam search": {"num_beams": 3},
    "two of four beams": {"num_beams": 4, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


def every_mode_equals_kept_embeddings(subject: Subject) -> None:
    """Greedy, sampling with a seed, beams, returned sequences, static cache, no cache."""
    if subject.inside:
        # drafts take part in PaliGemma's prompt, which attends both ways, also without pruning, and
        # transformers takes none of models with a running state
        if subject.family != "paligemma" and not family_of(subject.family).hybrid:
            drafts_are_no_prompt(subject)
        return every_mode_equals_twin(subject, MODES)
    inputs = subject.inputs((1,))
    dense = dense_rows(subject.model, inputs)[0]
    # a policy under which it can be told which columns are read
    places = legible(subject.model, dense)
    with subject.prune(positions=places):
        kept, columns = read_rows(subject.model, inputs, dense)
    hybrid = family_of(subject.family).hybrid
    # no mask over a full cache can say what these models see
    narrow = hybrid or any_window(subject.model, inputs["input_ids"].shape[1] + 5)
    # the model is given what is left, and nothing is attached
    plain = {
        "inputs_embeds": kept.embeds,
        "attention_mask": torch.ones(kept.embeds.shape[:2], dtype=torch.long),
    }
    for mode, options in MODES.items():
        torch.manual_seed(0)  # the same draws on both sides
        if columns is None:
            want = generate(subject.model, plain, **options)
        elif (
            not narrow
        ):  # generate cannot be told places in pictures or token types: the reference masks what is cut
            model = eager_model(subject.family, subject.tower, subject.text)
            with masked(model, {0: columns}, {0: (columns, kept.embeds[0])}):
                want = generate(model, inputs, **with_any_cache(options))
        elif mode in ("greedy", "static cache", "no cache"):  # their answer is the greedy one
            want = torch.tensor([greedy(subject.model, kept, 5)])
        else:
            # windows count held tokens, and running states take in masked ones: no mask can say either of a
            # cache that holds all
            continue
        torch.manual_seed(0)
        with subject.prune(positions=places):
            got = generate(subject.model, inputs, **options)
        expect(torch.equal(got, want), f"{mode}: {got.tolist()}, expected {want.tolist()}")
    return None


def beams_equal_rows_alone(subject: Subject, seed: int = 0) -> None:
    """Beam search over a ragged batch gives every row what it gives the row alone."""
    images = (1, 0, 1)
    inputs = subject.inputs(images, seed=seed)
    with subject.prune():
        beams = generate(subject.model, inputs, num_beams=3)
        for i in range(len(images)):
            alone = generate(subject.model, subject.row(inputs, i, images), num_beams=3)[0]
            expect(
                torch.equal(beams[i], alone),
                f"beams of row {i}: {beams[i].tolist()} in the batch, {alone.tolist()} alone",
            )


def batched_modes_agree(subject: Subject) -> None:
    """In a ragged batch static cache and no cache equal the dynamic cache; beams of every row equal those of
    the row alone.
    """
    # of two beams with equal scores rounding takes one, in a batch perhaps the other: no two prompts do that
    try:
        beams_equal_rows_alone(subject)
    except AssertionError:
        beams_equal_rows_alone(subject, seed=1)
    images = (1, 0, 1)
    inputs = subject.inputs(images)
    with subject.prune():
        want = generate(subject.model, inputs)
        for mode in ("static cache", "no cache"):
            got = generate(subject.model, inputs, **MODES[mode])
            expect(torch.equal(got, want), f"{mode}: {got.tolist()}, dynamic cache gave {want.tolist()}")


def second_turn(subject: Subject) -> None:
    """A second question on the kept cache, and on a deep copy of it, equals recomputing the whole dialogue on
    the kept tokens.
    """
    if subject.inside:
        return second_turn_equals_twin(subject)
    for positions in subject.policies:
        inputs = subject.inputs((1,))
        prompt = inputs["input_ids"].shape[1]
        question = subject.inputs((0,), seed=5)["input_ids"]
        with subject.prune(positions=positions) as run, torch.no_grad():
            first = subject.model.generate(
                **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
            )
            maps, cache = report_of(run).keep, cache_in(first)
            # slots that are held, tokens that were seen
            held, seen = int(cache.get_seq_length(0)), int(cache.get_seq_length())
            dropped = sum(report_of(run).dense_tokens) - sum(report_of(run).realised_tokens)
            if subject.keeps_nothing:  # newlines too
                dropped = int((inputs["input_ids"] == subject.model.config.image_token_id).sum())
            expect(
                seen - held == dropped, f"the cache says {seen} seen and {held} held, {dropped} were dropped"
            )
            ids = torch.cat([first.sequences, question], 1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            # before the first answer, which lets the cache grow
            copied = copy.deepcopy(cache)
            answers = [generate(subject.model, turn, cache=c) for c in (cache, copied)]
        expect(torch.equal(*answers), "a deep-copied cache answers differently")
        # merged rows are not among the dense ones
        if subject.makes_rows:
            continue
        kept = kept_by_hand(subject.model, inputs, maps, positions, subject.keeps_nothing)[0]
        with torch.no_grad():
            tail = subject.model.get_input_embeddings()(ids[:, prompt:])
        want = greedy(subject.model, kept.grown(tail), 5)
        if answers[0][0].tolist() != want and not dense_turns_agree(subject.model, inputs, question):
            raise UnsupportedError(
                f"transformers numbers a second turn of {subject.family} otherwise than the first one goes "
                "on, without pruning too; give the whole conversation with its pictures again"
            )
        expect(
            answers[0][0].tolist() == want,
            f"{positions}: second answer {answers[0][0].tolist()}, by hand {want}",
        )
    return None


@torch.no_grad()
def dense_turns_agree(model: Any, inputs: dict[str, torch.Tensor], question: torch.Tensor) -> bool:
    """Whether a second turn of the model as it is follows the positions of its first answer."""
    first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, question], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tail = model.get_input_embeddings()(ids[:, inputs["input_ids"].shape[1] :])
    want = greedy(model, dense_rows(model, inputs)[0].grown(tail), 5)
    return generate(model, turn, cache=cache_in(first))[0].tolist() == want


def detached_cache_is_refused(subject: Subject) -> None:
    """A cut cache cannot be continued after detach without anyone noticing."""
    inputs = subject.inputs((1,))
    with subject.prune() as run, torch.no_grad():
        first = subject.model.generate(
            **inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
        )
        dropped = report_of(run).pruned
    if not dropped:
        return
    try:
        with torch.no_grad():
            ids = torch.cat([first.sequences, first.sequences[:, -1:]], 1)
            generate(subject.model, {"input_ids": ids}, cache=cache_in(first), max_new_tokens=2)
    except InvariantError as error:
        expect("detached" in str(error), f"unclear error: {error}")
        return
    raise AssertionError("a cut cache was continued on a detached model")


def hand_written_loop(subject: Subject) -> None:
    """A decode loop without masks and positions gives the same answer as generate."""
    inputs = subject.inputs((1,))
    with subject.prune(), torch.no_grad():
        want, got = generate(subject.model, inputs)[0].tolist(), by_loop(subject.model, inputs)[0]
    # without pruning too, and so no fault of a cut
    if got != want and _reads_loops_otherwise(subject.model, inputs):
        raise UnsupportedError(
            f"transformers answers with {subject.family} otherwise in a loop without masks, without pruning "
            "too; use generate"
        )
    expect(got == want, f"loop gave {got}, generate {want}")


@torch.no_grad()
def _reads_loops_otherwise(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether a loop and generate differ in their ids, or in the first logits where these are the same by
    chance.
    """
    answer = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ids, first = by_loop(model, inputs)
    same = answer.sequences[0, inputs["input_ids"].shape[1] :].tolist() == ids
    return not (same and torch.allclose(first, answer.logits[0][0], rtol=0, atol=1e-3))


@torch.no_grad()
def by_loop(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    """Five greedy ids of a batch of one, from a loop that gives the model no mask and no positions, and the
    logits of the first.
    """
    # as generate does: ids of placeholders are never made
    banned = model.generation_config.suppress_tokens or []
    output = model(
        **{name: value for name, value in inputs.items() if name != "attention_mask"}, use_cache=True
    )
    name = cache_name(inspect.signature(model.forward).parameters)
    got: list[int] = []
    first = output.logits[0, -1]
    for _ in range(5):
        logits = output.logits[0, -1].clone()
        logits[banned] = -torch.inf
        got.append(int(logits.argmax()))
        ids = torch.tensor([[got[-1]]])
        output = model(input_ids=ids, use_cache=True, **{name: cache_in(output)})
    return got, first


CHECKS = {
    "every_mode_equals_kept_embeddings": every_mode_equals_kept_embeddings,
    "batched_modes_agree": batched_modes_agree,
    "second_turn": second_turn,
    "detached_cache_is_refused": detached_cache_is_refused,
    "hand_written_loop": hand_written_loop,
}
