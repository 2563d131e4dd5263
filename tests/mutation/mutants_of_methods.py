# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the formulas of methods, in budgets, and in what is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mutant_targets as at
import numpy as np
import torch
from mutant import Mutant, Pytest

Function = Callable[..., Any]


def loudest_head(score: Function) -> Function:
    def changed(self: Any, tokens: Any) -> Any:
        return score(self, tokens) if self.cls == "mean" else tokens.need("cls_attention").float().amax(1)

    return changed


def longest_first(greedy: Function) -> Function:
    """The walk begins with the token of the longest feature, moved to the front for it."""

    def changed(features: Any, k: int) -> Any:
        order, distance = greedy(features, k)
        first = features.float().norm(dim=-1).argmax(dim=1, keepdim=True)
        return torch.cat([first, order[:, :-1]], dim=1), distance

    return changed


def lengths_count(greedy: Function) -> Function:
    """Products in place of cosines: short features are far from all."""

    def changed(features: Any, k: int) -> Any:
        from vlmprune.kernels import dispatch

        order, distance = dispatch.greedy_maxmin_features(features.float(), k, first="nn")
        return order.long(), distance

    return changed


def targets_at_the_front(group: Function) -> Function:
    """Contextual targets are the first of the rest, not spread over it."""

    def changed(scores: Any, keys: Any, dominant: int, contextual: int, first: int = 0) -> Any:
        found = group(scores, keys, dominant, contextual, first)
        rest = torch.ones_like(found.row).scatter(1, found.dominant, 0)
        targets = rest.sort(dim=1, descending=True, stable=True).indices[:, :contextual]
        number = torch.arange(found.start, found.start + contextual).expand_as(targets)
        slots = torch.cat([found.slots[:, : found.start], targets], dim=1)
        return found._replace(slots=slots, row=found.row.scatter(1, targets, number))

    return changed


def layer_before_ranks(cuts: Function) -> Function:
    return lambda *args: tuple(replace(point, source=point.layer - 1) for point in cuts(*args))


def softmax_over_patches(affinity: Function) -> Function:
    return lambda text, visual: (visual.float() @ text.float().T).softmax(dim=0).mean(dim=0)


def density_of_all(peaks: Function) -> Function:
    """The number of clusters is not the number of neighbours that make a density."""

    def changed(x: Any, clusters: int) -> Any:
        wider = peaks(x, min(x.shape[1], clusters + 1))
        centres = wider.centres[:, :clusters]
        nearest = torch.cdist(x.gather(1, centres[..., None].expand(-1, -1, x.shape[2])), x).argmin(dim=1)
        return wider._replace(centres=centres, assignment=nearest)

    return changed


def to_the_lightest(hand_out: Function) -> Function:
    return lambda left, weight, room: hand_out(left, -weight, room)


def constant_rows_zero(scaled: Function) -> Function:
    def changed(sensitivity: Any) -> Any:
        found = scaled(sensitivity)
        return torch.where((found == 1).all(dim=-1, keepdim=True), 0.0, found)

    return changed


def gain_ignored(kernel: Function) -> Function:
    return lambda layers: kernel(replace(layers, gain=None))


def never_known(knows: Function) -> Function:
    return lambda self, projector, stamp: False


def text_sinks_keep_theirs(reweight: Function) -> Function:
    return lambda self, attention, sinks, visual: reweight(self, attention, sinks & visual, visual)


def last_layer_too(acts_on: Function) -> Function:
    return lambda self, depth: acts_on(replace(self, skip_last_layer=False), depth)


def at_every_cut(score: Function) -> Function:
    return lambda self, tokens: score(self, replace(tokens, cut=0))


def width_for_height(real_patches: Function) -> Function:
    return lambda rule, side, size, *rest: real_patches(rule, side, size[::-1], *rest)


def one_draw_for_all(row: Function) -> Function:
    return lambda self, ordinal, n: row(self, 0, n)


def first_of_the_cell(centres: Function) -> Function:
    def changed(grids: Any, k: int) -> Any:
        from vlmprune.core.grid import cells

        member = cells(grids, k) == torch.arange(k)[:, None]
        return member.int().argmax(dim=1).sort().values

    return changed


def fractions_up(count: Function) -> Function:
    return lambda self, n: (
        count(self, n) if isinstance(self.keep, int) else min(n, math.ceil(round(self.keep * n, 6)))
    )


