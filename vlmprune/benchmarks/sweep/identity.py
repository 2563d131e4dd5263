# SPDX-License-Identifier: Apache-2.0
"""Identity of a cell: fingerprints of weights and code; an answer is reused only where nothing that decides it changed."""

from __future__ import annotations

import hashlib
import inspect
import json
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import EvaluationError
from ...models.loading import TINY
from ...registry import get
from ...spec import parse
from ..tasks import LMMS
from ..tiny import verify

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow")
_ROOT = Path(__file__).parents[2]
# what decides an answer; reports and statistics may change without asking again
_CODE = ("core", "methods", "models", "kernels", "api.py", "spec.py", "benchmarks/batch.py", "benchmarks/evaluate.py",
         "benchmarks/generation.py", "benchmarks/lmms", "benchmarks/sample.py", "benchmarks/sweep/work.py")  # fmt: skip
_WEIGHTS = (".safetensors", ".json", ".jinja", ".model", ".txt")  # of a model folder: weights, configs, tokenizer, templates


@cache
def versions(task: str) -> tuple[tuple[str, str], ...]:
    """Versions of what answers to a task pass through, and a digest of the package's own code on that way."""
    files = [file for name in _CODE for file in _sources(_ROOT / name)]
    packages = (*PACKAGES, "lmms_eval") if task.startswith(LMMS) else PACKAGES
    found = {name: metadata.version(name) for name in packages}
    return tuple({"vlmprune": __version__, **found, "code": _digest(files, _ROOT)}.items())


def _sources(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def plugins(spec: str) -> dict[str, str]:
    """Methods of a spec that do not come with the package, with digests of their source files."""
    found = {}
    for part in parse(spec).parts:
        cls = get(part.name)
        if not cls.__module__.startswith("vlmprune."):
            try:
                file = Path(inspect.getfile(cls))
                found[part.name] = _digest([file], file.parent)
            except (OSError, TypeError) as error:
                raise EvaluationError(
                    f"method {part.name!r} has no source file, so nothing would tell when it changes; put it in a module"
                ) from error
    return found


def weights(name: str) -> str:
    """Fingerprint of a model: digest of the files of a folder, or the commit of an HF id; loads no model."""
    if name == TINY:
        return hashlib.sha256(json.dumps(verify(), sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = [file for file in sorted(folder.iterdir()) if file.suffix in _WEIGHTS]
        if not any(file.suffix == ".safetensors" for file in files):
            raise EvaluationError(f"the folder {name!r} holds no *.safetensors; expected what save_pretrained writes")
        return _of_files(folder, tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    from transformers import AutoConfig

    from ...models.loading import read_pretrained

    commit = getattr(read_pretrained(name, "config", AutoConfig.from_pretrained), "_commit_hash", None)
    if not commit:
        raise EvaluationError(f"{name!r} has no commit on the hub, so its weights cannot be told apart; give a folder")
    return f"commit {commit}"


@cache
def _of_files(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Read once as long as sizes and times stay: 7B weights take seconds."""
    return _digest([file for file, _, _ in files], folder)


def _digest(files: list[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(root)).encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def recipe(setting: Any, spec: str) -> dict[str, Any]:
    """Everything that can change an answer of a cell; its hash names the cell."""
    seeds = [value for part in parse(spec).parts for key, value in part.args if key == "seed"]
    return {
        "model": setting.model,
        "weights": setting.weights,
        "spec": spec,
        "plugins": plugins(spec),
        "task": setting.task,
        "task_fingerprint": setting.task_fingerprint,
        "split": setting.split,
        "limit": setting.limit,
        "generation": {
            "max_new_tokens": setting.max_new_tokens, "batch_size": setting.batch_size, "decoding": "greedy",
            "positions": setting.positions,
            "device": setting.device.partition(":")[0], "dtype": setting.dtype,
        },
        "seeds": seeds,
        "versions": dict(setting.versions),
    }  # fmt: skip
