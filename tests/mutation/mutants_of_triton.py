# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the Triton kernels, whose source is compiled: changes of its syntax tree.

Line breaks and comments do not matter. ``tests/kernels/test_mutants.py`` tries them in the interpreter.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass


@dataclass(frozen=True)
class SourceMutant:
    """A mistake in the source of a kernel, and the cases that must notice.

    Args:
        name: in plain words.
        place: "module.function", of a module in ``vlmprune/kernels/triton``.
        old: an expression or a statement that stands in the function once.
        new: what stands there instead; nothing: a statement is left out.
        op, within: the cases to try: of this op, with this in their names.
        slow: only with the slow tests.
    """

    name: str
    place: str
    old: str
    new: str
    op: str
    within: str = ""
    slow: bool = True

    @property
    def module(self) -> str:
        return self.place.partition(".")[0]

    @property
    def function(self) -> str:
        return self.place.partition(".")[2]


SELECT = [
    SourceMutant(
        "the last of equals is dropped",
        "device.keep_rank",
        "rank_equal <= need",
        "rank_equal < need",
        "topk_select",
        "ties-7",
        slow=False,
    ),
    SourceMutant(
        "the zeros differ",
        "device.sortable",
        "(bits ^ (sign & 0x7FFFFFFF)) - sign",
        "bits ^ (sign & 0x7FFFFFFF)",
        "topk_select",
        "special",
        slow=False,
    ),
    SourceMutant(
        "negative NaN above positive NaN",
        "device.sortable",
        "tl.maximum(key, 0x00FFFFFE)",
        "tl.maximum(key, 1)",
        "topk_select",
        "special",
        slow=False,
    ),
    SourceMutant(
        "NaN highest", "device.sortable", "0x807FFFFF", "0x80000000", "topk_select", "special", slow=False
    ),
    SourceMutant("bisection stops early", "device.kth_key", "low < high", "low + 1 < high", "topk_select"),
    SourceMutant(
        "host: k above N in a selection", "select.topk_select", "k = min(k, n)", "", "topk_select", "-33-36"
    ),
    SourceMutant(
        "every sample starts at 0", "select.select_kernel", "b * n + lane", "lane", "topk_select", "normal-33"
    ),
    SourceMutant(
        "digits of other prefixes counted",
        "select.histogram_kernel",
        "valid & ((key >> 21) == high)",
        "valid",
        "topk_select",
        "long",
    ),
    SourceMutant(
        "keys of the bin itself counted as above",
        "select.narrow",
        "bins > digit",
        "bins >= digit",
        "topk_select",
        "long",
    ),
    SourceMutant(
        "chunks before forgotten",
        "select.compact_kernel",
        "tl.sum(counts >> 16, 0)",
        "0",
        "topk_select",
        "long",
    ),
]

ROWS = [
    SourceMutant("host: k above N", "prune.prune", "k = min(k, n)", "", "prune", "k above N", slow=False),
    SourceMutant(
        "kept tokens in front not counted",
        "prune.kept_rows",
        "lane < at",
        "lane < 0",
        "prune",
        "odd width",
    ),
    SourceMutant(
        "rows land where they stood",
        "prune.prune_kernel",
        "b * k + place",
        "b * k + source",
        "prune",
        "odd width",
        slow=False,
    ),
    SourceMutant(
        "gather: indices of the first sample",
        "gather.gather_kernel",
        "tl.load(idx + to, mask=keep, other=0)",
        "tl.load(idx + target, mask=keep, other=0)",
        "prune",
        "odd width-two",
    ),
    SourceMutant(
        "columns of one share only",
        "device.copy_rows",
        "range(part * BD, width, split * BD)",
        "range(part * BD, width, (split + 1) * BD)",
        "prune",
        "many columns",
    ),
    SourceMutant(
        "last columns masked off", "device.copy_rows", "at < width", "at < width - 1", "gather_rows"
    ),
    SourceMutant(
        "indices by every share",
        "prune.kept_rows",
        "tl.store(idx + b * k + place, row, mask=keep)",
        "tl.store(idx + b * k + place, row + 1, mask=keep)",
        "prune",
        "few rows",
    ),
    SourceMutant(
        "dropped rows not zero",
        "gather.unprune_kernel",
        "(row < n)[:, None] & inside",
        "found[:, None] & inside",
        "unprune",
    ),
    SourceMutant(
        "search one step short", "gather.unprune_kernel", "range(0, steps)", "range(1, steps)", "unprune"
    ),
]

