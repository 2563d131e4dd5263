# SPDX-License-Identifier: Apache-2.0
"""Execute the notebooks. Each is a Python file with cells; beside it stands the same with its outputs.

    python notebooks/build.py            # execute all, and write NAME.ipynb with what the cells showed
    python notebooks/build.py 03 05      # those whose names begin so
    python notebooks/build.py --check    # execute, write nothing; fail where a cell shows something else

Cells begin with ``# %%``, or ``# %% [markdown]`` for text. It needs the extra ``notebook``. The one
about timm also needs timm and torchvision; where they are missing it is left out, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
LONGEST = 60  # seconds that a reader may have to wait for a notebook, on one core
NEEDS = {"07_timm_towers": ("timm", "torchvision")}
# what differs from run to run and says nothing: times, and addresses of objects
PASSING = re.compile(r"\d+(?:\.\d+)? (?:ms|s|KiB)\b|0x[0-9a-f]+")
VIEW = "application/vnd.jupyter.widget-view+json"


class Cell(NamedTuple):
    """A cell as it is written: "markdown" or "code", and its text."""

    kind: str
    text: str


def cells(source: str) -> list[Cell]:
    """The cells of a file; what stands before the first one is for readers of the file alone."""
    found: list[Cell] = []
    for block in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        head, _, text = block.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines()]
            found.append(Cell("markdown", "\n".join(lines)))
        elif not head.strip():
            found.append(Cell("code", text.strip()))
        else:
            raise ValueError(f"a cell begins with '# %%{head}'; expected '# %%' or '# %% [markdown]'")
    return found


def notebook(path: Path) -> Any:
    """The notebook of a file, not executed."""
    from nbformat import v4

    made = v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for number, cell in enumerate(cells(path.read_text(encoding="utf-8"))):
        new = v4.new_markdown_cell if cell.kind == "markdown" else v4.new_code_cell
        made.cells.append(new(cell.text, id=f"cell-{number}"))  # the same id each time, for small diffs
    return made


def execute(path: Path) -> Any:
    """The notebook of a file with what its cells showed; an error in a cell is raised."""
    from nbclient import NotebookClient

    made = notebook(path)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            made, timeout=5 * LONGEST, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    freeze(made)
    return made


def freeze(made: Any) -> None:
    """Leave what a reader sees, and nothing that differs from run to run by chance."""
    kept = made.metadata.pop("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # when it ran
        outputs: list[Any] = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            view = data.pop(VIEW, None)
            if view is not None:  # a widget is dead without its kernel: what it showed stays
                output["data"] = {"text/html": "".join(drawings(view["model_id"], kept.get("state", {})))}
            if "image/png" in data:
                data.pop("image/jpeg", None)  # the same picture once more
            last = outputs[-1] if outputs else {}
            if output["output_type"] == "stream" and last.get("name") == output["name"]:
                last["text"] += output["text"]  # a stream comes in pieces, as it happens
            else:
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs


def drawings(model: str, states: Any) -> list[str]:
    """The HTML of a widget and of those inside of it."""
    state = states[model]["state"]
    inner = [child.removeprefix("IPY_MODEL_") for child in state.get("children", [])]
    own = [state["value"]] if state.get("_model_name") == "HTMLModel" else []
    return own + [text for child in inner for text in drawings(child, states)]


def shown(cell: Any) -> str:
    """What a cell shows, as text that is the same in each run: of pictures only that they are there."""
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        kinds = [kind for kind in ("text/html", "text/markdown", "text/plain") if kind in data]
        text = output.get("text") or (data[kinds[0]] if kinds else "")
        parts.append("".join(text) if isinstance(text, list) else text)
        parts += [kind for kind in data if kind.startswith("image/")]
    text = re.sub(r"data:image/png;base64,[^\"]+", "(a picture)", "\n".join(parts))
    return PASSING.sub("(passing)", text)


def differences(old: Any, new: Any) -> list[str]:
    """Cells that are written otherwise or show something else, as lines of text."""
    if [cell["source"] for cell in old.cells] != [cell["source"] for cell in new.cells]:
        return ["its cells are not those of the Python file"]
    pairs = [(shown(before), shown(after)) for before, after in zip(old.cells, new.cells, strict=True)]
    return [
        f"cell {number} shows\n{after.strip()}\nand not, as written,\n{before.strip()}"
        for number, (before, after) in enumerate(pairs)
        if before != after
    ]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="beginnings of names; all notebooks without any")
    parser.add_argument("--check", action="store_true", help="compare with what is written")
    options = parser.parse_args(words)
    paths = [path for path in sorted(FOLDER.glob("[0-9]*.py")) if wanted(path.stem, options.names)]
    if not paths:
        parser.error(f"no notebook begins with {options.names}")
    # kernels inherit these; kernels/ in the root must not be importable, see CONTRIBUTING.md
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    failed = 0
    for path in paths:
        missing = [name for name in NEEDS.get(path.stem, ()) if find_spec(name) is None]
        if missing:
            print(f"{path.stem}: left out, {' and '.join(missing)} not installed")
            continue
        failed += one(path, options.check)
    return min(failed, 1)


def wanted(name: str, beginnings: list[str]) -> bool:
    return not beginnings or any(name.startswith(beginning) for beginning in beginnings)


def one(path: Path, check: bool) -> int:
    """Execute one; 1 if it is not what is written."""
    import nbformat

    started = time.monotonic()
    made = execute(path)
    spent = time.monotonic() - started
    print(f"{path.stem}: {spent:.0f} s" + f", more than {LONGEST} s" * (spent > LONGEST), flush=True)
    target = path.with_suffix(".ipynb")
    if not check:
        nbformat.write(made, target)
        return 0
    found = differences(nbformat.read(target, as_version=4), json_like(made))
    for text in found:
        print(f"{target.name}: {text}", file=sys.stderr)
    if found:
        print(f"run python notebooks/build.py {path.stem[:2]}", file=sys.stderr)
    return int(bool(found))


def json_like(made: Any) -> Any:
    """As it would be read from a file."""
    import nbformat

    return nbformat.reads(json.dumps(made), as_version=4)


if __name__ == "__main__":
    sys.exit(main())
