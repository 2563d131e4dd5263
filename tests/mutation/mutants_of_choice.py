# SPDX-License-Identifier: Apache-2.0
"""Mistakes between scores and the columns that stay: ranking, budgets, placing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mutant_targets as at
import torch
from mutant import Checks, Mutant, Pytest

Function = Callable[..., Any]
LLAVA = Checks("fastervlm@9", "llava")


def lowest_scores(top_k: Function) -> Function:
    return lambda scores, k: top_k(-scores, k)


def descending(top_k: Function) -> Function:
    return lambda scores, k: top_k(scores, k).flip(1)


def shifted_slots(to_slots: Function) -> Function:
    def changed(picture: Any, parts: Any, *rest: Any) -> Any:
        cut = to_slots(picture, parts, *rest)
        return None if cut is None else replace(cut, kept_slots=(cut.kept_slots + 1) % picture.length)

    return changed


def patches_only(to_slots: Function) -> Function:
    """Newline and [CLS] slots go with the patches that are cut."""

    def changed(picture: Any, parts: Any, *rest: Any) -> Any:
        cut = to_slots(picture, parts, *rest)
        if cut is None:
            return None
        patch = torch.isin(cut.kept_slots, picture.patches.to(cut.kept_slots.device))
        return replace(cut, kept_slots=cut.kept_slots[patch])

    return changed


def flipped_scores(one: Function) -> Function:
    def changed(picture: Any, need: Any, index: Any, crop: int | None) -> Any:
        value = one(picture, need, index, crop)
        per_patch = need.what not in ("features", "cls_features") and index is None
        return value.flip(0) if per_patch else value

    return changed


def reversed_rows(assign: Function) -> Function:
    return lambda lengths, counts: [row[::-1] for row in assign(lengths, counts)]


def not_placed(cut_sequence: Function) -> Function:
    """The tokens whose places merged rows should take stay as they were."""

    def changed(state: Any, cuts: Any, *rest: Any) -> None:
        bare = [None if cut is None else replace(cut, row_slots=None, rows=None) for cut in cuts]
        cut_sequence(state, bare, *rest)

    return changed


def unchecked_scores(checked_scores: Function) -> Function:
    return lambda method, scores, batch, n, checks: scores


def one_budget_per_image(make_units: Function) -> Function:
    return lambda pictures, samples, scope: make_units(
        pictures, samples, "image" if scope == "crop" else scope
    )


def budgets_never_strict(choose_units: Function) -> Function:
    return lambda *args, strict, **options: choose_units(*args, strict=False, **options)


def cuts_of_the_first_modality(cut_sequence: Function) -> Function:
    """Clips beside images are given the cuts of the images."""

    def changed(state: Any, cuts: Any, *rest: Any) -> None:
        first = [cut for placement in state.placements for cut in cuts[: len(placement.pictures)]]
        cut_sequence(state, first, *rest)

    return changed


def x_for_y(boxes: Function) -> Function:
    return lambda grids: boxes(grids)[:, [1, 0, 3, 2]]


def tiles_down_then_across(pack_tiles: Function) -> Function:
    return lambda slots, tile_grid, *rest: pack_tiles(slots, tile_grid[::-1], *rest)


CUTTING = Pytest("tests/core/test_cutting.py")
MUTANTS = (
    Mutant("inverted sort", at.TOP_K, lowest_scores, LLAVA),
    Mutant("unsorted output", at.TOP_K, descending, Pytest("tests/core/test_select.py")),
    Mutant("off by one in the slots", at.TO_SLOTS, shifted_slots, LLAVA),
    Mutant("newlines dropped", at.TO_SLOTS, patches_only, Checks("fastervlm@9", "llava_next")),
    Mutant("scores of another image", at.SLICE, flipped_scores, Pytest("tests/test_api.py")),
    Mutant("pictures of another row", at.ASSIGN, reversed_rows, Checks("random@9", "llava")),
    Mutant("merged rows not placed", at.CUT_SEQUENCE, not_placed, Checks("pool@9", "llava")),
    Mutant(
        "scores that are not finite ranked",
        at.CHECKED_SCORES,
        unchecked_scores,
        Pytest("tests/core/test_select.py"),
    ),
    Mutant("a budget per crop spent per image", at.MAKE_UNITS, one_budget_per_image, CUTTING),
    Mutant(
        "strict budgets not strict",
        at.CHOOSE_UNITS,
        budgets_never_strict,
        Pytest("tests/core/test_session.py"),
    ),
    Mutant(
        "clips cut as images are",
        at.CUT_SEQUENCE,
        cuts_of_the_first_modality,
        Pytest("tests/models/test_adapters.py"),
    ),
    Mutant("boxes on their side", at.BOXES, x_for_y, Pytest("tests/core/test_grid.py")),
    Mutant(
        "tiles counted down first", at.PACK_TILES, tiles_down_then_across, Pytest("tests/core/test_layout.py")
    ),
)
