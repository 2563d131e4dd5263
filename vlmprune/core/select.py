# SPDX-License-Identifier: Apache-2.0
"""From what a method says to indices: the one place that sorts, breaks ties and refuses bad answers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvariantError, SpecError
from ..kernels import dispatch, unchecked
from .deferred import NOW, Checks
from .method import Merged, Method
from .tokens import VisualTokens

_LOOK = "Check the captured tensors for overflow"


def top_k(scores: Tensor, k: int) -> Tensor:
    """(B, k) int64 ascending, the k highest scores (B, N); the lower index wins ties, NaN is lowest."""
    if scores.ndim != 2 or not 1 <= k <= scores.shape[1]:
        raise InvariantError(
            f"cannot take the top {k} of scores of shape {tuple(scores.shape)}; expected (B, N) and 1 <= k "
            "<= N"
        )
    return unchecked.topk_select(scores, k).long()


def ranked(scores: Tensor) -> Tensor:
    """(B, N) int64 tokens by their scores (B, N) in float32, best first; the lower index wins ties."""
    return torch.sort(scores.float(), dim=1, descending=True, stable=True).indices


def best_first(scores: Tensor, k: int) -> Tensor:
    """(B, k) int64 the k highest scores (B, N), the highest first; the lower index wins ties."""
    return ranked(scores)[:, :k]


def highest(scores: Tensor, count: Tensor, among: Tensor) -> Tensor:
    """(T, n) bool, the ``count`` (T,) highest scores ``among`` (T, n); the lower index wins ties."""
    order = scores.float().masked_fill(~among, -torch.inf).neg().sort(dim=1, stable=True).indices
    rank = order.argsort(dim=1)
    return among & (rank < count[:, None])


def first_to_fit(groups: Tensor, n: int, k: int) -> Tensor:
    """(B, n) bool: the tokens of the first groups (B, G, M), in order, as long as these are k at most.

    Groups may overlap; -1 stands for no token.
    """
    batch, count, members = groups.shape
    number = torch.arange(count, device=groups.device)[:, None].expand(batch, -1, members)
    # the first group that each token is in, ``count`` for none; the last place takes what is no token
    since = torch.full((batch, n + 1), count, device=groups.device)
    at = torch.where(groups < 0, n, groups).flatten(1)
    since = since.scatter_reduce(1, at, number.flatten(1), "amin")[:, :n]
    order = since.sort(dim=1).values
    together = torch.searchsorted(order, since.contiguous(), right=True)  # tokens up to and with that group
    return (since < count) & (together <= k)


def rest_of(keep_idx: Tensor, n: int) -> Tensor:
    """(B, n-k) ascending indices that are not in ``keep_idx`` (B, k), whose entries must differ."""
    kept = torch.zeros(keep_idx.shape[0], n, dtype=torch.int8, device=keep_idx.device).scatter_(
        1, keep_idx, 1
    )
    return torch.sort(kept, dim=-1, stable=True).indices[:, : n - keep_idx.shape[1]]


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """(B, K, D) rows of x (B, N, D) at index (B, K)."""
    return unchecked.gather_rows([x], index)[0]


def top_k_in_groups(scores: Tensor, members: Tensor, quota: Tensor, k: int) -> Tensor:
    """(B, k) int64 tokens: of every group its ``quota`` highest scores, group after group, best first.

    Args:
        scores: (B, G, M), finite; the earlier member wins ties.
        members: (G, M) token of every score, -1 behind the last member of a group.
        quota: (B, G). A group that is taken whole keeps its own order.
        k: length of the rows. What the groups give beyond k is cut off; -1 fills up what they give less.
    """
    return dispatch.top_k_in_groups(scores, members, quota, k)


def choose(method: Method, tokens: VisualTokens, k: int, checks: Checks = NOW) -> Tensor | Merged:
    """What ``method`` keeps of every unit at a budget of k tokens.

    Args:
        checks: gathers what has to be true of the values; by default each is checked at once.

    Returns:
        (B, k) int64 ascending indices, or the rows of a merging method. Keeping all N tokens asks no method:
        that is the dense model.
    """
    batch, n = tokens.batch, tokens.count
    if not 1 <= k <= n:
        raise InvariantError(
            f"{method.name}: got a budget of {k} for {n} tokens; expected 1 <= k <= {n}, so clamp it before"
        )
    if k < method.least(n):
        raise SpecError(
            f"keep: {k} of {n} tokens are too few for {method.name}; keep at least {method.least(n)}"
        )
    kind = method.kind()
    if k == n:
        everything = torch.arange(n, device=tokens.device).expand(batch, n)
        return Merged(tokens.need("features"), everything) if kind == "merge" else everything
    if kind == "merge":
        return _checked_rows(method, method.merge(tokens, k), tokens, k, checks)
    # an answer from the CPU is checked and ranked there: only what stays travels
    if kind == "score":
        return top_k(_checked_scores(method, method.score(tokens), batch, n, checks), k).to(tokens.device)
    return _checked_indices(method, method.select(tokens, k), batch, n, k, checks).to(tokens.device)


def choose_own(method: Method, tokens: VisualTokens, checks: Checks = NOW) -> list[Tensor | Merged]:
    """What ``method`` keeps of every unit where it says itself how many tokens stay.

    Returns:
        For each of the B units its (k,) int64 ascending indices, or the rows (k, D) and slots (k,) of a
        merging method.
    """
    batch, n = tokens.batch, tokens.count
    answer = method.own(tokens)
    if method.kind() == "merge":
        if isinstance(answer, Tensor) or len(answer) != batch:
            raise InvariantError(f"{method.name}: own gave no Merged for each of {batch} units; expected one")
        found: list[Tensor | Merged] = []
        for one in answer:
            _checked_rows(method, one, tokens, one.slots.shape[-1], checks, batch=1)
            found.append(one.unit(0))
        return found
    if not isinstance(answer, Tensor) or (answer.shape, answer.dtype) != ((batch, n), torch.bool):
        raise InvariantError(
            f"{method.name}: own returned {_describe(answer)}; expected torch.bool of shape {(batch, n)}"
        )
    kept = [row.nonzero()[:, 0] for row in answer]
    empty = [number for number, one in enumerate(kept) if not len(one)]
    if empty and method.least(n) > 0:
        raise InvariantError(f"{method.name}: own keeps nothing of units {empty}; expected at least a token")
    return list(kept)


def _checked_scores(method: Method, scores: Tensor, batch: int, n: int, checks: Checks) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != (batch, n) or not scores.is_floating_point():
        raise InvariantError(
            f"{method.name}: score returned {_describe(scores)}; expected a floating point number per token, "
            f"of shape {(batch, n)}"
        )
    checks.finite(
        scores,
        lambda: InvariantError(
            f"{method.name}: {int((~torch.isfinite(scores)).sum())} of {batch * n} scores are not finite and "
            f"cannot be ranked. {_LOOK}"
        ),
    )
    return scores


def _checked_indices(method: Method, keep: Tensor, batch: int, n: int, k: int, checks: Checks) -> Tensor:
    if not isinstance(keep, Tensor) or keep.shape != (batch, k) or keep.dtype != torch.int64:
        raise InvariantError(
            f"{method.name}: select returned {_describe(keep)}; expected int64 indices of shape {(batch, k)}"
        )
    keep, trouble = dispatch.ordered_indices(keep, 0, n)
    checks.finite(
        trouble,
        lambda: InvariantError(
            f"{method.name}: select returned indices {_culprits(keep, trouble, 0, n)}; expected {k} distinct "
            f"indices in 0..{n - 1} per row"
        ),
    )
    return keep


def _checked_rows(
    method: Method, merged: Merged, tokens: VisualTokens, k: int, checks: Checks, batch: int | None = None
) -> Merged:
    batch, n, dense = tokens.batch if batch is None else batch, tokens.count, tokens.features
    if not isinstance(merged, Merged):
        raise InvariantError(f"{method.name}: merge returned {_describe(merged)}; expected a Merged")
    rows, slots = merged.features, merged.slots
    like = rows if dense is None else dense  # without dense rows to compare with, any width and dtype will do
    if rows.ndim != 3 or (rows.shape, rows.dtype) != ((batch, k, like.shape[-1]), like.dtype):
        expected = f"{like.dtype} of shape {(batch, k, like.shape[-1])}"
        raise InvariantError(f"{method.name}: merge returned features {_describe(rows)}; expected {expected}")
    if slots.shape != (batch, k) or slots.dtype != torch.int64:
        raise InvariantError(
            f"{method.name}: merge returned slots {_describe(slots)}; expected int64 of shape {(batch, k)}"
        )
    ordered, trouble = dispatch.ordered_indices(slots, -1, n)
    checks.finite(
        rows,
        lambda: InvariantError(f"{method.name}: merge returned rows that are not finite. {_LOOK}"),
    )
    checks.finite(
        trouble,
        lambda: InvariantError(
            f"{method.name}: merge returned slots {_culprits(ordered, trouble, -1, n)}; expected -1 or "
            f"distinct indices in 0..{n - 1} per row"
        ),
    )
    return merged


def _culprits(ordered: Tensor, trouble: Tensor, lowest: int, n: int) -> str:
    """Indices (B, K) that ``trouble`` (B, K) marks, by what is wrong with them."""
    wrong = ordered[trouble != 0].tolist()
    outside = [i for i in wrong if not lowest <= i < n]
    twice = [i for i in wrong if lowest <= i < n]
    return "; ".join(
        f"{word} {some[:5]}" for word, some in (("out of range", outside), ("repeated", twice)) if some
    )


def _describe(value: object) -> str:
    return (
        f"{value.dtype} of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )
