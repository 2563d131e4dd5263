# SPDX-License-Identifier: Apache-2.0
"""Identity of a cell: an answer is reused only where nothing changed that decides it, code included."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...core.weights import trained_of
from ...errors import EvaluationError
from ...models.tiny import BUNDLED, verify
from ...registry import get
from ...spec import parse
from ..tasks.registry import LMMS, factory
from .files import digest, files_below, read_once, source_files, top_level

if TYPE_CHECKING:
    from ..tasks.sample import Task
    from .plan import Setting

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow")
_ROOT = Path(__file__).parents[2]  # vlmprune/
# what decides no answer: where it changes, nothing is asked again. All that is not named here counts
_SILENT = (
    *(
        f"evaluation/leaderboard/{name}.py"
        for name in (
            "claim",
            "config",
            "engines",
            "journal",
            "process",
            "published",
            "repair",
            "results",
            "run",
            "rundir",
        )
    ),
    "evaluation/report",
    # not objects: what it says of kept tokens is a part of an answer
    *(
        f"evaluation/stats/{name}.py"
        for name in ("curves", "estimates", "intervals", "ranks", "saliency", "seeds", "summary")
    ),
    "cli",
    "plain.py",
    "speed",
    "testing",
    "textfile.py",
    "viz",
    "yamlfile.py",
)
# of a model folder without code: weights in formats that are never loaded, such as those of optimizers
_NEVER_READ = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth")

# of a model of the package: what is told of it. A word more about a model makes it no other model
_TOLD = ("card.md", "provenance.json")


@cache
def versions(task: str) -> tuple[tuple[str, str], ...]:
    """Versions of what answers to a task pass through, and a digest of the package's own code on that way."""
    silent = [_ROOT / name for name in _SILENT]
    # with its parents: a folder that is named silences all below it
    files = [file for file in sorted(_ROOT.rglob("*.py")) if not {file, *file.parents} & set(silent)]
    packages = (*PACKAGES, "lmms_eval") if task.startswith(LMMS) else PACKAGES
    found = {name: metadata.version(name) for name in packages}
    return tuple({"vlmprune": __version__, **found, "code": digest(files, _ROOT)}.items())


def plugins(specs: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Methods in specs that do not come with the package, with digests of their code; sorted by name."""
    names = {part.name for spec in specs for part in parse(spec).parts}
    found = {name: method_code(name) for name in sorted(names)}
    return tuple((name, code) for name, code in found.items() if code)


def method_code(name: str) -> str:
    """Digest of the code of a method, of its base classes too; empty where it comes with the package."""
    return _code(f"method {name!r}", get(name).__mro__)


def task_code(name: str, task: Task) -> str:
    """Digest of the code of a task that does not come with the package: what it shows, asks and scores by."""
    from ..tasks.lmms.task import LmmsTask

    made: list[Any] = [*type(task).__mro__, *factory(name)]
    if isinstance(task, LmmsTask):
        made += _callables(vars(task.lmms.config))
    return _code(f"task {name!r}", made)


def _callables(value: Any) -> list[Any]:
    """Functions in the values of a task file, as in its lists of metrics."""
    if isinstance(value, dict | list | tuple):
        return [
            one
            for inner in (value.values() if isinstance(value, dict) else value)
            for one in _callables(inner)
        ]
    return [value] if callable(value) else []


def _code(what: str, made: Iterable[Any]) -> str:
    """Digest of the source of classes and functions; those of this package and of Python are left out."""
    found = set()
    for one in made:
        # what a partial calls, what a decorator wraps, the class of an object: that has the source
        while isinstance(one, functools.partial):
            one = one.func
        one = inspect.unwrap(one) if inspect.isroutine(one) else one if isinstance(one, type) else type(one)
        # versions of these are part of the recipe already
        if top_level(one) in ("vlmprune", "torch", "transformers", "numpy", "PIL") or top_level(one) is None:
            continue
        try:
            root, files = source_files(Path(inspect.getfile(one)))
            found.add(digest(files, root))
        except (OSError, TypeError) as error:
            raise EvaluationError(
                f"{what} has no source file, so nothing would tell when it changes; put it in a module"
            ) from error
    # sorted, since a set comes in no order of its own
    return hashlib.sha256(" ".join(sorted(found)).encode()).hexdigest()[:16] if found else ""


def weights(name: str, trust_remote_code: bool = False) -> str:
    """Fingerprint of a model: digest of the files of a folder, or the commit of an HF id; loads no model."""
    if name in BUNDLED:
        read = {file: its for file, its in verify(BUNDLED[name]).items() if file not in _TOLD}
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]
    from transformers import AutoConfig

    from ...models.loading import read_pretrained

    folder = Path(name).expanduser()
    found = _of_folder(name, folder) if folder.is_dir() else ""
    # without its own code, a model is what its files are
    if found and not trust_remote_code:
        return found
    # its config carries the commit: no weights are read for it
    config = read_pretrained(name, "config", AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    if trust_remote_code:
        _refuse_code_elsewhere(name, getattr(config, "auto_map", None) or {})
    commit = getattr(config, "_commit_hash", None)
    if not found and not commit:
        raise EvaluationError(
            f"{name!r} has no commit on the hub, so its weights cannot be told apart; give a folder"
        )
    # what a commit names never changes, so it stands for the files
    return found or f"commit {commit}"


def _refuse_code_elsewhere(name: str, code: Mapping[str, Any]) -> None:
    """Raise where code of a model is named as "repository--module.Class": no fingerprint covers that."""
    elsewhere = [value for value in code.values() if "--" in str(value)]
    if elsewhere:
        raise EvaluationError(
            f"the code of {name!r} is that of {elsewhere[0]!r}, so nothing would tell when it changes; save "
            "the model with its code into a folder, or leave --trust-remote-code out"
        )


def _of_folder(name: str, folder: Path) -> str:
    """Names and contents of all that can change an answer: weights, configs, tokenizer, templates, code."""
    try:
        files = files_below(folder)
        if not any(file.suffix == ".safetensors" for file in files):
            raise EvaluationError(
                f"the folder {name!r} holds no *.safetensors; expected what save_pretrained writes"
            )
        if not any(file.suffix == ".py" for file in files):  # code may read anything
            files = [file for file in files if file.suffix not in _NEVER_READ]
        found = read_once(folder, files)
        base = _adapted(folder)
    except OSError as error:
        raise EvaluationError(
            f"the folder {name!r} cannot be read ({error}); expected a model that is all there"
        ) from error
    return f"{found} on {weights(base)}" if base else found


def _adapted(folder: Path) -> str | None:
    """The model below an adapter, which is another folder or HF id."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path} names no base model ({error}); expected what PEFT writes") from error
    # a folder that names itself would be looked into without end
    return base if base and Path(base).expanduser().resolve() != folder.resolve() else None


def trained(spec: str) -> dict[str, dict[str, str]]:
    """Digests of the weights that methods of a spec choose by, under "trained"; empty where none do."""
    found = [trained_of(plan.method) for plan in parse(spec).build()]
    digests = {one.method: str(one.facts["sha256"]) for one in found if one is not None}
    return {"trained": digests} if digests else {}


def recipe(setting: Setting, spec: str) -> dict[str, Any]:
    """Everything that can change an answer of a cell; its hash names the cell."""
    parts = parse(spec).parts
    names = {part.name for part in parts}
    return {
        **trained(spec),
        "model": setting.model,
        "weights": setting.weights,
        "spec": spec,
        # of this spec alone: another plug-in changes nothing here
        "plugins": {name: code for name, code in setting.plugins if name in names},
        "task": setting.task,
        "task_fingerprint": setting.task_fingerprint,
        "task_code": setting.task_code,
        "split": setting.split,
        "limit": setting.limit,
        "generation": {
            "max_new_tokens": setting.max_new_tokens,
            "batch_size": setting.batch_size,
            "decoding": "greedy",
            "positions": setting.positions,
            "device": setting.device.partition(":")[0],  # which of several GPUs answered decides nothing
            "dtype": setting.dtype,
            "trust_remote_code": setting.trust_remote_code,
        },
        "seeds": [value for part in parts for key, value in part.args if key == "seed"],
        "versions": dict(setting.versions),
    }
