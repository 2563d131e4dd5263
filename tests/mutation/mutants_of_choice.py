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


def shifted_slots(place: Function) -> Function:
    def changed(picture: Any, parts: Any) -> Any:
        cut = place(picture, parts)
        return None if cut is None else replace(cut, keep=cut.keep.roll(1))

    return changed


def patches_only(place: Function) -> Function:
    """Newline and [CLS] columns go with the patches that are cut."""

    def changed(picture: Any, parts: Any) -> Any:
        cut = place(picture, parts)
        if cut is None:
            return None
        patch = torch.zeros_like(cut.keep)
        patch[picture.patches.cpu()] = True
        return replace(cut, keep=cut.keep & patch)

    return changed


def flipped_scores(one: Function) -> Function:
    def changed(picture: Any, name: str, index: Any, crop: int | None) -> Any:
        value = one(picture, name, index, crop)
        per_patch = name not in ("features", "cls_features") and index.shape[0] == picture.count
        return value.flip(0) if per_patch else value

    return changed


def reversed_rows(assign: Function) -> Function:
    return lambda lengths, counts: [row[::-1] for row in assign(lengths, counts)]


def not_placed(replace_rows: Function) -> Function:
    return lambda self, embeds: embeds


def unchecked_scores(check: Function) -> Function:
    return lambda method, scores, batch, n: scores


def one_budget_per_image(make_units: Function) -> Function:
    return lambda pictures, samples, scope: make_units(
        pictures, samples, "image" if scope == "crop" else scope
    )


def budgets_never_strict(choose_units: Function) -> Function:
    return lambda units, pictures, method, budget, projector, strict: choose_units(
        units, pictures, method, budget, projector, False
    )


def cuts_of_the_first_modality(place: Function) -> Function:
    """Clips beside images are given the cuts of the images."""

    def changed(self: Any, call: Any, embeds: Any) -> None:
        place(self, call, embeds)
        all_cuts = [cut for placed in call.placed for cut in placed.cuts]
        for placed in call.placed:
            placed.cuts = all_cuts[: len(placed.pictures)]

    return changed


def x_for_y(boxes: Function) -> Function:
    return lambda grids: boxes(grids)[:, [1, 0, 3, 2]]


def tiles_down_then_across(pack_tiles: Function) -> Function:
    return lambda slots, tile_grid, *rest: pack_tiles(slots, tile_grid[::-1], *rest)


CUTTING = Pytest("tests/core/test_cutting.py")
MUTANTS = (
    Mutant("inverted sort", at.TOP_K, lowest_scores, LLAVA),
    Mutant("unsorted output", at.TOP_K, descending, Pytest("tests/core/test_select.py")),
    Mutant("off by one in the slots", at.PLACE, shifted_slots, LLAVA),
    Mutant("newlines dropped", at.PLACE, patches_only, Checks("fastervlm@9", "llava_next")),
    Mutant("scores of another image", at.SLICE, flipped_scores, Pytest("tests/test_api.py")),
    Mutant("pictures of another row", at.ASSIGN, reversed_rows, Checks("random@9", "llava")),
    Mutant("merged rows not placed", at.REPLACE_ROWS, not_placed, Checks("pool@9", "llava")),
    Mutant(
        "scores that are not finite ranked",
        at.CHECK_SCORES,
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
        at.PLACE_PICTURES,
        cuts_of_the_first_modality,
        Pytest("tests/models/test_adapters.py"),
    ),
    Mutant("boxes on their side", at.BOXES, x_for_y, Pytest("tests/core/test_grid.py")),
    Mutant(
        "tiles counted down first", at.PACK_TILES, tiles_down_then_across, Pytest("tests/core/test_layout.py")
    ),
)
