# SPDX-License-Identifier: Apache-2.0
"""VAR: attention spent on visual sinks goes to the other patches, in heads that attend to the image.

A few patches draw attention from every word of any question; their hidden states are huge in the same few
dimensions as those of BOS. What they get is surplus, and part of it goes to the other patches.

    phi_t   = max over sink dimensions d of |x_td| / RMS(x_t),   S = tokens with phi_t > tau
    mass    = sum of A over V,   portion = sum of A over S in V / mass,   R = V without S
    edited  = rows with portion <= max_sink_portion, mass >= min_visual_mass, some S in V, some R
    budget  = (1 - sink_keep) sum of A over S
    A'_j    = sink_keep A_j for j in S,   A_j + budget A_j / (sum of A over R) for j in R,   else A_j

with x the states that enter a layer, A a row of its attention for one head, V the visual tokens.

Deviations: sinks are found anew in every prompt and kept per sample (the official code never resets them);
the last layer is left alone, as in the paper (``skip_last_layer``); in a prompt only text rows after the
picture are edited; rows without R are left alone. Names: ``sink_keep`` is the official code's p,
``max_sink_portion`` its rho (1 - the paper's).
Provenance: Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
arXiv:2503.03321 (ICLR 2025); written from a description of paper and official code (commit 98e62d6,
Apache-2.0); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_int, check_number, check_positive
from ...core.method import Method, SlotName, What
from ...errors import InvariantError, SpecError
from ...registry import register
from .sinks import dims_of


@register("var")
@dataclass(frozen=True)
class VAR(Method):
    """Moves a part of the attention of visual sinks to the other visual tokens; prunes nothing.

    Args:
        dims: sink dimensions of the backbone; None: of the recipe, else published ones, else found with one
            BOS token.
        recipe: file that ``vlmprune.methods.var.sinks.save_recipe`` wrote for this backbone.
        tau: a token is a sink when a sink dimension exceeds tau times the RMS of its hidden state (needs
            width > tau^2).
        sink_keep: share of their attention that sinks keep.
        max_sink_portion: heads with more than this share of their visual attention on sinks stay as they are.
        min_visual_mass: heads with less visual attention than this stay as they are.
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

    slot: ClassVar[SlotName] = "attention"
    budgeted: ClassVar[bool] = False
    query_aware: ClassVar[bool] = True
    needs: ClassVar[tuple[What, ...]] = ()
    paper: ClassVar[str] = "arXiv:2503.03321"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        for name in ("sink_keep", "max_sink_portion", "min_visual_mass"):
            check_number(name, getattr(self, name), least=0, most=1)
        check_positive("tau", self.tau)
        check_int("first_layer", self.first_layer, least=0)
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
        width = language_model.config.hidden_size
        dims = self.dims or dims_of(language_model, self.recipe, self.tau)
        if max(dims) >= width:
            raise SpecError(
                f"dims={dims} but hidden states have {width} dimensions; give the sink dimensions of this "
                "backbone"
            )
        # one entry over the RMS of its state is at most the root of the width
        if self.tau >= width**0.5:
            raise SpecError(
                f"tau={self.tau}; expected less than {width**0.5:.1f}, which no state of width {width} "
                "exceeds"
            )
        # both are never given together, and the recipe is read now
        return replace(self, dims=tuple(dims), recipe=None)

    def mark(self, hidden: Tensor, language_model: Any) -> Tensor:
        """(B, n) bool, the sinks S among the tokens x that enter a layer (B, n, D)."""
        if self.dims is None:
            raise InvariantError(
                "var: the sink dimensions are not known yet; call prepare(language_model) first"
            )
        return sink_strength(hidden, self.dims) > self.tau

    def image_centric(self, attention: Tensor, sinks: Tensor, visual: Tensor) -> Tensor:
        """(B, H, Q) bool, which rows of attention (B, H, Q, L) are edited; sinks and visual (B, L)."""
        mass, portion = mass_and_portion(attention, sinks, visual)
        some_sinks = (visual & sinks).any(-1)[:, None, None]
        return (portion <= self.max_sink_portion) & (mass >= self.min_visual_mass) & some_sinks

    def reweight(self, attention: Tensor, sinks: Tensor, visual: Tensor) -> Tensor:
        """Edited attention (B, H, Q, L), rows still sum to 1; sinks and visual (B, L)."""
        edited = self.image_centric(attention, sinks, visual)[..., None]  # (B, H, Q, 1)
        S, R = sinks[:, None, None], (visual & ~sinks)[:, None, None]  # (B, 1, 1, L)
        A = attention
        budget = (1 - self.sink_keep) * (A * S).sum(-1, keepdim=True)  # (B, H, Q, 1), text sinks too
        rest = (A * R).sum(-1, keepdim=True)
        # rows where nothing could take it are left alone below; until then they must not be NaN
        share = A * R / rest.clamp_min(torch.finfo(rest.dtype).tiny)
        # sinks keep their part, and R takes the budget by what it has already
        new = A * torch.where(S, self.sink_keep, 1.0) + budget * share
        return torch.where(edited & (rest > 0), new, A)


def sink_strength(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(B, n) phi: the largest sink dimension over the RMS of the hidden state x (B, n, D), in float32."""
    x = x.float()
    # as RMSNorm has it, which is what these states go through next
    rms = (x.square().mean(-1) + 1e-6).sqrt()
    return x[..., list(dims)].abs().amax(-1) / rms


def mass_and_portion(attention: Tensor, sinks: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, Q) visual mass of attention (B, H, Q, L), and the portion of it on visual sinks."""
    S, V = sinks[:, None, None], visual[:, None, None]  # (B, 1, 1, L)
    mass = (attention * V).sum(-1)
    # a head that does not look at the picture has the portion 0, not 0 / 0
    return mass, (attention * (V & S)).sum(-1) / (mass + 1e-6 * V.sum(-1))
