# SPDX-License-Identifier: Apache-2.0
"""Write the reference of config keys, docs/config.md, and the JSON Schema of the same keys for editors,
docs/config.schema.json, from what the package reads.

python docs/config.py            write both
python docs/config.py --check    say whether they are current; exit code 1 if not
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vlmprune.evaluation.leaderboard.config import LARGEST, POSITIONS, SEEDS, Config
from vlmprune.evaluation.leaderboard.published import ENTRY_KEYS, KEYS, NEEDED, SIZES, Published, shipped
from vlmprune.evaluation.tasks.registry import LMMS
from vlmprune.models.loading import DTYPES
from vlmprune.spec import Spec

PAGE = Path(__file__).resolve().parent / "config.md"
SCHEMA = PAGE.with_name("config.schema.json")
TYPES = {str: "text", int: "whole number, 1 or more", Spec: "spec", Published: "name, or path of a YAML file"}
FORMS = {  # what the type does not say
    "seeds": f"list of whole numbers, at least {len(SEEDS)}, none negative",
    "tasks": "list of `shapes`, `scenes`, `scenes-sizes`, `clips`, names of plug-ins, "
    f"`{LMMS}NAME` or `{LMMS}FILE.yaml`",
    "dtype": ", ".join(f"`{name}`" for name in DTYPES),
    "positions": ", ".join(f"`{name}`" for name in POSITIONS),
}
SAID = {  # what the schema says of two keys at once, and of the key that is no field of it
    "split": "part of each task",
    "limit": "samples of each task; none is all of them",
    "keep": "budgets for every spec that has none of its own: each such spec runs once with each of them",
}
# every key once; a test reads it
EXAMPLE = """\
models: [llava-hf/llava-1.5-7b-hf]
specs: [fastervlm, "divprune@64", "fastv(layer=2)"]
keep: [192, 0.25, 64/crop]
tasks: [shapes, lmms:gqa_images]
seeds: [0, 1, 2]
out: runs/mine
split: test
limit: 500
batch_size: 16
max_new_tokens: 16
positions: compact
dtype: bfloat16
published: llava-1.5-7b
"""


def meanings() -> dict[str, str]:
    """Field -> text, from the docstring of Config; an entry may be about several fields."""
    doc = inspect.getdoc(Config) or ""
    entries = re.findall(r"^ {4}([a-z_, ]+): (.+(?:\n {8}.+)*)", doc, re.MULTILINE)
    said = {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")} | SAID
    return {name: text.rstrip(".").replace("None", "none").replace("``", "`") for name, text in said.items()}


def form(field: Field[Any], hint: Any) -> str:
    """What YAML must hold."""
    if field.name in FORMS:
        return FORMS[field.name]
    if get_origin(hint) is tuple:
        return f"list of {TYPES[get_args(hint)[0]]}s".replace("texts", "text")
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return TYPES[kinds[0]]


def default(field: Field[Any]) -> str:
    if field.default is MISSING:
        return "must be given"
    if field.default is None:
        return "none"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{value}`".replace("'", "")


def rows() -> list[str]:
    """One line of the table for each key."""
    said, hints = meanings(), get_type_hints(Config)
    lines = [
        f"| `{field.name}` | {form(field, hints[field.name])} | {default(field)} | {said[field.name]} |"
        for field in fields(Config)
    ]
    names = [field.name for field in fields(Config)]
    keep = f"| `keep` | list of budgets: `64`, `0.25`, `64/crop`, `64/total` | none | {said['keep']} |"
    return [*lines[: names.index("specs") + 1], keep, *lines[names.index("specs") + 1 :]]


def _list(item: dict[str, Any], least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least, "uniqueItems": True}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 1, "maximum": LARGEST}
SEED = {"type": "integer", "minimum": 0, "maximum": LARGEST}
BUDGET = {
    "oneOf": [
        {"type": "integer", "minimum": 1},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "not": {"type": "integer"}},
        {"type": "string", "pattern": r"^\d+(\.\d+)?(/(image|crop|total))?$"},
    ]
}
# by what a field holds; a key that may be none is wrapped below
RULES: dict[str, dict[str, Any]] = {
    "models": _list(TEXT),
    "specs": _list(TEXT),
    "keep": _list(BUDGET),
    "tasks": _list(TEXT),
    "seeds": _list(SEED, len(SEEDS)),
    "out": TEXT,
    "split": TEXT,
    "limit": COUNT,
    "batch_size": COUNT,
    "max_new_tokens": COUNT,
    "positions": {"enum": list(POSITIONS)},
    "dtype": {"enum": list(DTYPES)},
    "published": TEXT,
}
LISTS = {"models", "specs", "tasks", "seeds"}  # none of these may be none


def schema() -> str:
    """The JSON Schema. Names of methods, tasks and options are left open: only the package knows them."""
    said, properties = meanings(), {}
    defaults = {field.name: field.default for field in fields(Config)}
    for name, rule in RULES.items():
        given = rule if name in LISTS else {"anyOf": [rule, {"type": "null"}]}
        default = defaults.get(name)
        shown = {} if default in (None, MISSING) else {"default": default}
        properties[name] = {"description": said[name], **given, **shown}
    made = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A config of vlmprune leaderboard",
        "type": "object",
        "properties": properties,
        "required": ["models", "specs"],
        "additionalProperties": False,
    }
    return json.dumps(made, indent=2) + "\n"


def page() -> str:
    """The whole page."""
    table = "\n".join(rows())
    return f"""\
# Config keys

Made by `docs/config.py` from the code; not edited by hand. A config is a YAML file for
`vlmprune leaderboard FILE`; `vlmprune validate FILE` checks it without running anything. A key that is not
listed here is an error.

| key | what it holds | default | meaning |
|---|---|---|---|
{table}

`dense`, `blind`, `random` under each seed, `uniform` and `pool` join by themselves, and `downsample` where
the model reads pictures of any size. The keys of the command line
(`--specs`, `--limit`, `--batch-size`, `--positions`, `--out`) go before those of the file. The path of a
file that `published` names begins at the folder of the config; `out`, folders of models and task files begin
where the command runs.

## All keys

```yaml
{EXAMPLE}```

Smaller ones are in [`configs/`](../configs). Editors complete and check these keys by their JSON Schema,
[`config.schema.json`](config.schema.json): [how](howto/leaderboard.md#an-editor-that-knows-the-keys).

## Published numbers

`published` names a table of the package ({listed(shipped())}), or a `.yaml` file. Such a file has the keys
{listed(KEYS)}, and may have {listed(SIZES)}: the visual tokens of an unpruned picture, and the tiles or
frames that they are of, without which its budgets are no shares. `columns` gives each column of the papers'
tables the task here that it may be compared with, or null. Each of `entries` has {listed(sorted(NEEDED))},
and any of {listed(sorted(ENTRY_KEYS - NEEDED))}.
"""


def listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the reference of config keys and their JSON Schema.")
    parser.add_argument("--check", action="store_true", help="only say whether both are current")
    check = parser.parse_args().check
    for path, text in ((PAGE, page()), (SCHEMA, schema())):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"docs/{path.name} is out of date; run python docs/config.py")


if __name__ == "__main__":
    main()