def dropped_for_kept(draw_keep: Function) -> Function:
    return lambda image, grids, mask, *rest: draw_keep(image, grids, ~np.asarray(mask, dtype=bool), *rest)


def segments_from_the_front(members_of: Function) -> Function:
    """Tokens of a segment counted from the first of the clip."""
    return lambda slots, joined, count: members_of(slots, [one._replace(first=0) for one in joined], count)


def rows_never_leave(keep: Function) -> Function:
    """What a row was made of is said in the numbers before the cut."""

    def changed(self: Any, index: Any) -> None:
        parts, self.parts = self.parts, None
        keep(self, index)
        self.parts = parts

    return changed


def crops_share_rows(joins_in: Function) -> Function:
    """Rows without a place are counted anew in every crop."""
    return lambda count, part: (*joins_in(count, part)[:2], 0)


def vectors_of_one_frame(on_head: Function) -> Function:
    return lambda self, module, args, output: on_head(self, module, args, output[:1].expand_as(output))


def any_number_of_tiles(largest: Function) -> Function:
    return lambda self, size, several, k: largest(self, size, several, 10**9)


def of(name: str) -> Pytest:
    return Pytest(f"tests/methods/test_{name}.py")


MUTANTS = (
    Mutant("the loudest head ranks", at.FASTERVLM_SCORE, loudest_head, of("fastervlm")),
    Mutant("the walk begins with the longest feature", at.DIVPRUNE_GREEDY, longest_first, of("divprune")),
    Mutant("features compared without their norm", at.DIVPRUNE_GREEDY, lengths_count, of("divprune")),
    Mutant("contextual targets not spread", at.VISIONZIP_GROUP, targets_at_the_front, of("visionzip")),
    Mutant("ranked by the layer before the cut", at.PYRAMIDDROP_CUTS, layer_before_ranks, of("pyramiddrop")),
    Mutant("raters by a softmax over patches", at.AFFINITY, softmax_over_patches, of("sparsevlm")),
    Mutant(
        "one candidate less", at.CANDIDATES, lambda count: lambda cut: max(1, count(cut) - 1), of("sparsevlm")
    ),
    Mutant("densities of one neighbour more", at.PEAKS, density_of_all, of("sparsevlm")),
    Mutant("what is left over to the lightest crop", at.HAND_OUT, to_the_lightest, of("holov")),
    Mutant("a constant row worth nothing", at.ZOO_SCALED, constant_rows_zero, of("zooprune")),
    Mutant("the gain of the norm ignored", at.ZOO_KERNEL, gain_ignored, of("sensitivity")),
    Mutant("weights compared at every prompt", at.ZOO_COMPARED, never_known, of("zooprune")),
    Mutant("text sinks keep their attention", at.VAR_REWEIGHT, text_sinks_keep_theirs, of("var")),
    Mutant("the last layer edited", at.VAR_LAYERS, last_layer_too, of("var")),
    Mutant("debiased at every cut", at.DEBIAS_SCORE, at_every_cut, of("debias")),
    Mutant("padding of a picture on its side", at.REAL_PATCHES, width_for_height, of("debias")),
    Mutant("one draw for all images", at.RANDOM_ROW, one_draw_for_all, of("baselines")),
    Mutant("segments counted from the front", at.ANCHOR_MEMBERS, segments_from_the_front, of("joins")),
    Mutant(
        "rows that leave keep their tokens",
        at.SPAN_KEEP,
        rows_never_leave,
        Pytest("tests/core/test_members.py"),
    ),
    Mutant("crops share rows", at.WHOLE_JOINS, crops_share_rows, Pytest("tests/core/test_members.py")),
    Mutant("one vector for all frames", at.HEAD_VECTORS, vectors_of_one_frame, of("fastvid")),
    Mutant(
        "tiles above the budget",
        at.LARGEST_STEP,
        any_number_of_tiles,
        Pytest("tests/evaluation/test_downsample.py"),
    ),
    Mutant(
        "the first token of a cell for its centre",
        at.CENTRES,
        first_of_the_cell,
        Pytest("tests/core/test_grid.py"),
    ),
    Mutant("dropped patches drawn as kept", at.DRAW_KEEP, dropped_for_kept, Pytest("tests/test_overlay.py")),
    Mutant("fractions rounded up", at.BUDGET_COUNT, fractions_up, Pytest("tests/test_spec_budget.py")),
)
