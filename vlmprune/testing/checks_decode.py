# SPDX-License-Identifier: Apache-2.0
"""Checks of methods that look while decoding: nothing is cut, and answers equal an eager twin with masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api import prune
from ..core.method import Look, Method
from ..errors import InvariantError
from ..hooks.attention_tap import find_attention
from .conformance import RAGGED, Subject, expect, generate, report_of
from .reference import (
    Kept,
    dense_rows,
    greedy,
    kept_by_hand,
    language_model,
    merged_embeddings,
    placeholder_columns,
)


class Looking:
    """Hides by hand what a method hides, while the whole sequence is computed again for every new token.

    Every step is a row of the mask from the first layer that sees less; rows of earlier steps stay as they
    were decided.

    Args:
        model: in eager attention.
        method: with ``look``.
        visual: (n,) bool, columns of patches in the prompt.
    """

    def __init__(self, model: Any, method: Method, visual: Tensor) -> None:
        self.model, self.method, self.visual = model, method, visual
        self.layers = language_model(model).layers
        self.first = method.looks_from(len(self.layers))
        self.before: Look | None = None
        self.hidden: list[Tensor] = []  # (n,) bool per step

    def answer(self, kept: Kept, new_tokens: int) -> list[int]:
        """Greedy ids of one prompt."""
        watched = find_attention(self.layers[self.first - 1])
        if watched is None:
            raise InvariantError(f"decoder layer {self.first - 1} has no attention; expected one to look at")
        handles = [watched.register_forward_hook(self._watch)]
        for layer in self.layers[self.first :]:
            handles.append(layer.register_forward_pre_hook(self._mask, with_kwargs=True))
        try:
            return greedy(self.model, kept, new_tokens)
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, module: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        length, prompt = output[1].shape[-1], len(self.visual)
        # the prompt is no step: it sees everything
        if length == prompt:
            return
        # new tokens are no patches
        visual = torch.nn.functional.pad(self.visual, (0, length - prompt))[None]
        a = output[1][:, :, -1].float().mean(dim=1).masked_fill(~visual, 0.0)  # of (1, H, n, n)
        # the step before had one slot less
        before = None if self.before is None else self.before.fit(length)
        seen = self.method.look(a, visual, before)
        self.before = Look(a, seen)
        self.hidden.append((visual & ~seen)[0, :prompt])

    def _mask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask, prompt = kwargs["attention_mask"].clone(), len(self.visual)  # (1, 1, n, n)
        lowest = torch.finfo(mask.dtype).min
        # row prompt + step made the next token; what that step hid is hidden again
        for step, hidden in enumerate(self.hidden):
            mask[0, 0, prompt + step, :prompt] = mask[0, 0, prompt + step, :prompt].masked_fill(
                hidden, lowest
            )
        return args, {**kwargs, "attention_mask": mask}


def patches_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, L) bool, columns of patches, without newline and [CLS] embeddings."""
    found = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    columns = placeholder_columns(model, inputs["input_ids"], merged_embeddings(model, inputs))
    for row, own in zip(found, columns, strict=True):
        row[own] = True
    return found


def steps_equal_eager_twin(subject: Subject) -> None:
    """Greedy answers of a ragged batch equal those of an eager model under masks by hand, row by row."""
    model, inputs = subject.fresh_model(), subject.inputs(RAGGED)
    model.set_attn_implementation("eager")
    rows, patches = dense_rows(model, inputs), patches_of(model, inputs)
    with subject.prune() as run:
        ids = generate(subject.model, inputs, max_new_tokens=7)
        expect(not report_of(run).pruned, f"nothing may be cut: {run.last}")
    hides = 0
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        twin = Looking(model, subject.method, patches[row][mask])
        want = twin.answer(rows[row], 7)
        hides += sum(int(one.sum()) for one in twin.hidden)
        expect(ids[row].tolist() == want, f"row {row}: answer {ids[row].tolist()}, twin {want}")
    expect(hides > 0, "nothing was hidden from any step")


def works_behind_a_cut(subject: Subject) -> None:
    """Beside a cut before the language model it looks at the kept tokens."""
    model, inputs = subject.fresh_model(), subject.inputs((1,))
    model.set_attn_implementation("eager")
    with prune(subject.model, f"{subject.spec}+random@9") as run:
        ids = generate(subject.model, inputs, max_new_tokens=7)[0].tolist()
    policy = run.attachment.policy(run.slots["before_lm"].method)
    kept = kept_by_hand(model, inputs, report_of(run).keep, policy)[0]
    visual = patches_of(model, inputs)[0]
    # columns of the prompt that are left: text, and what each picture kept
    stays = ~visual
    places, start = visual.nonzero()[:, 0], 0
    for one in report_of(run).keep:
        stays[places[start : start + one.total][one.keep_idx]] = True
        start += one.total
    visual = visual[stays]
    want = Looking(model, subject.method, visual).answer(kept, 7)
    expect(ids == want, f"answer {ids}, twin {want}")


CHECKS = {"steps_equal_eager_twin": steps_equal_eager_twin, "works_behind_a_cut": works_behind_a_cut}
