# SPDX-License-Identifier: Apache-2.0
"""Break the package on purpose, one mistake at a time, and see that a check or a test notices.

    python tests/mutants.py               # all mutants
    python tests/mutants.py NAME ...      # some
    python tests/mutants.py --list        # names, targets and judges

The mutants are in ``tests/mutation``. Exit code 0: all are killed, 1: one is not (it survived, or
its judge ran out of time or died, or the mutant itself is broken), 2: a name does not exist.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "mutation"))
from mutant_runner import prepare, run
from mutant_table import MUTANTS

from vlmprune.errors import did_you_mean


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to try; default all")
    parser.add_argument("--list", action="store_true", help="show the mutants and try none")
    parser.add_argument("--why", action="store_true", help="show what each judge said")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds for one mutant (300)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time (1)")
    options = parser.parse_args(given)
    if not options.timeout > 0 or options.jobs < 1:
        asked = f"--timeout {options.timeout} --jobs {options.jobs}"
        parser.error(f"{asked}; expected more than 0 seconds, and 1 job or more")
    known = {mutant.name: mutant for mutant in MUTANTS}
    for name in options.names:
        if name not in known:
            parser.error(
                f"no mutant is called {name!r}.{did_you_mean(name, known)} --list shows all {len(known)}"
            )
    options.mutants = [known[name] for name in dict.fromkeys(options.names)] or MUTANTS
    return options


def main(given: list[str]) -> int:
    options = arguments(given)
    width = max(len(mutant.name) for mutant in options.mutants)
    if options.list:
        for mutant in options.mutants:
            print(f"{mutant.name:{width}}  {mutant.target}  by {mutant.by}")
        return 0
    prepare([mutant.by for mutant in options.mutants])
    found: Counter[str] = Counter()
    for mutant, verdict in run(options.mutants, options.timeout, options.jobs):
        found[verdict.status] += 1
        word = verdict.status if verdict.status == "killed" else verdict.status.upper()
        who = verdict.killer or verdict.detail.partition("\n")[0][:200]
        print(f"{word:8}  {mutant.name:{width}}  {verdict.seconds:5.1f} s  {who}", flush=True)
        if options.why:
            print(f"          {verdict.detail}", flush=True)
    counts = ", ".join(f"{count} {status}" for status, count in found.most_common())
    print(f"{len(options.mutants)} mutants: {counts}")
    return 0 if found["killed"] == len(options.mutants) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
