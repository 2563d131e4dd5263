# SPDX-License-Identifier: Apache-2.0
"""TextMonkey: keep the tokens least like any later one, and let them look once at all tokens.

Pictures of documents hold many near-copies of blank and repeated tokens. With n_i the token x_i of length
one, as the language model would read it:

    e_i = max over j > i of n_i . n_j,      e = -1 for the last token
    kept = the r tokens with the lowest e

Each token looks at later ones only, so that of a group of copies the last survives, and the last token always
does. This filter needs no training. With the weights of a trained block the kept tokens q then take in what
was dropped, x and q through one projection to a smaller width first:

    a = Attention(q = LN(q), k = v = [LN(x); LN(q)]),      q + scale W_2 gelu(W_1 LN(a))

W_2 starts at zero: untrained, the block is the filter.

Deviations: without ``weights`` the filter alone. The overview picture that the paper appends is no part of
it. Ties keep the lower index.
``compare="all"`` (ours) looks both ways, where two exact copies are both dropped before anything else.
Provenance: Liu et al., arXiv:2403.04473; written from a description of the official code (commit 498e1d9,
MIT); no code copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import one_of
from ..core.method import Merged, Method, Verb, What
from ..core.select import top_k
from ..core.tokens import VisualTokens
from ..core.weights import Trained, read_weights, untrained
from ..errors import SpecError
from ..registry import register

# D width of the language model, m of the block, a of its attention, i of its last layers
SHAPES = {
    "down.weight": ("m", "D"),
    **{f"{norm}.{part}": ("m",) for norm in ("norm_tokens", "norm_kept") for part in ("weight", "bias")},
    "query.weight": ("a", "m"),
    "key_value.weight": ("2a", "m"),
    "out.weight": ("m", "a"),
    "scale": ("1",),
    "mlp_norm.weight": ("m",),
    "mlp_norm.bias": ("m",),
    "mlp_in.weight": ("i", "m"),
    "mlp_out.weight": ("D", "i"),
}
_ROWS_AT_ONCE = 512  # of the cosines: no N x N map is held


def largest_cosine(x: Tensor, compare: str) -> Tensor:
    """(B, N) largest cosine of each token (B, N, D) with a later, or any other one; -1 for none."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    column, found = torch.arange(x.shape[1], device=x.device), []
    for rows, own in zip(unit.split(_ROWS_AT_ONCE, dim=1), column.split(_ROWS_AT_ONCE), strict=True):
        other = column > own[:, None] if compare == "later" else column != own[:, None]  # (r, N)
        # no cosine is below -1
        found.append((rows @ unit.transpose(1, 2)).masked_fill(~other, -1.0).amax(dim=2))
    return torch.cat(found, dim=1)


@register("textmonkey")
@dataclass(frozen=True)
class TextMonkey(Method):
    """Ranks tokens by how little they are like any later token.

    Args:
        compare: "later": with later tokens, as published; "all": with all others.
        weights: folder with the trained block behind the filter, for this model; None: the filter alone.
    """

    compare: str = "later"
    weights: str | None = None

    needs: ClassVar[tuple[What, ...]] = ("features",)
    paper: ClassVar[str] = "arXiv:2403.04473"
    licence: ClassVar[str] = "MIT"

    def __post_init__(self) -> None:
        one_of("compare", self.compare, ("later", "all"))
        found = None if self.weights is None else read_weights(self.weights, self.name, SHAPES)
        # beside the fields: weights are no option, and are not compared or printed
        object.__setattr__(self, "_trained", found)
        if found is not None:
            check_heads(found)
            # on this instance alone: with a block rows change, so that it merges
            object.__setattr__(self, "kind", lambda: "merge")

    @classmethod
    def kind(cls) -> Verb:
        """What the filter alone is; with weights it makes rows."""
        return "score"

    def check_model(self, config: Any) -> None:
        trained: Trained | None = getattr(self, "_trained", None)
        if trained is not None:
            trained.check(config)

    def score(self, tokens: VisualTokens) -> Tensor:
        return -largest_cosine(tokens.need("features"), self.compare)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        """The kept tokens after they looked at all tokens."""
        trained: Trained | None = getattr(self, "_trained", None)
        if trained is None:
            raise untrained(self.name, f"{self.name}, the filter")
        features = tokens.need("features")  # (B, N, D)
        x, kept = features.float(), top_k(self.score(tokens), k)
        own = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))  # (B, k, D)
        rows = resampled(x, own, trained.on(x.device), trained.facts["heads"])
        return Merged(rows.to(features.dtype), kept)


def resampled(x: Tensor, own: Tensor, weights: Mapping[str, Tensor], heads: int) -> Tensor:
    """(B, k, D) the kept tokens ``own`` (B, k, D) after one look at all tokens x (B, N, D)."""

    def normed(rows: Tensor, name: str) -> Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(rows, scale.shape, scale, shift)

    def split(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (heads, -1)).transpose(1, 2)

    # LN(x) and LN(q), both in the width m of the block
    every = normed(F.linear(x, weights["down.weight"]), "norm_tokens")
    queries = normed(F.linear(own, weights["down.weight"]), "norm_kept")
    # keys and values of all tokens, and of the kept ones again
    seen = F.linear(torch.cat([every, queries], dim=1), weights["key_value.weight"])
    keys, values = seen.chunk(2, dim=-1)
    asked = F.linear(queries, weights["query.weight"])
    # the a of the formula, (B, heads, k, width / heads)
    looked = F.scaled_dot_product_attention(split(asked), split(keys), split(values))
    out = F.linear(looked.transpose(1, 2).flatten(2), weights["out.weight"])
    inner = F.gelu(F.linear(normed(out, "mlp_norm"), weights["mlp_in.weight"]))
    # W_2 starts at zero: untrained, nothing is added
    return own + weights["scale"] * F.linear(inner, weights["mlp_out.weight"])


def check_heads(trained: Trained) -> None:
    """Raise unless the width of the block falls into its heads."""
    heads, width, both = trained.facts.get("heads"), trained.sizes["a"], trained.sizes["2a"]
    if type(heads) is not int or heads < 1 or width % heads or both != 2 * width:
        raise SpecError(
            f"weights={trained.folder!r} have heads={heads!r}, queries {width} and keys with values {both} "
            "wide; expected heads that divide the first, and the second twice that"
        )
