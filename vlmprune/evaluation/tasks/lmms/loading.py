# SPDX-License-Identifier: Apache-2.0
"""Tasks of lmms-eval by name: its own, our overlays, and YAML files; what is missing is said at once."""

from __future__ import annotations

import shutil
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ....checks import check_apart
from ....errors import EvaluationError, UnsupportedError, did_you_mean
from . import shapes

MODEL_NAME = "vlmprune"  # tasks choose prompts by the name of the model; this one gets their defaults


def folder() -> Path:
    """Where the task files of this package are."""
    return Path(str(resources.files("vlmprune"))) / "assets" / "lmms_tasks"


def write_tasks(out: Path, limit: int | None = None) -> list[str]:
    """Fill a folder for ``lmms-eval --include_path`` with our tasks and their data; returns their names."""
    need_lmms_eval()
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder().glob("*.yaml")):
        check_apart("the task", out / path.name, [path])
        shutil.copyfile(path, out / path.name)
    shapes.write(out / f"{shapes.NAME}.parquet", limit)
    return sorted(path.stem for path in out.glob("*.yaml"))


def installed() -> bool:
    """Whether lmms-eval is there."""
    return find_spec("lmms_eval") is not None


def need_lmms_eval() -> None:
    """Raise unless lmms-eval is installed."""
    if not installed():
        raise EvaluationError(
            "lmms-eval is not installed; expected version 0.7.3 or newer: pip install -e '.[eval]' in a "
            "clone of vlmprune"
        )


def read_config(name: str) -> dict[str, Any]:
    """The resolved configuration of one generation task."""
    need_lmms_eval()
    from lmms_eval.utils import load_yaml_config

    # a file of ours stands before a task of lmms-eval of the same name
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder() / f"{name}.yaml"
    if path.is_file():
        config = load_yaml_config(str(path), mode="full")
    elif path.parent != folder():
        raise EvaluationError(
            f"the task file {name!r} does not exist; expected a YAML file or the name of a task of lmms-eval"
        )
    else:
        config = _built_in(name)
    if "class" in config:
        raise UnsupportedError(
            f"the task {name!r} is a Python class of lmms-eval; run it with lmms-eval --model vlmprune"
        )
    output = config.get("output_type", "generate_until")
    if output != "generate_until":
        raise UnsupportedError(f"the task {name!r} is of type {output!r}; expected 'generate_until'")
    return config


@cache
def _manager() -> Any:
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", model_name=MODEL_NAME)  # reads some two thousand files: once per process


def _built_in(name: str) -> dict[str, Any]:
    manager = _manager()
    entry = manager.task_index.get(name)
    ours = [path.stem for path in folder().glob("*.yaml")]
    if entry is None:
        near = did_you_mean(name, [*manager.all_tasks, *ours], most=3, cutoff=0.75)
        raise EvaluationError(
            f"lmms-eval has no task {name!r} among its {len(manager.all_tasks)}.{near} Ours are "
            f"{sorted(ours)}"
        )
    if entry["type"] != "task":
        raise UnsupportedError(
            f"{name!r} is a {entry['type']} of several tasks; give one of them (lmms-eval tasks subtasks)"
        )
    return manager._get_config(name)


def build(name: str) -> Any:
    """The task with its data; raises at once, and says how to get the data, where they are not here."""
    config = read_config(name)
    import lmms_eval.api.metrics  # noqa: F401  registers the aggregations that task files name
    from lmms_eval.api.task import ConfigurableMessagesTask

    class Eager(ConfigurableMessagesTask):
        # lmms-eval tries both five times, two seconds apart, and then hides the cause
        download = ConfigurableMessagesTask.download.__wrapped__
        process_results = ConfigurableMessagesTask.process_results.__wrapped__

    data, part = config.get("dataset_path"), config.get("dataset_name")
    try:
        return Eager(config=config, model_name=MODEL_NAME)
    except (OSError, ValueError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        # the first line with words; the whole text is chained
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EvaluationError(
            f"the task {name!r} cannot load its data {data!r}{f' ({part})' if part else ''}: {cause}. "
            f"{_remedy(config)}"
        ) from error


def _remedy(config: dict[str, Any]) -> str:
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files:
        return (
            f"Expected the files {files}; for the synthetic benchmark, write them with: vlmprune lmms-tasks "
            "FOLDER"
        )
    arguments = ", ".join(
        repr(word) for word in (config.get("dataset_path"), config.get("dataset_name")) if word
    )
    return (
        f"On a machine with a network run datasets.load_dataset({arguments}) once, copy its HF_HOME folder "
        "here and set HF_HOME to it; or copy the task file, with dataset_path: parquet and data_files that "
        "are here, and give that file"
    )
