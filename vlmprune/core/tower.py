# SPDX-License-Identifier: Apache-2.0
"""Where a vision tower keeps its attention, and the queries and keys of one block as that attention uses them.

Two forms exist: projections of their own (CLIP, SigLIP, InternVL, Idefics3) and one fused ``qkv`` (timm, Qwen). Qwen packs all
pictures into one sequence, turns queries and keys, and attends inside segments; the others have a batch of crops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError

_NAMES = ("self_attn", "attention", "attn", "token_mixer")


def attention_of(block: nn.Module) -> nn.Module | None:
    """The self-attention of a block, None where it has none."""
    found = (getattr(block, name, None) for name in _NAMES)
    return next((module for module in found if hasattr(module, "q_proj") or hasattr(module, "qkv")), None)


def find_blocks(tower: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The transformer blocks of a tower, found by structure since attribute paths moved between transformers versions."""
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) and attention_of(m[0])]
    if not lists:
        raise UnsupportedError(
            f"no attention blocks found in vision tower {type(tower).__name__}, so attention cannot be read; "
            "choose a method that needs none, e.g. 'divprune@64'"
        )
    return max(lists, key=len)


def prefix_length(tower: nn.Module) -> int:
    """How many tokens stand in front of the patches: [CLS], and registers where there are some."""
    if hasattr(tower, "num_prefix_tokens"):
        return tower.num_prefix_tokens
    return int(has_cls(tower))


def has_cls(tower: nn.Module) -> bool:
    """Whether the tower puts a [CLS] token in front of its patches."""
    names = ("class_embedding", "cls_token")
    return any(getattr(module, name, None) is not None for module in tower.modules() for name in names)


@dataclass(eq=False)
class Packed:
    """How a packed sequence of S patches attends: (S, d) rotary angles, and where its segments end."""

    cos: Tensor
    sin: Tensor
    ends: Tensor  # (segments + 1,) from 0 to S


class AttentionReader:
    """Watches the self-attention of one block.

    ``install(give)`` calls ``give(queries, keys)``, each (T, S, H, d), whenever the block runs; ``give`` may run several times
    per forward, once per segment of a packed sequence.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        heads = getattr(attention, "num_heads", None)
        if heads is None:
            raise UnsupportedError(f"{type(attention).__name__} does not say its number of heads; its attention cannot be read")
        self.heads: int = heads

    def scale(self, width: int) -> float:
        """Factor of the logits for heads of this width."""
        found = (getattr(self.attention, name, None) for name in ("scale", "scaling"))
        return next((factor for factor in found if factor is not None), width**-0.5)

    def install(self, local: Any, give: Callable[[Tensor, Tensor], None]) -> Iterable[torch.utils.hooks.RemovableHandle]:
        """Hooks that work while ``local.record`` is set; ``local``, a thread-local, also holds the halves of one run."""
        attention = self.attention

        def recording() -> bool:
            return getattr(local, "record", None) is not None

        if hasattr(attention, "qkv"):

            def fused(module: nn.Module, args: object, output: Tensor) -> None:
                if recording():
                    queries, keys, _ = output.detach().chunk(3, dim=-1)
                    self._give(queries, keys, local.__dict__.pop("packed", None), give)

            def packing(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                if recording() and kwargs.get("cu_seqlens") is not None and kwargs.get("position_embeddings") is not None:
                    local.packed = Packed(*kwargs["position_embeddings"], kwargs["cu_seqlens"])

            yield attention.qkv.register_forward_hook(fused)
            yield attention.register_forward_pre_hook(packing, with_kwargs=True)
            return

        def half(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: object, output: Tensor) -> None:
                if not recording():
                    return
                halves = local.__dict__.setdefault("halves", {})
                halves[name] = output.detach()
                if len(halves) == 2:
                    del local.halves
                    self._give(halves["q"], halves["k"], None, give)

            return hook

        for name in ("q", "k"):
            yield getattr(attention, f"{name}_proj").register_forward_hook(half(name))

    @torch.no_grad()
    def _give(self, queries: Tensor, keys: Tensor, packed: Packed | None, give: Callable[[Tensor, Tensor], None]) -> None:
        queries, keys = (self._heads(name, x) for name, x in (("q", queries), ("k", keys)))
        if packed is None:
            give(queries, keys)
            return
        queries, keys = (_turn(x, packed) for x in (queries, keys))
        lengths = packed.ends.diff().tolist()
        for part in zip(queries.split(lengths), keys.split(lengths), strict=True):
            give(part[0][None], part[1][None])

    def _heads(self, name: str, x: Tensor) -> Tensor:
        """(..., C) -> (..., H, d), normalised as the block does it: whole rows (InternVL) or every head (timm)."""
        norm = getattr(self.attention, f"{name}_norm", None)
        split = x.unflatten(-1, (self.heads, -1))
        weight = getattr(norm, "weight", None)
        if weight is None:
            return split
        return norm(split) if weight.shape[-1] == split.shape[-1] else norm(x).unflatten(-1, (self.heads, -1))


def _turn(x: Tensor, packed: Packed) -> Tensor:
    """(S, H, d) rotated as Qwen's vision attention does it, in float32."""
    x = x.float()
    first, second = x.chunk(2, dim=-1)
    return x * packed.cos[:, None].float() + torch.cat([-second, first], dim=-1) * packed.sin[:, None].float()
