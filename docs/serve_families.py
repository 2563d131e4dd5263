# SPDX-License-Identifier: Apache-2.0
"""Write the tables of families in docs/serve.md anew, from vlmprune/serving/vllm/families.py.

    python docs/serve_families.py

Only what stands between the two marks is replaced.
"""

from __future__ import annotations

from pathlib import Path

from vlmprune.serving.vllm.families import IN_WRAPPER, NOT_SERVED, TRIED

PAGE = Path(__file__).resolve().parent / "serve.md"
BEGIN = "<!-- families: made by docs/serve_families.py, not by hand -->"
END = "<!-- end of families -->"


def served() -> str:
    """A row for each family that runs in the wrapper."""
    head = ["| family, served and measured | a picture is | what methods can read |", "|---|---|---|"]
    rows = [f"| `{name}` | {picture} | {reads} |" for name, (_, picture, reads) in sorted(IN_WRAPPER.items())]
    return "\n".join(head + rows)


def refused() -> str:
    """A row for each reason, apart for what was tried and what was read."""
    by_reason: dict[tuple[str, bool], list[str]] = {}
    for name, (_, reason) in NOT_SERVED.items():
        by_reason.setdefault((reason, name in TRIED), []).append(f"`{name}`")
    head = ["| families that are refused | why | how that is known |", "|---|---|---|"]
    # what refuses most families first
    order = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    rows = [
        f"| {', '.join(names)} | {reason} | {'tried' if tried else 'read'} |"
        for (reason, tried), names in order
    ]
    return "\n".join(head + rows)


def filled(text: str) -> str:
    """The page with the tables of now."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.name} lacks the marks {BEGIN} and {END}; put them around its tables")
    return f"{before}{BEGIN}\n\n{served()}\n\n{refused()}\n\n{END}{after}"


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
