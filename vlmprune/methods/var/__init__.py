# SPDX-License-Identifier: Apache-2.0
"""VAR: attention spent on visual sinks is redistributed to the other patches, in heads that look at the
image.

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv:2503.03321 (ICLR
2025).

Deviations: sinks are found anew in every prompt and kept per sample (the official code never resets them);
the last layer is left alone, as in the paper (``skip_last_layer``); in a prompt only text rows after the
picture are edited; rows without a visual token that is no sink are left alone. Names: ``sink_keep`` is the
official code's p, ``max_sink_portion`` its rho (1 - the paper's).
Provenance: written from a description of paper and official code (commit 98e62d6, Apache-2.0); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.method import Method, What
from ...errors import SpecError
from ...registry import register
from .sinks import SINK_DIMS, backbone, find_sink_dims, load_recipe


@register("var")
@dataclass(frozen=True)
class VAR(Method):
    """Sinks keep ``sink_keep`` of their attention; the rest goes to the other visual tokens in proportion to
    what they have.

    Args:
        dims: sink dimensions of the backbone; None: of the recipe, else published ones, else found with one
            BOS token.
        recipe: file that ``vlmprune.methods.var.sinks.save_recipe`` wrote for this backbone, so that the
            search is run once.
        tau: a token is a sink when a sink dimension exceeds tau times the RMS of its hidden state (needs
            width > tau^2).
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
    recipe: str | None = None

    slot: ClassVar[str] = "attention"
    budgeted: ClassVar[bool] = False
    query_aware: ClassVar[bool] = True
    needs: ClassVar[tuple[What, ...]] = ()
    paper: ClassVar[str] = "arXiv:2503.03321"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        for name in ("sink_keep", "max_sink_portion", "min_visual_mass"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"{name}={getattr(self, name)}; expected a share in [0, 1]")
        if not self.tau > 0 or self.first_layer < 0:
            raise SpecError(
                f"tau={self.tau}, first_layer={self.first_layer}; expected tau > 0 and first_layer >= 0"
            )
        if self.dims is not None and self.recipe is not None:
            raise SpecError(f"dims={list(self.dims)} and recipe={self.recipe!r}; give one of them")
        if self.dims is not None and (not self.dims or min(self.dims) < 0):
            raise SpecError(
                f"dims={list(self.dims)}; expected one or more dimensions of the hidden state, counted from 0"
            )

    def acts_on(self, depth: int) -> range:
        layers = range(self.first_layer, depth - self.skip_last_layer)
        if not layers:
            raise SpecError(f"first_layer={self.first_layer} leaves no layer of {depth} to edit; lower it")
        return layers

    def prepare(self, language_model: Any) -> VAR:
        """This method with its sink dimensions settled for a backbone."""
        config = language_model.config
        width = config.hidden_size
        dims = self.dims or (load_recipe(self.recipe, config) if self.recipe else None)
        dims = dims or SINK_DIMS.get(backbone(config)) or find_sink_dims(language_model, self.tau)
        if max(dims) >= width:
            raise SpecError(
                f"dims={dims} but hidden states have {width} dimensions; give the sink dimensions of this "
                "backbone"
            )
        if self.tau >= width**0.5:
            raise SpecError(
                f"tau={self.tau}; expected less than {width**0.5:.1f}, which no state of width {width} "
                "exceeds"
            )
        return replace(self, dims=tuple(dims), recipe=None)

    def mark(self, hidden: Tensor, language_model: Any) -> Tensor:
        """(B, n) bool, the sinks among the tokens that enter a layer (B, n, D)."""
        return sink_strength(hidden, self.dims) > self.tau

    def image_centric(
        self, attention: Tensor, sinks: Tensor, visual: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of (B, H, R, S) attention: which rows are edited, their visual mass, the share of it on sinks; each
        (B, H, R).
        """
        sinks, visual = sinks[:, None, None], visual[:, None, None]
        mass = (attention * visual).sum(-1)
        portion = (attention * (visual & sinks)).sum(-1) / (mass + 1e-6 * visual.sum(-1))
        some_sinks = (visual & sinks).any(-1)
        return (portion <= self.max_sink_portion) & (mass >= self.min_visual_mass) & some_sinks, mass, portion

    def reweight(self, attention: Tensor, sinks: Tensor, visual: Tensor) -> Tensor:
        """Edited attention (B, H, R, S), rows still sum to 1; sinks and visual (B, S)."""
        chosen = self.image_centric(attention, sinks, visual)[0][..., None]
        sinks, others = sinks[:, None, None], (visual & ~sinks)[:, None, None]
        budget = (1 - self.sink_keep) * (attention * sinks).sum(
            -1, keepdim=True
        )  # (B, H, R, 1), text sinks too
        rest = (attention * others).sum(-1, keepdim=True)
        share = attention * others / rest.clamp_min(torch.finfo(rest.dtype).tiny)
        edited = attention * torch.where(sinks, self.sink_keep, 1.0) + budget * share
        return torch.where(chosen & (rest > 0), edited, attention)


def sink_strength(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(B, n) largest sink dimension over the RMS of the hidden state, in float32."""
    hidden = hidden.float()
    rms = (hidden.square().mean(-1) + 1e-6).sqrt()
    return hidden[..., list(dims)].abs().amax(-1) / rms
