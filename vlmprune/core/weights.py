# SPDX-License-Identifier: Apache-2.0
"""Weights of trained methods: ``METHOD.safetensors``, and ``METHOD.json``, which says what they are of.

The JSON file holds the backbone that they were trained with, and the SHA-256 of the tensors. Weights of
another backbone, changed files, missing or other tensors and wrong shapes are refused; no code is read.

Where the name of a bundled model is given in place of a folder, its shipped weights are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError, UnsupportedError

FORMAT, VERSION = "vlmprune.weights", 1
SHIPPED = Path(__file__).parents[1] / "assets" / "weights"  # folders named like the bundled models
SHIPPED_FOR = ("tiny",)
OF_BACKBONE = ("model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads")

Shapes = Mapping[str, tuple[str, ...]]  # name of a tensor -> letters of its axes; a number stands for itself
Facts = Mapping[str, Any]  # what the JSON file says


def backbone_of(config: Any) -> dict[str, Any]:
    """What tells the language model of a config from another: type, width, layers, key heads."""
    text = config.get_text_config()
    return {name: getattr(text, name) for name in OF_BACKBONE}


@dataclass(frozen=True, eq=False)
class Trained:
    """Weights as they were read.

    Args:
        method: that they are of.
        folder: where they were read.
        tensors: by name, in float32.
        sizes: of the axes, by letter.
        facts: the JSON file.
    """

    method: str
    folder: str
    tensors: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    facts: Mapping[str, Any]
    _moved: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Mapping[str, Tensor]:
        """The tensors on a device."""
        if device not in self._moved:
            self._moved[device] = {name: value.to(device) for name, value in self.tensors.items()}
        return self._moved[device]

    def check(self, config: Any) -> None:
        """Raise unless a model with this config has the backbone that the weights were trained with."""
        wanted, found = self.facts["backbone"], backbone_of(config)
        if wanted != found:
            raise UnsupportedError(
                f"the weights of {self.method} in {self.folder!r} were trained with {_named(wanted)}; this "
                f"model is {_named(found)}; train them for it: {command(self.method)}"
            )


def trained_of(method: Any) -> Trained | None:
    """The weights that a method chooses by, or that the method it wraps chooses by."""
    found: Trained | None = getattr(method, "_trained", None)
    inner = getattr(method, "inner", None)
    return found if found is not None or inner is None else trained_of(inner)


def command(method: str) -> str:
    """The command that trains a method."""
    return f"vlmprune train {method} --model MODEL --data DATA --out DIR"


def untrained(method: str, instead: str) -> UnsupportedError:
    """The error of a trained method without weights."""
    return UnsupportedError(
        f"{method} chooses by trained weights and has none; train them with '{command(method)}' and give the "
        f"folder, as in {method}(weights='DIR'), or use {instead}, which needs no training"
    )


def folder_of(name: str) -> Path:
    """The folder of weights: that of a bundled model, such as "tiny", or the one that is named.

    A folder of your own with such a name is given as "./tiny".
    """
    return SHIPPED / name if name in SHIPPED_FOR else Path(name)


def write_weights(
    folder: str | Path,
    method: str,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    half: bool = False,
) -> None:
    """Write the two files; ``facts`` has at least the ``backbone``. With ``half`` tensors are in float16."""
    from safetensors.torch import save

    Path(folder).mkdir(parents=True, exist_ok=True)
    dtype = torch.float16 if half else torch.float32
    packed = save({name: value.detach().to("cpu", dtype).contiguous() for name, value in tensors.items()})
    digest = hashlib.sha256(packed).hexdigest()
    said = {"format": FORMAT, "version": VERSION, "method": method, **facts, "sha256": digest}
    (Path(folder) / f"{method}.safetensors").write_bytes(packed)
    text = json.dumps(said, indent=1) + "\n"
    (Path(folder) / f"{method}.json").write_text(text, encoding="utf-8")


def read_weights(
    folder: str, method: str, shapes: Shapes | Callable[[Facts], Shapes], prefix: str = ""
) -> Trained:
    """Read the weights of a method and check them against the shapes that it expects.

    Args:
        shapes: they, or what gives them by what the JSON file says.
        prefix: that names of tensors may have.
    """
    facts = _facts(folder, method)
    if callable(shapes):
        shapes = shapes(facts)
    found = _tensors(folder, method, facts["sha256"], prefix)
    if found.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
        raise SpecError(
            f"weights={folder!r} of {method} lack {missing or 'nothing'} and have {extra or 'nothing'} "
            f"beside what is known; expected exactly {sorted(shapes)}"
        )
    sizes: dict[str, int] = {}
    for name, axes in shapes.items():
        shape = tuple(found[name].shape)
        letters = dict(zip(axes, shape, strict=False))
        known = {
            axis: int(axis) if axis.isdigit() else sizes.get(axis, size) for axis, size in letters.items()
        }
        if len(shape) != len(axes) or letters != known:
            raise SpecError(f"weights={folder!r}: {name} has shape {shape}; expected ({', '.join(axes)})")
        if not bool(torch.isfinite(found[name]).all()):
            raise SpecError(f"weights={folder!r}: {name} holds values that are not finite; train again")
        sizes |= {axis: size for axis, size in letters.items() if not axis.isdigit()}
    width = facts["backbone"].get("hidden_size")
    if sizes.get("D", width) != width:
        raise SpecError(f"weights={folder!r} are of width {sizes['D']}, but their backbone is {width} wide")
    return Trained(method, folder, found, sizes, facts)


def checked_facts(folder: str, method: str) -> Facts:
    """What the JSON file of a method says, once its tensors were found to be those that it speaks of."""
    facts = _facts(folder, method)
    _tensors(folder, method, facts["sha256"], "")
    return facts


def _facts(folder: str, method: str) -> dict[str, Any]:
    path = folder_of(folder) / f"{method}.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(
            f"weights={folder!r} cannot be read ({error}); expected a folder with {method}.safetensors and "
            f"{method}.json, as '{command(method)}' writes"
        ) from error
    kind = facts if isinstance(facts, dict) else {}
    given = (kind.get("format"), kind.get("version"), kind.get("method"))
    backbone = kind.get("backbone")
    if given != (FORMAT, VERSION, method) or not isinstance(backbone, dict) or "sha256" not in kind:
        raise SpecError(
            f"{str(path)!r} says format, version and method {given}; expected {(FORMAT, VERSION, method)} "
            "with a backbone and a sha256"
        )
    return kind


def _tensors(folder: str, method: str, digest: str, prefix: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder_of(folder) / f"{method}.safetensors"
    try:
        packed = path.read_bytes()
        found = load(packed)
    except (OSError, SafetensorError) as error:
        raise SpecError(f"{str(path)!r} cannot be read ({error}); expected safetensors") from error
    if hashlib.sha256(packed).hexdigest() != digest:
        raise SpecError(
            f"{str(path)!r} is not the file that {method}.json speaks of: its SHA-256 differs; copy both "
            "files of one training"
        )
    return {name.removeprefix(prefix): value.float() for name, value in found.items()}


def _named(backbone: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in backbone.items())
