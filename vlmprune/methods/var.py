# SPDX-License-Identifier: Apache-2.0
"""VAR: attention spent on visual sinks is redistributed to the other patches, in heads that look at the image.

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv:2503.03321 (ICLR 2025).

Deviations: sinks are found anew in every prompt and kept per sample (the official code never resets them); the last layer is left
alone, as in the paper (``skip_last_layer``); only text rows after the picture are edited in a prompt, always; a row whose visual tokens
are all sinks is left alone. Names: ``sink_keep`` is the official code's p, ``max_sink_portion`` its rho (1 - the paper's).
Provenance: written from a description of paper and official code (commit 98e62d6, Apache-2.0); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.base import Method
from ..errors import SpecError, UnsupportedError
from ..registry import register

# (model type, hidden size, layers) of a backbone -> published sink dimensions
SINK_DIMS = {
    ("llama", 4096, 32): (1415, 2533),
    ("llama", 5120, 40): (2100, 4743),
    ("qwen2", 3584, 28): (458, 2570),
}


@register("var")
@dataclass(frozen=True)
class VAR(Method):
    """Sinks keep ``sink_keep`` of their attention; the rest goes to the other visual tokens in proportion to what they have.

    Args:
        dims: sink dimensions of the backbone; None: published ones, else found with one BOS token at attach.
        tau: a token is a sink when a sink dimension exceeds tau times the RMS of its hidden state (needs width > tau^2).
        sink_keep: share of their attention that sinks keep.
        max_sink_portion: heads are edited where at most this share of the visual attention is on sinks,
        min_visual_mass: and at least this much attention is visual.
        first_layer: first decoder layer that is edited.
        skip_last_layer: leave the last layer alone.
    """

    dims: tuple[int, ...] | None = None
    tau: float = 20.0
    sink_keep: float = 0.6
    max_sink_portion: float = 0.5
    min_visual_mass: float = 0.2
    first_layer: int = 2
    skip_last_layer: bool = True

    stage: ClassVar[str] = "attention"
    budgeted: ClassVar[bool] = False
    query_aware: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "arXiv:2503.03321"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        for name in ("sink_keep", "max_sink_portion", "min_visual_mass"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"{name}={getattr(self, name)}; expected a share in [0, 1]")
        if self.tau <= 0 or self.first_layer < 0:
            raise SpecError(f"tau={self.tau}, first_layer={self.first_layer}; expected tau > 0 and first_layer >= 0")

    def acts_on(self, depth: int) -> range:
        layers = range(self.first_layer, depth - self.skip_last_layer)
        if not layers:
            raise SpecError(f"first_layer={self.first_layer} leaves no layer of {depth} to edit; lower it")
        return layers

    def prepare(self, language_model: Any) -> VAR:
        """This method with its sink dimensions settled for a backbone."""
        config = language_model.config
        dims = self.dims or SINK_DIMS.get((config.model_type, config.hidden_size, config.num_hidden_layers))
        dims = dims or find_sink_dims(language_model, self.tau)
        if max(dims) >= config.hidden_size:
            raise SpecError(
                f"dims={dims} but hidden states have {config.hidden_size} dimensions; give the sink dimensions of this backbone"
            )
        return replace(self, dims=tuple(dims))

    def mark(self, hidden: Tensor, language_model: Any) -> Tensor:
        """(B, n) bool, the sinks among the tokens that enter a layer (B, n, D)."""
        return sink_strength(hidden, self.dims) > self.tau

    def reweight(self, attention: Tensor, sinks: Tensor, visual: Tensor) -> Tensor:
        """Edited attention (B, H, R, S), rows still sum to 1; sinks and visual (B, S)."""
        sinks, visual = sinks[:, None, None], visual[:, None, None]
        mass = (attention * visual).sum(-1, keepdim=True)  # (B, H, R, 1)
        on_sinks = (attention * (visual & sinks)).sum(-1, keepdim=True)
        portion = on_sinks / (mass + visual.sum(-1, keepdim=True) * 1e-6)
        rest = mass - on_sinks
        chosen = (
            (portion <= self.max_sink_portion)
            & (mass >= self.min_visual_mass)
            & (visual & sinks).any(-1, keepdim=True)
            & (rest > 0)
        )
        budget = (1 - self.sink_keep) * (attention * sinks).sum(-1, keepdim=True)
        factor = torch.where(sinks, self.sink_keep, torch.where(visual, 1 + budget / rest.clamp_min(1e-12), 1.0))
        return torch.where(chosen, attention * factor, attention)


def sink_strength(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(B, n) largest sink dimension over the RMS of the hidden state, in float32."""
    hidden = hidden.float()
    rms = (hidden.square().mean(-1) + 1e-6).sqrt()
    return hidden[..., list(dims)].abs().amax(-1) / rms


def find_sink_dims(language_model: Any, tau: float) -> tuple[int, ...]:
    """Dimensions of massive activation: where a lone BOS token exceeds tau times its RMS in most of the middle layers."""
    config = language_model.config
    bos = config.bos_token_id
    if bos is None:
        raise UnsupportedError(
            f"{config.model_type} has no BOS token to find sink dimensions with; give them, as in var(dims=[1415,2533])"
        )
    seen: list[Tensor] = []
    layers = language_model.layers[config.num_hidden_layers // 4 : -config.num_hidden_layers // 4 or None]
    hooks = [
        layer.register_forward_pre_hook(lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
        for layer in layers
    ]
    try:
        with torch.no_grad():
            language_model(input_ids=torch.tensor([[int(bos)]], device=language_model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    states = torch.stack([hidden[0, 0].float() for hidden in seen])  # (layers, D)
    massive = states.abs() > tau * (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    found = tuple((massive.float().mean(0) > 0.5).nonzero()[:, 0].tolist())
    if not found:
        raise UnsupportedError(
            f"no sink dimensions in this {config.model_type} backbone of width {config.hidden_size}: no dimension of a BOS token exceeds "
            f"{tau} times its RMS in the middle layers; give them and a lower tau, as in var(dims=[7,21],tau=4.0), or prune instead"
        )
    return found
