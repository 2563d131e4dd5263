# SPDX-License-Identifier: Apache-2.0
"""What a run of serving_load.py says, and its table in docs/serve.md:

    python benchmarks/serving_table.py     # write what stands between the two marks of the page again

The runs are those of benchmarks/results/serving_load.jsonl; without that file the page says that there are
none. Gains are ratios to the first spec within a round: their median, least and most. "pays" and "does not
pay" take three rounds that agree.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs/serve.md", ROOT / "benchmarks/results/serving_load.jsonl"
BEGIN = "<!-- load: made by benchmarks/serving_table.py, not by hand -->"
END = "<!-- end of load -->"
FEWEST = 3  # rounds that a verdict takes
IDLE = 0.75  # most processes that ran before the start on a machine that is called idle


@dataclass(frozen=True)
class Run:
    """What one spec gave at one concurrency in one round."""

    spec: str
    at_once: int
    round: int
    prompt: float
    first_token_ms: float
    first_token_p99_ms: float
    tokens_per_s: float
    requests_per_s: float
    kv_blocks: float


@dataclass(frozen=True)
class Gain:
    """How much better than the first spec, per round: above 1 is better."""

    rounds: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """``"gain"`` or ``"loss"`` where all rounds agree, else ``"unclear"``."""
        if len(self.rounds) < FEWEST:
            return "unclear"
        if min(self.rounds) > 1:
            return "gain"
        return "loss" if max(self.rounds) <= 1 else "unclear"

    def __str__(self) -> str:
        return f"{statistics.median(self.rounds):.2f}x ({min(self.rounds):.2f} to {max(self.rounds):.2f})"


@dataclass(frozen=True)
class Row:
    """A line of the file: a run, what it was asked with, and under which conditions it was made.

    Args:
        same: what all runs of a file share.
        conditions: versions, machine, its load before the server started, date and commit.
    """

    same: Mapping[str, Any]
    conditions: Mapping[str, Any]
    run: Run


def read(path: Path, same: Mapping[str, Any] | None = None) -> list[Row]:
    """The rows of a file; what a kill left of its last line is dropped, and nothing else.

    Args:
        same: what they must have been asked with; None takes any, if it is the same in all of them.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    found = [json.loads(line) for line in whole.splitlines()]
    rows = [Row(one["same"], one["conditions"], Run(**one["run"])) for one in found]
    for number, row in enumerate(rows, 1):
        wanted = rows[0].same if same is None else same
        other = {
            key: row.same.get(key) for key in {*wanted, *row.same} if row.same.get(key) != wanted.get(key)
        }
        if other:
            raise SystemExit(
                f"{path}: line {number} was measured with {other}, not "
                f"{ {key: wanted.get(key) for key in other} }; give another --out, or the same options"
            )
    return rows


