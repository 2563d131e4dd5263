# SPDX-License-Identifier: Apache-2.0
"""ACT: single heads park attention on tokens that carry nothing; a part of it goes to all other tokens.

The first token of a sequence is not the only sink. For one head of one layer and a prompt of L tokens, A its
attention,

    a_s  = mean of A_qs over the queries q that see s
    S    = columns with a_s > threshold, without the first of them
    f_q  = (1 - beta) sum of A_qs over S
    A'_qs = beta A_qs on S,   A_qs (1 + f_q / sum of A_q over the others) elsewhere

Rows still sum to 1. Sinks of a prompt stay sinks while decoding, and new tokens never are.

Deviations: rows of the text after the last picture are edited, which is where answers come from
(``edit="all"`` edits every row, as the official code does); all heads of the layers, since no list of heads
is published for a vision-language model (``recipe`` gives one). A row without attention outside of S is left
alone, where the official code divides 0 by 0. What it does in a decode step, rows that sum to more than 1,
is not offered.
Provenance: Yu et al., "Unveiling and Harnessing Hidden Attention Sinks", arXiv:2406.15765 (ICML 2024);
written from a description of the official code (commit a267af7, Apache-2.0 by its README); no code copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
import yaml
from torch import Tensor

from ..checks import check_int, check_number, one_of
from ..core.method import Method, Rows, SlotName, What
from ..core.weights import OF_BACKBONE
from ..errors import SpecError
from ..registry import register
from .var.sinks import backbone


@register("act")
@dataclass(frozen=True)
class ACT(Method):
    """Turns the hidden attention sinks of single heads down; prunes nothing.

    Args:
        threshold: a column is a sink where its mean exceeds this; "5/L" is 5 over the length of the prompt.
        beta: share of their attention that sinks keep.
        spare: which column stays a sink: the "first" above the threshold, or "column0" alone.
        min_queries: columns that fewer queries see are never sinks; the last ones are means over few.
        edit: rows of a prompt that are edited, as ``text``, ``last`` or ``all``.
        recipe: YAML file with the heads of every layer for one backbone; None: all heads.
        first_layer: first decoder layer that is edited.
        skip_last_layer: leave the last layer alone.
    """

    threshold: float | str = 0.1
    beta: float = 0.4
    spare: str = "first"
    min_queries: int = 1
    edit: Rows = "text"
    recipe: str | None = None
    first_layer: int = 2
    skip_last_layer: bool = True
    # layer -> heads that are edited; ``prepare`` fills it in from the recipe
    by_layer: Mapping[int, tuple[int, ...]] | None = field(default=None, init=False, compare=False)

    slot: ClassVar[SlotName] = "attention"
    budgeted: ClassVar[bool] = False
    needs: ClassVar[tuple[What, ...]] = ()
    paper: ClassVar[str] = "arXiv:2406.15765"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_number("beta", self.beta, least=0, most=1)
        self.bound(torch.ones(1))  # refuses what is no threshold
        one_of("spare", self.spare, ("first", "column0"))
        one_of("edit", self.edit, get_args(Rows))
        check_int("min_queries", self.min_queries, least=1)
        check_int("first_layer", self.first_layer, least=0)
        # the attention slot reads ``rows``, which is of the class for other methods and an option here
        object.__setattr__(self, "rows", self.edit)

    def prepare(self, language_model: Any) -> ACT:
        """This method with the heads of its recipe."""
        if self.recipe is None:
            return self
        # a copy: the heads are those of one backbone, and this object may be attached to another
        ready = replace(self)
        object.__setattr__(ready, "by_layer", read_heads(self.recipe, language_model.config))
        return ready

    def acts_on(self, depth: int) -> range | list[int]:
        if self.by_layer is not None:
            return sorted(self.by_layer)
        layers = range(self.first_layer, depth - self.skip_last_layer)  # True counts as 1
        if not layers:
            raise SpecError(f"first_layer={self.first_layer} leaves no layer of {depth} to edit; lower it")
        return layers

    def heads_of(self, layer: int) -> tuple[int, ...] | None:
        return None if self.by_layer is None else self.by_layer[layer]

    def bound(self, length: Tensor) -> Tensor:
        """The threshold for prompts of ``length`` (B,) tokens."""
        if isinstance(self.threshold, str):
            share, _, over = self.threshold.partition("/")
            try:
                number = float(share)
            except ValueError:
                number = -1.0
            if over != "L" or not 0 < number < float("inf"):
                raise SpecError(f"threshold={self.threshold!r}; expected a number such as 0.1, or '5/L'")
            return number / length
        check_number("threshold", self.threshold, least=0, most=1)
        return torch.full_like(length, self.threshold, dtype=torch.float32)

    def mark_columns(self, mean: Tensor, seen: Tensor, visual: Tensor, layer: int) -> Tensor:
        """(B, H, S) bool, the sinks S by the means a (B, H, S) of columns that ``seen`` (B, S) rows see."""
        # L without padding, which no row sees
        bound = self.bound((seen > 0).sum(dim=1))[:, None, None]
        sinks = (mean > bound) & (seen >= self.min_queries)[:, None]  # (B, H, S)
        if self.spare == "first":
            # the first sink in order is spared, whichever column it is
            return sinks & (sinks.cumsum(dim=-1) > 1)
        column0 = (seen > 0) & ((seen > 0).cumsum(dim=1) == 1)  # padding may stand before it
        return sinks & ~column0[:, None]

    def reweight(self, attention: Tensor, sinks: Tensor, visual: Tensor) -> Tensor:
        """Edited attention (B, H, R, L) for sinks (B, H, L)."""
        S, A = sinks[:, :, None], attention
        # f_q, what the sinks give up
        freed = (1 - self.beta) * (A * S).sum(-1, keepdim=True)  # (B, H, R, 1)
        others = (A * ~S).sum(-1, keepdim=True)
        # factor of all other columns; a row without any is left alone below, until then it must not be NaN
        more = 1 + freed / others.clamp_min(torch.finfo(A.dtype).tiny)
        return torch.where(others > 0, A * torch.where(S, self.beta, more), A)


def read_heads(path: str, config: Any) -> dict[int, tuple[int, ...]]:
    """Heads by layer from a recipe; refused where it is of another backbone."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        written_for = tuple(recipe[name] for name in OF_BACKBONE)
        heads = {int(layer): tuple(sorted(map(int, some))) for layer, some in recipe["heads"].items()}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise SpecError(
            f"recipe={path!r} cannot be read ({error}); expected YAML with {', '.join(OF_BACKBONE)} and "
            "heads, a list of heads per layer"
        ) from error
    if written_for != backbone(config):
        raise SpecError(f"recipe={path!r} is of {written_for}, this backbone is {backbone(config)}")
    depth, count = config.num_hidden_layers, config.num_attention_heads
    # a layer without heads is not edited at all
    heads = {layer: some for layer, some in heads.items() if some}
    # ``some`` is sorted: its ends are the lowest and the highest head
    good = all(
        0 <= layer < depth and 0 <= some[0] and some[-1] < count and len({*some}) == len(some)
        for layer, some in heads.items()
    )
    if not heads or not good:
        raise SpecError(
            f"recipe={path!r} names heads {heads}; expected distinct heads of 0..{count - 1} in layers of "
            f"0..{depth - 1}"
        )
    return heads