GREEDY = [
    SourceMutant(
        "higher index wins a pick",
        "device.best_of",
        "tl.min(tl.where(key == top, token, 0x7FFFFFFF), 0)",
        "tl.max(tl.where(key == top, token, 0), 0)",
        "greedy_maxmin",
        "21",
        slow=False,
    ),
    SourceMutant(
        "picked again",
        "maxmin.maxmin_kernel",
        "taken = taken | (lane == pick)",
        "",
        "greedy_maxmin",
        "21",
        slow=False,
    ),
    SourceMutant(
        "NaN forgotten",
        "maxmin.maxmin_kernel",
        "tl.maximum(best, row, propagate_nan=tl.PropagateNan.ALL)",
        "tl.where(row > best, row, best)",
        "greedy_maxmin",
        "spoilt",
    ),
    SourceMutant(
        "itself the nearest",
        "maxmin.nearest_kernel",
        "valid[:, None] & (other < n)[None, :] & (token[:, None] != other[None, :])",
        "valid[:, None] & (other < n)[None, :]",
        "greedy_maxmin",
        "21-7-nn",
    ),
    SourceMutant(
        "weight forgotten",
        "maxmin.worth_of",
        "tl.load(weight + at, mask=valid, other=0.0) * value",
        "value",
        "greedy_maxmin",
        "weighted",
    ),
    SourceMutant(
        "column instead of row",
        "maxmin.maxmin_kernel",
        "sim + pick.to(tl.int64) * row_stride + lane",
        "sim + pick + lane * row_stride",
        "greedy_maxmin",
        "spoilt",
    ),
    SourceMutant(
        "rounding counts as residual",
        "dpp.settled",
        "tl.where(residual <= floor, 0.0, residual)",
        "residual",
        "greedy_dpp",
        "rank used up",
    ),
    SourceMutant(
        "nothing explained",
        "dpp.dpp_kernel",
        "explained += tl.sum(rows * picks[:, None], 0)",
        "explained += 0.0",
        "greedy_dpp",
        "21",
    ),
    SourceMutant(
        "step: leavings of one launch only",
        "device.pick_left",
        "(step - 1) & 1",
        "step & 1",
        "greedy_maxmin_features",
    ),
    SourceMutant(
        "step: picked again",
        "maxmin.maxmin_step_kernel",
        "tl.store(taken + at, gone.to(tl.int8), mask=valid)",
        "",
        "greedy_maxmin_features",
    ),
    SourceMutant(
        "step: history a row short",
        "dpp.dpp_step_kernel",
        "used, width = step - 1, history_stride",
        "used, width = step - 17, history_stride",
        "greedy_dpp_features",
        "21",
    ),
]

SCORES = [
    SourceMutant(
        "rows of the matrix not weighed",
        "sensitivity.row_dot_kernel",
        "left * tl.load(y + start[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)",
        "tl.load(y + start[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)",
        "zoo_sensitivity",
    ),
    SourceMutant(
        "a row that is not finite stretched",
        "scores.stretch_kernel",
        "tl.where(finite, tl.where(level, 1.0, value), float('nan'))",
        "tl.where(level, 1.0, value)",
        "stretch",
        "special-13",
    ),
    SourceMutant(
        "padding has a say in the fit",
        "scores.fitted",
        "used = used & (tl.load(real + at, mask=valid, other=0) != 0)",
        "",
        "detrend",
        "33-torch.bfloat16",
    ),
]

MERGING = [
    SourceMutant(
        "the higher of equal targets",
        "contextual.nearest_target",
        "cosine > best",
        "cosine >= best",
        "contextual_groups",
        "ties",
        slow=False,
    ),
    SourceMutant(
        "the length of a target forgotten",
        "contextual.nearest_target",
        "tl.sum(dot, 1) / length",
        "tl.sum(dot, 1)",
        "contextual_groups",
        "normal",
    ),
    SourceMutant(
        "targets not spread",
        "contextual.nearest_target",
        "rest_at(kept, d, j * step, KEPT)",
        "rest_at(kept, d, j, KEPT)",
        "contextual_groups",
        "normal",
    ),
    SourceMutant(
        "a target is its own member",
        "contextual.rows_kernel",
        "joins = joins & (patch != target)",
        "",
        "contextual_rows",
        "few-add",
    ),
]

CROPS = [
    SourceMutant(
        "a token compared with itself",
        "crops.cosines",
        "tl.where(own[:, None] == other[None, :], 0.0, dots / lengths)",
        "dots / lengths",
        "crop_variance",
        "ragged",
    ),
    SourceMutant(
        "negative attention ranked",
        "crops.scores_kernel",
        "tl.where(a < 0, float('nan'), value)",
        "value",
        "crop_scores",
        "ragged",
    ),
    SourceMutant(
        "the later of equal crops served first",
        "crops.handed_out",
        "other < lane",
        "other > lane",
        "share_out",
        "ragged",
        slow=False,
    ),
    SourceMutant(
        "what exceeds a crop is lost",
        "crops.share_kernel",
        "found = tl.minimum(found, size)",
        "",
        "share_out",
        "ragged",
    ),
    SourceMutant(
        "the later of equals",
        "crops.best_kernel",
        "beside[None, :] < at[:, None]",
        "beside[None, :] > at[:, None]",
        "top_k_in_groups",
        "ragged-ties",
        slow=False,
    ),
    SourceMutant(
        "a whole group ranked",
        "crops.best_kernel",
        "rank = tl.where(asked >= size, at, rank)",
        "",
        "top_k_in_groups",
        "ragged-normal",
    ),
]
MUTANTS = [*SELECT, *ROWS, *GREEDY, *SCORES, *MERGING, *CROPS]


class _Swap(ast.NodeTransformer):
    """Puts one node in the place of every node like another; counts them."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.like, self.new = ast.dump(old), new
        self.count = 0

    def visit(self, node: ast.AST) -> ast.AST:
        if ast.dump(node) == self.like:
            self.count += 1
            return self.new
        return self.generic_visit(node)


def _node(code: str, as_expression: bool) -> ast.AST:
    (statement,) = ast.parse(code or "pass").body
    return statement.value if as_expression and isinstance(statement, ast.Expr) else statement


def mutated_source(mutant: SourceMutant, source: str) -> str:
    """A module with the mistake; refused where its place is not there once."""
    tree = ast.parse(source)
    functions = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == mutant.function
    ]
    swap = _Swap(_node(mutant.old, bool(mutant.new)), _node(mutant.new, True))
    for function in functions:
        function.body = [swap.visit(statement) for statement in function.body]
    if swap.count != 1:
        raise LookupError(
            f"{mutant.name!r}: {mutant.old!r} stands {swap.count} times in {mutant.place}; update the list"
        )
    return ast.unparse(ast.fix_missing_locations(tree))
