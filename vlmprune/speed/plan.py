# SPDX-License-Identifier: Apache-2.0
"""Break-even: from which prompt, batch and answer length on does a method pay on this machine, and does it at
all?

A handful of points is measured, then a cost model is fitted that is simple enough to be stated in full:

    total   = batch (encode + choose) + prefill + (answer - 1) (decode + loop)
    prefill = p0 + batch (p1 n + p2 n^2)    n: tokens that enter a decoder layer, terms averaged over layers
    decode  = d0 + batch (d1 + d2 n)        one more token, n in the cache

No coefficient may be negative. ``encode`` grows with the visual tokens; ``choose`` (what the method costs
beyond the tokens it leaves) does too, but is not assumed to shrink below what was measured. ``loop``, what
``generate`` adds to each token, is read off whole dense answers. The model is then validated on
whole pruned answers, which it was not fitted on. Pruning is advised where it saves more than ``worth``, and
more than the prediction error.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..api import prune
from ..checks import check_cuts
from ..errors import InvariantError, SpecError
from ..hooks.sequence.cache import cache_in, cache_name
from ..spec import parse
from .card import Effort, Tell, best_attention
from .conditions import device_name
from .free import FreeSide
from .timing import Entry, race
from .workload import Workload

LIMITS = {"visual_tokens": 16384, "text_tokens": 8192, "answer_tokens": 4096, "batch": 64}
CHECKED = 16  # longest answer that the model is validated on
Lengths = Sequence[float]  # tokens in each decoder layer


@dataclass(frozen=True)
class Case:
    """A use: equal prompts in a batch, and an answer."""

    visual_tokens: int
    text_tokens: int
    batch: int
    answer_tokens: int


@dataclass(frozen=True)
class Costs:
    """The fitted model; all in seconds."""

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    encode: float  # one prompt of ``visual_tokens``
    choose: float
    loop: float
    visual_tokens: int
    shares: tuple[float, ...]  # of the visual tokens, that the method leaves in each layer

    def total(self, case: Case, pruned: bool) -> float:
        """Seconds from pixels to the last token of the answer."""
        # of the measured prompt, which encode and choose are for
        times = case.visual_tokens / self.visual_tokens
        shares = self.shares if pruned else (1.0,)  # one share stands for all layers
        lengths = [case.text_tokens + share * case.visual_tokens for share in shares]
        later = [length + (case.answer_tokens - 1) / 2 for length in lengths]  # in the middle of the answer
        before = self.encode * times + (self.choose * max(1.0, times) if pruned else 0.0)
        step = _dot(self.decode, decode_terms(case.batch, later))
        return (
            case.batch * before
            + _dot(self.prefill, prefill_terms(case.batch, lengths))
            + (case.answer_tokens - 1) * (step + self.loop)
        )

    def gain(self, case: Case) -> float:
        """Share of the time that pruning saves; negative where it costs time."""
        return 1 - self.total(case, True) / self.total(case, False)


def plannable(spec: str) -> str:
    """The spec in its canonical form; raise where no token is removed, so that nothing could pay."""
    wanted = parse(spec)
    wanted.build(require_budget=True)
    if not wanted.prunes:
        raise SpecError(
            f"{spec!r} removes no token, so nothing could pay; expected a spec such as fastervlm@0.125"
        )
    return str(wanted)


def _require_cut(workload: Workload, spec: str) -> None:
    """Refuse a budget that leaves the pictures of this workload whole, before anything is timed."""
    with prune(workload.model, spec) as run:
        workload.first_token()
    if run.last is None:
        raise InvariantError(
            f"there is no report of {spec!r}, so nothing shows what was pruned; expected one"
        )
    instead = "take a model whose pictures have more"
    check_cuts(spec, run.last.dense_tokens, run.last.realised_tokens, workload.name, instead)


def prefill_terms(batch: int, lengths: Lengths) -> list[float]:
    n = np.asarray(lengths, dtype=float)
    # averages over layers: after a cut inside, they read different numbers of tokens
    return [1.0, batch * float(n.mean()), batch * float((n * n).mean())]


def decode_terms(batch: int, lengths: Lengths) -> list[float]:
    return [1.0, float(batch), batch * float(np.mean(lengths))]


def _dot(weights: Sequence[float], terms: Sequence[float]) -> float:
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


def fit(
    terms: Sequence[Sequence[float]], seconds: Sequence[float]
) -> tuple[tuple[float, float, float], float]:
    """Coefficients >= 0 with the least squared relative error, and the largest relative error among the
    points.

    Three coefficients have seven non-empty sets that may be positive, so all are tried.
    """
    # divided by its time, so that a short prefill counts as much as a long one
    matrix, ones = np.asarray(terms) / np.asarray(seconds)[:, None], np.ones(len(seconds))
    best, least = np.zeros(3), np.inf
    for size in (1, 2, 3):
        for columns in map(list, combinations(range(3), size)):
            found = np.linalg.lstsq(matrix[:, columns], ones, rcond=None)[0]
            error = float(((matrix[:, columns] @ found - ones) ** 2).sum())
            # smaller sets come first: one more coefficient must really fit better
            if (found >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(3), error
                best[columns] = found
    base, linear, square = best.tolist()
    return (base, linear, square), float(np.abs(matrix @ best - ones).max())


@torch.inference_mode()
def plan(
    workload: Workload,
    spec: str,
    *,
    answer_tokens: int = 128,
    worth: float = 0.05,
    effort: Effort | None = None,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Measure, fit, and answer for this workload and around it; plain values."""
    spec, effort = plannable(spec), effort or Effort(rounds=5)
    _require_cut(workload, spec)
    tell("finding the fastest attention")
    attention, _ = best_attention(workload, rounds=2)
    tell("measuring prefill, decode, tower and choosing")
    session = prune(workload.model, spec)
    points, medians, visual, layers = _measure(workload, session, effort, tell)
    share = tuple(tokens / visual for tokens in layers)  # (layers,)
    prefill, prefill_error = fit(
        [prefill_terms(b, [n]) for b, n in points], [medians["prefill", b, n] for b, n in points]
    )
    decode, decode_error = fit(
        [decode_terms(b, [n]) for b, n in points], [medians["decode", b, n] for b, n in points]
    )
    # noise can make a small difference negative
    choose = max(0.0, medians["attached"] - medians["free"]) / workload.batch
    # loop is 0 until whole answers were timed, see _check
    costs = Costs(prefill, decode, medians["encode"] / workload.batch, choose, 0.0, visual, share)
    case = Case(visual, workload.text_tokens, workload.batch, answer_tokens)
    tell("holding the cost model against whole answers")
    costs, check = _check(workload, session, costs, replace(case, answer_tokens=CHECKED), effort)
    # a gain within the prediction error is no reason to prune
    threshold = max(worth, check["error"])
    return {
        "model": workload.name,
        "spec": session.spec,
        "case": asdict(case),
        **verdict(costs, case, threshold),
        "worth": worth,
        "threshold": threshold,
        "ranges": {axis: pays(costs, case, axis, threshold) for axis in LIMITS},
        "costs": asdict(costs),
        "fit_error": {"prefill": prefill_error, "decode": decode_error},
        "check": check,
        "measured": [
            {
                "batch": b,
                "tokens": n,
                "prefill_s": medians["prefill", b, n],
                "decode_s": medians["decode", b, n],
            }
            for b, n in points
        ],
        "device": device_name(workload.device),
        "dtype": str(workload.model.dtype).removeprefix("torch."),
        "attention": attention,
        "threads": torch.get_num_threads(),
        "rounds": effort.rounds,
        "note": workload.note,
    }


