# SPDX-License-Identifier: Apache-2.0
"""How agreement with published tables reads: a line for each budget, then what one should know of it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..stats.estimates import Estimate
from ..stats.ranks import RankAgreement
from .agreement import CLEAR, Agreement, Standing
from .text import NOTHING, p_value, plural

HEAD = (
    "keep",
    "methods",
    "Spearman",
    "of each seed",
    "p",
    "Kendall",
    "pairs swapped",
    "in one table",
    "designed with",
    "held out",
)
METHODS_HEAD = ("method", "query", "here", "published", "sources", "of print")
NAMED = 4
FEWEST = 5  # with four, one order in twelve agrees as well as can be, or as badly
TOO_FEW = "too few methods"


def cells(found: Agreement) -> list[str]:
    """One budget, under ``HEAD``."""
    few = len(found.standings) < FEWEST
    whole = None if few else found.whole
    swapped, total = found.one_table
    apart = len(found.swapped)
    return [
        found.keep,
        str(len(found.standings)),
        _estimate(whole.spearman) if whole else TOO_FEW if few else NOTHING,
        ", ".join(map(_correlation, whole.by_seed)) if whole else NOTHING,
        p_value(whole.p).removeprefix("= ") if whole else NOTHING,
        _estimate(whole.kendall) if whole else NOTHING,
        f"{apart} of {found.pairs}" if found.pairs else NOTHING,
        f"{swapped} of {total}" if total else NOTHING,
        _half(found, found.designed_with, True),
        _half(found, found.held_out, False),
    ]


def method_cells(one: Standing) -> list[str]:
    """One method at one budget, under ``METHODS_HEAD``."""
    low, high = one.sources.ends
    printed = f"{one.published:.1f}"
    # less would not be seen in one decimal
    if high - low >= 0.05:
        printed += f" ({low:.1f} to {high:.1f})"
    count = len(one.sources.by_source)
    ours = f"{one.ours:.1f}"
    if one.by_seed:
        ours += f" ({min(one.by_seed):.1f} to {max(one.by_seed):.1f})"
    return [
        one.method,
        "yes" if one.query_aware else "",
        ours,
        printed,
        str(count),
        "" if one.sources.how == "table" else one.sources.how,
    ]


def too_few(found: Sequence[Agreement]) -> str:
    """Why nothing is said of one model; empty where one of its budgets has enough methods."""
    if any(len(one.standings) >= FEWEST for one in found):
        return ""
    counts = ", ".join(f"{len(one.standings)} at {one.keep}" for one in found)
    return (
        f"Order of methods beside the published averages of {found[0].table}: {TOO_FEW} are published at "
        f"these budgets to compare ({counts}); {FEWEST} are needed. configs/agreement.yaml has more."
    )


def title(found: Agreement) -> str:
    seeds = f", mean of {found.seeds} seeds," if found.seeds > 1 else ""
    return f"{found.model}{seeds} beside the published averages of {found.table}: order of methods"


def used_head(found: Sequence[Agreement]) -> list[int]:
    """Columns that say something: where no list says what a model was designed with, there are no halves; one
    run has no seeds.
    """
    halves = any(one.designed is not None for budget in found for one in budget.standings)
    seeds = any(one.seeds > 1 for one in found)
    hidden = {"designed with", "held out"} if not halves else set()
    hidden |= set() if seeds else {"of each seed"}
    return [i for i, name in enumerate(HEAD) if name not in hidden]


def sentences(found: Sequence[Agreement]) -> list[str]:
    """About all budgets of one model, a point each."""
    seeds = any(one.seeds > 1 for one in found)
    said = [_how_to_read(seeds)]
    known = [one.whole.spearman.value for one in found if one.whole and len(one.standings) >= FEWEST]
    if len(known) > 1:
        said.append(f"Mean of Spearman over {len(known)} budgets: {_correlation(fmean(known))}.")
    held_out = [(one.keep, one.held_out.by_seed) for one in found if one.held_out and one.held_out.by_seed]
    if held_out:
        each = "; ".join(f"{', '.join(map(_correlation, of))} at {keep}" for keep, of in held_out)
        said.append(f"Spearman of each seed, over the held-out methods alone: {each}.")
    if any(one.pairs for one in found):
        said.append(_clear_and_close(found))
    named = _clearest(found)
    if named:
        said.append(named)
    absent = dict.fromkeys(spec for one in found for spec in one.unpublished)
    if absent:
        said.append(f"Left out, since nothing is published for them: {_few(list(absent))}.")
    return said


def _how_to_read(seeds: bool) -> str:
    over = "methods and seeds" if seeds else "methods"
    return (
        "1 is the order of print, 0 is no relation, \N{MINUS SIGN}1 the reverse. Both sides are % of the "
        f"unpruned accuracy. In brackets: 95 % intervals over {over}; p: how often orders drawn at random "
        'are as far from 0. "In one table": swapped pairs, of all pairs that one paper prints side by side.'
    )


def _clear_and_close(found: Sequence[Agreement]) -> str:
    """Where print hardly tells two methods apart, it has no order that a run could have."""

    def each(kind: str) -> str:
        counts = [(one.keep, getattr(one, kind)) for one in found if getattr(one, kind)[1]]
        return ", ".join(f"{swapped} of {total} at {keep}" for keep, (swapped, total) in counts) or "none"

    return (
        f"Swapped pairs of methods that are at least {CLEAR:g} points apart in print: {each('clear')}. Of "
        f"those that are closer: {each('close')}."
    )


def _clearest(found: Sequence[Agreement]) -> str:
    """The swapped pairs that are furthest apart in print."""
    clear = [(one.keep, pair) for one in found for pair in one.swapped if pair.published >= CLEAR]
    clear.sort(key=lambda item: -item[1].published)
    named = [
        f"{pair.below} above {pair.above} at {keep} (in print {pair.published:.1f} points below)"
        for keep, pair in clear[:NAMED]
    ]
    more = f", and {len(clear) - NAMED} more" if len(clear) > NAMED else ""
    return f"The furthest apart in print: {'; '.join(named)}{more}." if named else ""


def _few(names: Sequence[str]) -> str:
    more = f" and {plural(len(names) - 8, 'other')}" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _estimate(one: Estimate) -> str:
    low, high = _correlation(one.low), _correlation(one.high)
    return f"{_correlation(one.value)} [{low}, {high}]"


def _correlation(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _half(found: Agreement, agreed: RankAgreement | None, designed: bool) -> str:
    count = sum(one.designed is designed for one in found.standings)  # None is neither
    if not count:
        return NOTHING
    return f"{_estimate(agreed.spearman)}, {count}" if agreed else f"{NOTHING}, {count}"
