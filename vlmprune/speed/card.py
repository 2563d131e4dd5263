# SPDX-License-Identifier: Apache-2.0
"""The speed card: what choosing costs, how soon first token and whole answer are there, and the ideal.

* first token: pixels in, first token on the host. The vision tower and everything a method does are inside.
* whole answer: ``generate`` of a stated number of tokens.
* choosing: score, select and cut, as the session clocks it on the host; what is read while the tower runs is
  in the first token.
* dense: nothing attached, with the attention back end that is fastest for it here; all use the same one.
* processor: from the picture to the inputs, a smaller picture included. What is pruned in the model has the
  inputs of dense, and their time.
* free k: tower, then the language model on the very tokens that the method keeps (``free.FreeSide``).

Everything is timed in interleaved rounds. Times are medians with the 20th and 80th percentile; ratios are
medians of the ratios within a round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import is_flash_attn_2_available

from ..api import prune
from ..errors import EvaluationError, SpecError, UnsupportedError
from ..models.shrink import shrinks
from ..plain import plain, read
from ..spec import parse
from ..textfile import replace_text
from .conditions import device_name
from .free import FreeSide
from .memory import peak_bytes
from .row import SpeedRow
from .timing import Entry, race, ratios, spread
from .workload import Workload

if TYPE_CHECKING:
    from ..core.report import Report
    from ..hooks.session import Session

DENSE = "dense"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """Rounds to the first token, rounds of whole answers, and rounds before each that do not count."""

    rounds: int = 9
    answers: int = 3
    warmup: int = 1


@dataclass(frozen=True)
class LeftOut:
    """A spec that was not measured, or a whole model, and why."""

    model: str
    spec: str | None
    reason: str


@dataclass(frozen=True)
class _Times:
    """Seconds of every side, round by round."""

    first: Mapping[str, list[float]]
    whole: Mapping[str, list[float]]
    choosing: Mapping[str, list[float]]
    processor: Mapping[str, list[float]]


@dataclass(frozen=True)
class _Measured:
    """What is counted once for a spec."""

    tokens: Sequence[float]
    flops: int
    peak_bytes: int
    logits_difference: float | None = None


@torch.inference_mode()
def measure(
    workload: Workload,
    specs: Iterable[str],
    *,
    answer_tokens: int = 32,
    effort: Effort | None = None,
    tell: Tell = lambda text: None,
) -> tuple[list[SpeedRow], list[LeftOut]]:
    """Rows of the dense model and of every spec that it supports, and the others with the reason.

    Args:
        tell: called with what is being done.
    """
    effort = effort or Effort()
    tell(f"{workload.name}: finding the fastest attention")
    attention, tried = best_attention(workload, rounds=min(3, effort.rounds))
    sessions, smaller, left_out = _prepared(workload, specs)
    choosing: dict[str, list[float]] = {spec: [] for spec in sessions}
    first, processor = _first_tokens(workload, sessions, smaller, choosing, effort, tell)
    whole = _answers(workload, sessions, smaller, answer_tokens, effort, tell)
    times = _Times(first, whole, choosing, processor)
    tell(f"{workload.name}: counting operations and memory")
    common = {
        "model": workload.name,
        "batch": workload.batch,
        "answer_tokens": answer_tokens,
        "text_tokens": workload.text_tokens,
        "device": device_name(workload.device),
        "dtype": str(workload.model.dtype).removeprefix("torch."),
        "attention": attention,
        "attention_tried_s": tried,
        "threads": torch.get_num_threads() if workload.device.type == "cpu" else None,
        "rounds": effort.rounds,
        "answer_rounds": effort.answers,
        "note": workload.note,
    }
    layers: Any = workload.adapter.language_model.layers
    # (layers,) the dense model reads the same number in all of them
    tokens = [_dense_tokens(workload)] * len(layers)
    rows = [_row(DENSE, times, _Measured(tokens, *_counted(workload)), common)]
    # counted apart from the timed rounds: counting slows a call down
    for spec, (session, free) in sessions.items():
        with session:
            counts = _counted(workload)
        # the ideal counts only if it computes the same: the row says how far apart they are
        difference = float((free.first_token() - free.logits).abs().max())
        measured = _Measured(_report(session).tokens_per_layer, *counts, difference)
        rows.append(_row(spec, times, measured, common))
    for spec, small in smaller.items():
        measured = _Measured([_dense_tokens(small)] * len(layers), *_counted(small))
        rows.append(_row(spec, times, measured, common))
    return rows, left_out


def _prepared(
    workload: Workload, specs: Iterable[str]
) -> tuple[dict[str, tuple[Session, FreeSide]], dict[str, Workload], list[LeftOut]]:
    """By spec a session with its ideal, or a workload with smaller pictures; and what cannot run."""
    sessions: dict[str, tuple[Session, FreeSide]] = {}
    smaller: dict[str, Workload] = {}
    left_out = []
    for text in dict.fromkeys(specs):
        if text == DENSE:
            continue
        try:
            if shrinks(text):
                smaller[str(parse(text))] = workload.smaller(text)
                continue
            session = prune(workload.model, text)
            # watches one pruned call, so that what a method cannot do here is known before anything is timed
            sessions[session.spec] = (session, FreeSide(session, workload.first_token))
        except UnsupportedError as error:
            left_out.append(LeftOut(workload.name, text, str(error)))
    return sessions, smaller, left_out


def best_attention(workload: Workload, rounds: int) -> tuple[str, dict[str, float]]:
    """The back end with the soonest dense first token, left switched on, and the times of all that run."""
    names = ["sdpa", "eager"]
    if (
        workload.device.type == "cuda"
        and is_flash_attn_2_available()
        and workload.model.dtype != torch.float32
    ):
        names.append("flash_attention_2")
    calls: dict[str, Entry] = {
        name: (_Attention(workload.model, name), workload.first_token) for name in names
    }
    times = {name: median(values) for name, values in race(calls, rounds, warmup=1).items()}
    best = min(times, key=times.__getitem__)
    workload.model.set_attn_implementation(best)
    return best, times


class _Attention:
    """Switches the back end of a model for a while."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self.before = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.name)

    def __exit__(self, *error: object) -> None:
        self.model.set_attn_implementation(self.before)


