# SPDX-License-Identifier: Apache-2.0
"""Sink dimensions of a backbone: published, found once by a search, or read from a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ...core.weights import OF_BACKBONE
from ...errors import SpecError, UnsupportedError

# (model type, width, layers, key heads) -> published sink dimensions; key heads tell Llama-2 from Llama-3
SINK_DIMS = {
    ("llama", 4096, 32, 32): (1415, 2533),
    ("llama", 5120, 40, 40): (2100, 4743),
    ("qwen2", 3584, 28, 4): (458, 2570),
}


def backbone(config: Any) -> tuple[Any, ...]:
    """What tells one backbone from another: type, width, layers, key heads."""
    return tuple(getattr(config, name) for name in OF_BACKBONE)


def dims_of(language_model: Any, recipe: str | None, tau: float) -> tuple[int, ...]:
    """Sink dimensions from a recipe, else published ones, else found."""
    config = language_model.config
    if recipe is not None:
        return load_recipe(recipe, config)
    return SINK_DIMS.get(backbone(config)) or find_sink_dims(language_model, tau)


def save_recipe(model: Any, path: str | Path, tau: float = 20.0) -> tuple[int, ...]:
    """Search the sink dimensions of a model's backbone and store them as YAML; returns them.

    Args:
        model: a vision-language model, or its language model.
        path: where to write; ``var(recipe=PATH)`` reads it.
        tau: threshold of the search.
    """
    language_model = (
        model.model.language_model if hasattr(getattr(model, "model", None), "language_model") else model
    )
    dims = find_sink_dims(language_model, tau)
    recipe = {
        **dict(zip(OF_BACKBONE, backbone(language_model.config), strict=True)),
        "tau": tau,
        "sink_dims": list(dims),
    }
    Path(path).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return dims


def load_recipe(path: str, config: Any) -> tuple[int, ...]:
    """Sink dimensions from a recipe; refused when it was written for another backbone."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        dims, written_for = tuple(map(int, recipe["sink_dims"])), tuple(recipe[name] for name in OF_BACKBONE)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise SpecError(
            f"recipe={path!r} cannot be read ({error}); expected a file that save_recipe wrote"
        ) from error
    if written_for != backbone(config) or not dims:
        raise SpecError(
            f"recipe={path!r} is of {written_for}, this backbone is {backbone(config)}; write one with "
            "save_recipe"
        )
    return dims


def find_sink_dims(language_model: Any, tau: float) -> tuple[int, ...]:
    """Dimensions in which a lone BOS token exceeds tau times its RMS in most of the middle layers."""
    config = language_model.config
    bos = config.bos_token_id
    if bos is None:
        raise UnsupportedError(
            f"{config.model_type} has no BOS token to find sink dimensions with; give them, as in "
            "var(dims=[1415,2533])"
        )
    seen: list[Tensor] = []

    def see(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    quarter = config.num_hidden_layers // 4
    # massive dimensions are not there yet in the first layers, and gone again in the last
    middle = language_model.layers[quarter : config.num_hidden_layers - quarter]
    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in middle]
    try:
        with torch.no_grad():
            language_model(
                input_ids=torch.tensor([[int(bos)]], device=language_model.device), use_cache=False
            )
    finally:
        for hook in hooks:
            hook.remove()
    states = torch.stack([hidden[0, 0].float() for hidden in seen])  # (layers, D)
    # phi > tau for every dimension by itself
    massive = states.abs() > tau * (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    found = tuple((massive.float().mean(0) > 0.5).nonzero()[:, 0].tolist())
    if not found:
        raise UnsupportedError(
            f"no sink dimensions in this {config.model_type} backbone of width {config.hidden_size}: no "
            f"dimension of a BOS token exceeds {tau} times its RMS in the middle layers; give them and a "
            "lower tau, as in var(dims=[7,21],tau=4.0)"
        )
    return found
