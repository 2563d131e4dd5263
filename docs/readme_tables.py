# SPDX-License-Identifier: Apache-2.0
"""Write the README's table of methods anew, from what the methods declare and the titles of their cards.

    python docs/readme_tables.py

Only what stands between the two marks is replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vlmprune.cli.catalogue import example
from vlmprune.core.method import SLOTS
from vlmprune.registry import get, list_methods, method_info

ROOT = Path(__file__).resolve().parent.parent
README, CARDS = ROOT / "README.md", ROOT / "methods"
BEGIN = "<!-- methods: made by docs/readme_tables.py, not by hand -->"
END = "<!-- end of methods -->"
WHERE = {
    "picture": "before the processor",
    "encoder": "inside the vision tower",
    "before_lm": "before the language model",
    "inside_lm": "inside the language model",
    "attention": "edits attention",
    "decode": "at every new token",
    "answer": "asks again",
}


def names() -> list[str]:
    """Built-in methods: what has no paper first, then by where they act."""
    own = [name for name in list_methods() if get(name).__module__.startswith("vlmprune.")]

    def place(name: str) -> tuple[bool, bool, int, str]:
        cls = get(name)
        return bool(cls.paper), cls.wraps, SLOTS.index(cls.slot), name

    return sorted(own, key=place)


def without_card() -> list[str]:
    """Methods that can have no line yet."""
    return [name for name in names() if not (CARDS / f"{name}.md").is_file()]


def line(name: str) -> str:
    """One row of the table."""
    cls, info = get(name), method_info(name)
    paper = info.paper
    title = (CARDS / f"{name}.md").read_text(encoding="utf-8").partition("\n")[0]
    spec = f"{name}+fastervlm@64" if cls.slot == "attention" else example(info)
    where = "around another method" if cls.wraps else WHERE[cls.slot]
    number = paper.removeprefix("arXiv:")
    link = f"[{paper}](https://arxiv.org/abs/{number})" if paper.startswith("arXiv:") else paper
    return f"| `{spec}` | {title.partition(': ')[2]} | {where} | {link} |"


def table() -> str:
    """All methods that have a card."""
    head = ["| spec | what it does | where | paper |", "|---|---|---|---|"]
    return "\n".join([*head, *(line(name) for name in names() if name not in without_card())])


def filled(text: str) -> str:
    """The README with the table of now."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md lacks the marks {BEGIN} and {END}; put them around its table of methods")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    if missing := without_card():
        sys.exit(
            f"no line for {', '.join(missing)}: write methods/NAME.md with a title '# NAME: what it does'"
        )


if __name__ == "__main__":
    main()