def _first_tokens(
    workload: Workload,
    sessions: dict[str, tuple[Session, FreeSide]],
    smaller: Mapping[str, Workload],
    choosing: dict[str, list[float]],
    effort: Effort,
    tell: Tell,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds to the first token of every side, by round, and those of its processor where it has its own;
    ``choosing`` takes what the sessions clock.
    """

    def attached(session: Session) -> None:
        workload.first_token()
        choosing[session.spec].append(_report(session).seconds)

    def free(side: FreeSide) -> None:
        workload.encode()
        side.first_token()

    # name -> (what is attached, the call); a spec has two sides, itself and "free ..."
    entries: dict[str, Entry] = {DENSE: (None, workload.first_token)}
    for spec, (session, side) in sessions.items():
        # bound now: a lambda in this loop would see the last session only
        entries[spec] = (session, partial(attached, session))
        entries[f"free {spec}"] = (None, partial(free, side))
    reading = {DENSE: workload.reading} | {spec: small.reading for spec, small in smaller.items()}
    entries |= {spec: (None, small.first_token) for spec, small in smaller.items()}
    # in the same rounds, so that both can be added up
    entries |= {f"read {spec}": (None, made) for spec, made in reading.items() if made is not None}
    times = race(
        entries,
        effort.rounds,
        warmup=effort.warmup,
        on_round=_counter(workload, "first tokens", effort.rounds + effort.warmup, tell),
    )
    for values in choosing.values():
        # race drops its own warm-up; the clock of the session knows nothing of it
        del values[: effort.warmup]
    return times, {spec: times[f"read {spec}"] for spec, made in reading.items() if made is not None}


def _answers(
    workload: Workload,
    sessions: dict[str, tuple[Session, FreeSide]],
    smaller: Mapping[str, Workload],
    tokens: int,
    effort: Effort,
    tell: Tell,
) -> dict[str, list[float]]:
    entries: dict[str, Entry] = {DENSE: (None, lambda: workload.answer(tokens))}
    entries |= {spec: (session, lambda: workload.answer(tokens)) for spec, (session, _) in sessions.items()}
    entries |= {spec: (None, partial(small.answer, tokens)) for spec, small in smaller.items()}
    counter = _counter(workload, f"answers of {tokens} tokens", effort.answers + effort.warmup, tell)
    return race(entries, effort.answers, warmup=effort.warmup, on_round=counter)


def _counter(workload: Workload, what: str, rounds: int, tell: Tell) -> Callable[[], None]:
    done = iter(range(1, rounds + 1))
    tell(f"{workload.name}: {what}")
    return lambda: tell(f"{workload.name}: {what}, round {next(done)} of {rounds}")


def _dense_tokens(workload: Workload) -> float:
    with prune(workload.model, DENSE) as session:
        workload.first_token()
    dense = _report(session).dense_tokens
    return sum(dense) / len(dense)


def _report(session: Session) -> Report:
    """Of the forward that was just timed."""
    if session.last is None:
        raise EvaluationError(
            f"{session.spec} saw no forward; the workload must call the model that it was built for"
        )
    return session.last


def _counted(workload: Workload) -> tuple[int, int]:
    return workload.flops(workload.first_token), peak_bytes(workload.first_token, workload.device)


def _row(spec: str, times: _Times, measured: _Measured, common: Mapping[str, Any]) -> SpeedRow:
    # field of the row -> its values, one a round
    lists = {
        "first_token_s": times.first[spec],
        "total_s": times.whole[spec],
        "versus_dense": ratios(times.first[DENSE], times.first[spec]),
        "versus_dense_total": ratios(times.whole[DENSE], times.whole[spec]),
    }
    if DENSE in times.processor:
        before = {name: times.processor.get(name, times.processor[DENSE]) for name in (DENSE, spec)}
        lists["processor_s"] = before[spec]
        lists["versus_dense_picture"] = ratios(
            *(list(map(sum, zip(before[name], times.first[name], strict=True))) for name in (DENSE, spec))
        )
    if spec in times.choosing:
        free = times.first[f"free {spec}"]
        lists |= {
            "choosing_s": times.choosing[spec],
            "free_k_s": free,
            "versus_free_k": ratios(times.first[spec], free),
            "ideal_versus_dense": ratios(times.first[DENSE], free),
        }
    spreads = {name: spread(values) for name, values in lists.items()}
    medians: dict[str, Any] = {name: median(values) for name, values in lists.items()}
    return SpeedRow(
        spec=spec,
        **common,
        **medians,
        p20={name: low for name, (low, _) in spreads.items()},
        p80={name: high for name, (_, high) in spreads.items()},
        tokens_per_layer=tuple(measured.tokens),
        flops=measured.flops,
        peak_bytes=measured.peak_bytes,
        logits_difference=measured.logits_difference,
    )


def check_place(place: Path) -> None:
    """Raise where ``save`` could not add rows."""
    _held(place)


def save(rows: Sequence[SpeedRow], place: Path, measured: Mapping[str, Any]) -> Path:
    """Add rows to a .json file, or to speed.json in a run folder; older rows of the same case go.

    Args:
        measured: the conditions at the start, before the timing itself was the load; those of older rows that
            stay are listed as "earlier".
    """
    path, known, there = _held(place)
    new = {row.case for row in rows}
    kept = [row for row in known if row.case not in new]
    card: dict[str, Any] = {"rows": plain([*kept, *rows]), "conditions": dict(measured)}
    # those of the rows that stay, which the newer ones say nothing of
    if kept:
        card["earlier"] = [*there.get("earlier", []), there.get("conditions", {})]
    replace_text(path, json.dumps(card, indent=1) + "\n")
    return path


def _held(place: Path) -> tuple[Path, list[SpeedRow], dict[str, Any]]:
    """The file of a card, its rows and all that it says; a file that is no card is refused."""
    path = place if place.suffix == ".json" else place / "speed.json"
    if not path.parent.is_dir():
        raise SpecError(
            f"--out {str(place)!r}: the folder {str(path.parent)!r} does not exist; make it first"
        )
    if not path.exists():
        return path, [], {}
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        return path, [read(SpeedRow, row, "row") for row in there["rows"]], there
    except (OSError, ValueError, KeyError, TypeError, EvaluationError) as error:
        raise SpecError(f"--out: {path} holds no speed card ({error}); choose another file") from error