def verdict(costs: Costs, case: Case, threshold: float) -> dict[str, Any]:
    """Whether to prune in this case, and what is expected."""
    gain = costs.gain(case)
    return {
        "advice": "prune" if gain > threshold else "do not prune",
        "gain": gain,
        "dense_s": costs.total(case, False),
        "pruned_s": costs.total(case, True),
    }


def pays(costs: Costs, case: Case, axis: str, threshold: float) -> dict[str, int] | None:
    """Least and greatest value of one axis for which pruning pays, the rest as it is; None for never."""
    lowest = 2 if axis == "visual_tokens" else 1
    # every value is tried: along an axis the gain can rise above the threshold and fall below it again
    found = [
        value
        for value in range(lowest, LIMITS[axis] + 1)
        if costs.gain(replace(case, **{axis: value})) > threshold
    ]
    return {"from": found[0], "to": found[-1], "limit": LIMITS[axis]} if found else None


def _measure(
    workload: Workload, session: Any, effort: Effort, tell: Tell
) -> tuple[list[tuple[int, int]], dict[Any, float], int, list[float]]:
    """(batch, tokens) points, medians of all times, visual tokens of a prompt, and those left per layer."""
    free = FreeSide(session, workload.first_token)
    report = session.last  # of the call that FreeSide watched
    visual, layers = round(sum(report.dense_tokens) / len(report.dense_tokens)), report.tokens_per_layer
    longest = workload.inputs["input_ids"].shape[1]
    # three lengths tell the linear part of a prefill from the square one, two batches what each prompt adds
    lengths = sorted({max(8, longest // 6), max(16, longest // 2), longest})
    points = [(batch, length) for batch in (1, 2) for length in lengths]
    entries: dict[Any, Entry] = {
        "encode": (None, workload.encode),
        "attached": (session, workload.first_token),
        "free": (None, lambda: _free(workload, free)),
    }
    for batch, length in points:
        run = _Decoder(workload, batch, length)
        entries["prefill", batch, length] = (None, run.prefill)
        entries["decode", batch, length] = (None, run.step)
    # rounds of the warm-up are told too
    done = iter(range(1, effort.rounds + effort.warmup + 1))
    times = race(
        entries,
        effort.rounds,
        warmup=effort.warmup,
        on_round=lambda: tell(f"measuring, round {next(done)} of {effort.rounds + effort.warmup}"),
    )
    found = {name: median(values) for name, values in times.items()}
    # the free side counts as 0 below, so that the difference plan takes is the median of the gaps
    gaps = [a - f for a, f in zip(times["attached"], times["free"], strict=True)]
    # within a round, a slow minute of the machine cancels
    found["attached"], found["free"] = median(gaps), 0.0
    return points, found, visual, layers


def _free(workload: Workload, free: FreeSide) -> None:
    workload.encode()
    free.first_token()


class _Decoder:
    """The language model alone on random embeddings: a whole prompt, or one more token behind it."""

    def __init__(self, workload: Workload, batch: int, length: int) -> None:
        self.lm, self.head = workload.adapter.language_model, workload.model.get_output_embeddings()
        table = workload.model.get_input_embeddings().weight
        rows = torch.randint(0, table.shape[0], (batch, length), generator=torch.Generator().manual_seed(0))
        # real rows of the table: the time does not depend on what they say
        self.embeds = table[rows.to(table.device)]  # (B, L, D)
        self.cache: Any = None

    def prefill(self) -> None:
        output = self.lm(inputs_embeds=self.embeds, use_cache=True)
        self.cache = cache_in(output)  # renewed in every round, so that steps hardly make it longer
        self._token(output.last_hidden_state)

    def step(self) -> None:
        if self.cache is None:
            self.prefill()
        # the keyword of the cache: its name differs by version of transformers
        given = {cache_name(inspect.signature(self.lm.forward).parameters): self.cache}
        self._token(self.lm(inputs_embeds=self.embeds[:, -1:], use_cache=True, **given).last_hidden_state)

    def _token(self, hidden: Tensor) -> None:
        self.head(hidden[:, -1]).argmax(dim=-1).tolist()  # waits for the device


def _check(
    workload: Workload, session: Any, costs: Costs, case: Case, effort: Effort
) -> tuple[Costs, dict[str, Any]]:
    """The costs with ``loop``, and pruned answers as they foresee them and as they are."""

    def answer() -> None:
        workload.answer(case.answer_tokens)

    # whole dense answers give what the model lacks, the pruned ones are left to judge it by
    times = race({"dense": (None, answer), "pruned": (session, answer)}, max(2, effort.rounds // 2), warmup=1)
    dense, pruned = median(times["dense"]), median(times["pruned"])
    loop = max(0.0, dense - costs.total(case, False)) / (case.answer_tokens - 1)
    costs = replace(costs, loop=loop)
    # the gain round by round: what slows a whole round cancels
    real, foreseen = (
        median([1 - b / a for a, b in zip(times["dense"], times["pruned"], strict=True)]),
        costs.gain(case),
    )
    return costs, {
        "answer_tokens": case.answer_tokens,
        "dense_s": dense,
        "pruned_s": pruned,
        "pruned_foreseen_s": costs.total(case, True),
        "gain": real,
        "gain_foreseen": foreseen,
        "error": abs(real - foreseen),
    }
