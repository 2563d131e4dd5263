# SPDX-License-Identifier: Apache-2.0
"""VScan: half of the tokens window by window from a shallow block of the tower, half from a deep one, the
rest merged into them; then a cut in the middle of the language model.

Zhang et al., "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
arXiv:2505.22654 (TMLR 2026).

With a and A the attention of [CLS] in the shallow and in the deep block, mean over heads, the local set L has
the w tokens with the largest a of every window, the global set G the tokens outside of L with the largest A,

    w = floor(floor(T/2) / windows),    |G| = T - w * windows.

Every other token joins the kept one that it is most similar to, by the cosine of projected features, and a
kept token x_k becomes the mean of itself and those that joined it. The second stage keeps, at the input of a
layer of the language model, what the last token of the prompt attends to most in that layer.

Deviations: exactly T tokens stay; the official code keeps fewer where the windows do not divide T/2, see
``official_keep``; any grid has windows, of about 6 x 6; attention in float32; the lower index wins ties;
local tokens are out of the second choice for good, where the official code sets their attention to 0.
Provenance: written from a description of the paper's abstract and of the official code (commit a82450e, MIT);
no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import one_of
from ..core.budget import Budget
from ..core.merged import Merged, joins_of, numbers
from ..core.method import CutPoint, Method, Need, Positions, SlotName, What
from ..core.select import rest_of, rows_at, top_k, top_k_in_groups
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register
from .tower import check_tower_options


@register("vscan")
@dataclass(frozen=True)
class VScan(Method):
    """Local and global tokens by two blocks of the tower, each the mean of itself and of what resembles it.

    Args:
        second: (layer, keep) of a second cut, at the input of that layer of the language model; keep is a
            number of tokens, or a share of what the first stage kept; the authors' 64 on average over 32
            layers is vscan(second=(16, 32))@96. None: there is none.
        shallow: hidden state of the tower whose attention the windows are ranked by; 6 is behind block six.
        layer: the same for the global choice, such as -2; None: the layer the model takes its features from.
        window: side of a window, in tokens.
        local: share of the tokens that the windows choose.
        merging: "mean", or "none": tokens that are not kept are dropped.
        cls: "token", or "mean" for towers without [CLS]: rank by received attention.
    """

    second: tuple[int, float] | None = None
    shallow: int = 6
    layer: int | None = None
    window: int = 6
    local: float = 0.5
    merging: str = "mean"
    cls: str = "token"

    nested: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2505.22654"
    licence: ClassVar[str] = "MIT"

    def __post_init__(self) -> None:
        check_tower_options(self.cls, self.layer, "unpad")
        one_of("merging", self.merging, ("mean", "none"))
        if type(self.shallow) is not int or self.shallow == 0:
            raise SpecError(f"shallow={self.shallow!r}; expected an index into the hidden states such as 6")
        if type(self.window) is not int or self.window < 1:
            raise SpecError(f"window={self.window!r}; expected a number of tokens from 1 on")
        if not 0 <= self.local <= 1:
            raise SpecError(f"local={self.local!r}; expected a share from 0 to 1")
        if self.second is not None:
            SecondStage(*self.second, Budget(1.0))  # raises where it means nothing

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        what: What = "cls_attention" if self.cls == "token" else "received_attention"
        return (Need(what, self.layer), Need(what, self.shallow), Need("features"))

    def later(self, budget: Budget | None) -> tuple[tuple[Method, Budget | None], ...]:
        # 1.0 is all tokens, 1 is one of them, and == takes them for the same
        if self.second is None or budget is None or str(budget.keep) == "1.0":
            return ()  # keeping everything is the dense model
        return ((SecondStage(*self.second, budget), None),)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        # global set by the deep block, local set by the shallow one
        A = self.attention(tokens, None)
        a = self.attention(tokens, self.shallow)
        members = windows(tokens.need("grids"), self.window)
        kept = scan(a, A, members.to(A.device), per_window(k, members, self.local), k)
        x = tokens.need("features")
        n = tokens.count
        if self.merging == "none":
            return Merged(rows_at(x, kept), kept, joins=lambda: joins_of([(kept, numbers(kept))], n))
        others = joining(x, kept)
        rows = merged_means(x, kept, others).to(x.dtype)
        return Merged(rows, kept, joins=lambda: joins_of([(kept, numbers(kept)), others], n))

    def attention(self, tokens: VisualTokens, layer: int | None) -> Tensor:
        """(B, N) attention at a layer of the tower, None for the deep one."""
        if self.cls == "mean":
            return tokens.need("received_attention", layer).float()
        return tokens.need("cls_attention", layer).float().mean(dim=1)


@dataclass(frozen=True)
class SecondStage(Method):
    """The cut of VScan inside the language model: at the input of ``layer``, by attention of that layer
    itself.

    Args:
        layer: first layer that reads fewer tokens.
        keep: tokens that go on, or a share of what the first stage kept.
        first: budget of the first stage.
    """

    layer: int
    keep: float
    first: Budget

    name: ClassVar[str] = "vscan"
    slot: ClassVar[SlotName] = "inside_lm"
    query_aware: ClassVar[bool] = True
    positions: ClassVar[Positions] = "compact"
    needs: ClassVar[tuple[What, ...]] = ("text_attention",)

    def __post_init__(self) -> None:
        if type(self.layer) is not int or self.layer < 1:
            raise SpecError(
                f"second={(self.layer, self.keep)}; expected a decoder layer from 1 on, and what it keeps"
            )
        Budget(self.keep)

    def cuts(self, depth: int, budget: Any, count: int) -> tuple[CutPoint, ...]:
        if self.layer >= depth:
            raise SpecError(
                f"second={(self.layer, self.keep)} but the language model has layers 0..{depth - 1}; choose "
                "a smaller one"
            )
        left = self.first.count(count)
        return (CutPoint(self.layer, Budget(self.keep).count(left), source=self.layer),)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.need("text_attention")[:, :, -1].mean(dim=1)  # (B, H, R, N) -> (B, N)


def windows(grids: tuple[tuple[int, int], ...], side: int) -> Tensor:
    """(W, M) tokens of every window of about side x side, in raster order; -1 fills up smaller ones."""
    found, start = [], 0
    for rows, cols in grids:
        token = start + torch.arange(rows * cols).view(rows, cols)
        for top, bottom in pairwise(borders(rows, side)):
            for left, right in pairwise(borders(cols, side)):
                found.append(token[top:bottom, left:right].flatten())
        start += rows * cols
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)


def borders(length: int, side: int) -> list[int]:
    """Where bands of about ``side`` tokens begin and end."""
    bands = max(1, round(length / side))
    return [length * i // bands for i in range(bands + 1)]


def per_window(k: int, members: Tensor, local: float = 0.5) -> int:
    """w, how many of k tokens every window chooses; none more than the smallest window (W, M) holds."""
    smallest = int((members >= 0).sum(dim=1).min())
    return min(int(k * local) // members.shape[0], smallest)


def scan(a: Tensor, A: Tensor, members: Tensor, w: int, k: int) -> Tensor:
    """(B, k) ascending: the w best by ``a`` (B, N) of every window (W, M), then the best others by ``A``."""
    # L, the best of each window, then G of what L leaves
    taken = local_set(a, members, w)
    chosen = torch.zeros_like(A, dtype=torch.bool).scatter(1, taken, True)
    others = top_k(A.masked_fill(chosen, -torch.inf), k - taken.shape[1]) if taken.shape[1] < k else taken
    # from a mask of k tokens to ascending indices
    return top_k(chosen.scatter(1, others, True).float(), k)


def local_set(a: Tensor, members: Tensor, w: int) -> Tensor:
    """(B, W * w) the w tokens of every window (W, M) with the largest a (B, N)."""
    quota = torch.full((a.shape[0], members.shape[0]), w, device=a.device)
    # -1 reads the last token here; ``top_k_in_groups`` leaves such members out
    return top_k_in_groups(a[:, members], members, quota, w * members.shape[0])


def joining(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N - k) tokens that are not among the kept (B, k), and which of these each is most similar to."""
    rest = rest_of(kept, x.shape[1])
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    cosine = rows_at(unit, rest) @ rows_at(unit, kept).transpose(1, 2)  # (B, N - k, k)
    return rest, cosine.argmax(dim=-1)


def merged_means(x: Tensor, kept: Tensor, others: tuple[Tensor, Tensor]) -> Tensor:
    """(B, k, D) float32 means of the kept tokens (B, k) of x (B, N, D), each with those that join it, which
    ``joining`` found.
    """
    rest, target = others
    total = rows_at(x, kept).float()
    # a kept token is a member of its own mean
    count = total.new_ones(*kept.shape, 1).scatter_add(1, target[..., None], total.new_ones(*rest.shape, 1))
    joined = rows_at(x, rest).float()
    return total.scatter_add(1, target[..., None].expand_as(joined), joined) / count


def official_keep(keep: int, count: int = 16) -> int:
    """Tokens that the official code keeps with ``count`` windows when it is asked for ``keep``.

    To reproduce a run, give this number as ``keep``.

    Example:
        >>> official_keep(58), official_keep(96)
        (45, 96)
    """
    local = keep // 2
    return local // count * count + keep - local