def append(path: Path, row: Row) -> None:
    """Write one row behind the others, as soon as it is made."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def chosen(runs: Sequence[Run], spec: str, at_once: int) -> list[Run]:
    """The runs of one spec at one concurrency, by round."""
    some = [one for one in runs if (one.spec, one.at_once) == (spec, at_once)]
    return sorted(some, key=lambda one: one.round)


def gains(runs: Sequence[Run], base: str, spec: str, at_once: int) -> dict[str, Gain]:
    """First token and throughput of a spec against the first one, within each round."""
    pairs = list(zip(chosen(runs, base, at_once), chosen(runs, spec, at_once), strict=True))
    return {
        "first token": Gain(tuple(one.first_token_ms / other.first_token_ms for one, other in pairs)),
        "throughput": Gain(tuple(other.requests_per_s / one.requests_per_s for one, other in pairs)),
    }


def verdict(found: dict[str, Gain]) -> str:
    """Whether pruning pays, in words; only what all rounds agree on is said."""
    words = {"gain": "pays", "loss": "does not pay", "unclear": "not clear"}
    by_word = {word: [name for name, gain in found.items() if gain.verdict == word] for word in words}
    said = [(words[word], names) for word, names in by_word.items() if names]
    if len(said) == 1:
        return said[0][0]
    return ", ".join(f"{word} in {' and '.join(names)}" for word, names in said)


_COLUMNS = (
    ("prompt", 8, 0),
    ("first_token_ms", 12, 1),
    ("first_token_p99_ms", 12, 1),
    ("tokens_per_s", 10, 1),
    ("requests_per_s", 11, 2),
    ("kv_blocks", 10, 0),
)


def table(runs: Sequence[Run], specs: Sequence[str], concurrency: Sequence[int]) -> list[str]:
    """Medians over the rounds, then what every spec gains against the first."""
    names = ("prompt", "first, ms", "p99, ms", "tokens/s", "requests/s", "KV blocks")
    head = "".join(f"{name:>{width}}" for name, (_, width, _) in zip(names, _COLUMNS, strict=True))
    lines = [f"{'at once':>7}  {'spec':24}{head}"]
    for at_once in concurrency:
        for spec in specs:
            some = chosen(runs, spec, at_once)
            values = "".join(
                f"{statistics.median(getattr(one, name) for one in some):{width}.{digits}f}"
                for name, width, digits in _COLUMNS
            )
            lines.append(f"{at_once:7}  {spec:24}{values}")
    for at_once in concurrency:
        for spec in specs[1:]:
            found = gains(runs, specs[0], spec, at_once)
            said = ", ".join(f"{name} {gain}" for name, gain in found.items())
            lines.append(f"{spec} against {specs[0]}, {at_once} at once: {said}: {verdict(found)}")
    return lines


def complete(runs: Sequence[Run], specs: Sequence[str], concurrency: Sequence[int]) -> list[Run]:
    """The runs of rounds in which every spec was asked at every concurrency."""
    cells = {(spec, at_once) for spec in specs for at_once in concurrency}
    seen: dict[int, set[tuple[str, int]]] = {}
    for one in runs:
        seen.setdefault(one.round, set()).add((one.spec, one.at_once))
    return [one for one in runs if seen[one.round] == cells]


HEAD = (
    "| clients | spec | prompt | first token, ms | p99, ms | requests/s | KV blocks | "
    "first token, gain | throughput, gain | verdict |"
)


def page_table(runs: Sequence[Run], specs: Sequence[str], concurrency: Sequence[int]) -> list[str]:
    """The same in Markdown, a line per concurrency and spec."""
    names = ("prompt", "first_token_ms", "first_token_p99_ms", "requests_per_s", "kv_blocks")
    digits = {name: count for name, _, count in _COLUMNS}
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    for at_once in concurrency:
        for spec in specs:
            some = chosen(runs, spec, at_once)
            values = [
                f"{statistics.median(getattr(one, name) for one in some):,.{digits[name]}f}" for name in names
            ]
            found = gains(runs, specs[0], spec, at_once)
            said = ["", "", ""] if spec == specs[0] else [*map(str, found.values()), verdict(found)]
            lines.append(" | ".join([f"| {at_once}", f"`{spec}`", *values, *said]) + " |")
    return lines


def summary(runs: Sequence[Run], specs: Sequence[str], concurrency: Sequence[int]) -> str:
    """Where pruning pays and where it does not, in one sentence for each."""
    where: dict[str, list[str]] = {}
    for spec in specs[1:]:
        by_word: dict[str, list[str]] = {}
        for at_once in concurrency:
            word = verdict(gains(runs, specs[0], spec, at_once))
            by_word.setdefault(word, []).append(str(at_once))
        for word, clients in by_word.items():
            where.setdefault(word, []).append(f"`{spec}` (clients: {', '.join(clients)})")
    return " ".join(
        f"{word[0].upper()}{word[1:]}: {', '.join(cells)}." for word, cells in sorted(where.items())
    )


def told(rows: Sequence[Row]) -> str:
    """The conditions of a table."""
    first = rows[0]
    same = first.same
    versions = ", ".join(f"{name} {version}" for name, version in first.conditions["versions"].items())
    loads = sorted({one.conditions["load_before"] for one in rows})
    dates = sorted({one.conditions["date"][:10] for one in rows})
    commits = sorted({str(one.conditions["commit"]) for one in rows})
    busy = "" if loads[-1] <= IDLE else ", **a busy machine**"
    return (
        f"Conditions: {first.conditions['processor']}, {versions}; load before the start "
        f"{' and '.join(map(str, loads))}{busy}; {' and '.join(dates)}, commit {' and '.join(commits)}. "
        f"{same['requests']} requests of each spec at each concurrency in each of "
        f"{len({one.run.round for one in rows})} rounds, pictures of {same['side']} pixels, answers of "
        f"{same['answer']} tokens."
    )


def section(rows: Sequence[Row]) -> str:
    """What stands between the marks of the page."""
    none = "It has not been run to its end on an idle machine yet, so that no ratio stands here."
    if not rows:
        return none
    specs, concurrency = rows[0].same["specs"], rows[0].same["concurrency"]
    runs = complete([one.run for one in rows], specs, concurrency)
    if not runs:
        return none
    used = [one for one in rows if one.run in runs]
    lines = page_table(runs, specs, concurrency)
    rule = (
        f"Gains are medians of ratios to `{specs[0]}` within a round, with the least and the most; a verdict "
        f"takes {FEWEST} rounds that agree."
    )
    return "\n".join([*lines, "", f"{summary(runs, specs, concurrency)} {rule}", "", told(used)])


def filled(text: str, rows: Sequence[Row]) -> str:
    """The page with the table of ``rows``."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} lacks the marks {BEGIN} and {END}; put them around its table")
    return f"{before}{BEGIN}\n\n{section(rows)}\n\n{END}{after}"


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), read(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
