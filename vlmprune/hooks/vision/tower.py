# SPDX-License-Identifier: Apache-2.0
"""Where a vision tower keeps its attention, and the queries and keys of one block as that attention uses
them.

Towers of transformers hand queries and keys to an attention function, where they are taken: rotation, norms,
masks and windows are the tower's own. Towers of timm attend by themselves; there the fused projection is
read. Towers of vLLM hand queries and keys to a module of its own, which holds the heads of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.deferred import Checks
from ...errors import UnsupportedError
from ..attention_call import AttentionCall, Form
from ..attention_tap import AttentionTap, reads_interface

Give = Callable[[AttentionCall], None]
Gather = Callable[[Tensor], Tensor]  # (T, H of this rank, S, d) -> (T, H of all ranks, S, d)
_FUSED = "qkv"  # name of the fused projection
_NAMES = ("self_attn", "attention", "attn", "token_mixer")


def attention_of(block: nn.Module) -> nn.Module | None:
    """The self-attention of a block, None where it has none."""
    found = (getattr(block, name, None) for name in _NAMES)
    return next((module for module in found if module is not None and _readable(module)), None)


def attention_in(block: nn.Module) -> nn.Module:
    """The self-attention of a block that has to have one."""
    attention = attention_of(block)
    if attention is None:
        raise UnsupportedError(
            f"a {type(block).__name__} of this vision tower has no attention that can be read; choose a "
            "method that needs none, e.g. 'divprune@64'"
        )
    return attention


def _readable(attention: nn.Module) -> bool:
    return reads_interface(attention) or inner_of(attention) is not None or hasattr(attention, _FUSED)


def inner_of(attention: nn.Module) -> nn.Module | None:
    """The module of vLLM that an attention module hands queries and keys to, None elsewhere."""
    inner = getattr(attention, "attn", None)
    return inner if isinstance(inner, nn.Module) and hasattr(inner, "head_size") else None


def find_blocks(tower: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The transformer blocks of a tower, found by structure: attribute paths differ between versions."""
    lists = [
        m
        for m in tower.modules()
        if isinstance(m, nn.ModuleList | nn.Sequential) and any(attention_of(block) for block in m)
    ]
    if not lists:
        raise UnsupportedError(
            f"no attention blocks found in vision tower {type(tower).__name__}, so attention cannot be read; "
            "choose a method that needs none, e.g. 'divprune@64'"
        )
    return max(lists, key=len)


def find_head(tower: nn.Module) -> nn.Module:
    """The pooling head of a tower, where a trained probe attends to all patches, as SigLIP has one."""
    for module in tower.modules():
        attention = getattr(module, "attention", None)
        if isinstance(attention, nn.MultiheadAttention) and isinstance(
            getattr(module, "probe", None), nn.Parameter
        ):
            return module
    raise UnsupportedError(
        f"{type(tower).__name__} has no pooling head, or its checkpoint none (vision_use_head=False); read "
        "the attention of its blocks instead, as fastvid does without by=head"
    )


def prefix_length(tower: nn.Module) -> int:
    """How many tokens stand in front of the patches: [CLS], and registers where there are some."""
    counted: int | None = getattr(tower, "num_prefix_tokens", None)
    return int(has_cls(tower)) if counted is None else counted


def has_cls(tower: nn.Module) -> bool:
    """Whether the tower puts a [CLS] token in front of its patches."""
    names = ("class_embedding", "cls_token")
    return any(getattr(module, name, None) is not None for module in tower.modules() for name in names)


class TapReader:
    """Reads an attention module of transformers: queries and keys as its attention function gets them."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def install(self, checks: Callable[[], Checks | None], give: Give) -> Iterable[Any]:
        """A tap that calls ``give`` while something records, once per segment where the model packs several
        pictures.

        ``checks()`` says where checks go, None while nothing records.
        """
        known: set[Form] = set()

        @torch.no_grad()
        def listen(call: AttentionCall, output: Tensor) -> None:
            gather = checks()
            if gather is None:
                return
            if call.form not in known:  # once is enough: the rule does not change from call to call
                first = torch.zeros(call.queries.shape[0], 1, dtype=torch.int64, device=call.queries.device)
                for part, own in zip(call.segments(), _split_output(call, output), strict=True):
                    part.check(first, None, part.attention(first), own, gather)
                known.add(call.form)
            for part in call.segments():
                give(part)

        made = AttentionTap(self.attention, listen)
        made.install()
        yield made


def _split_output(call: AttentionCall, output: Tensor) -> Sequence[Tensor]:
    """The output (B, n, H, d) of a call, one part per segment."""
    parts = call.segments()
    return [output] if len(parts) == 1 else output.split([part.queries.shape[2] for part in parts], dim=1)


class FusedReader:
    """Reads an attention module of timm, which projects and attends by itself."""

    def __init__(self, attention: nn.Module) -> None:
        heads = getattr(attention, "num_heads", None)
        if heads is None:
            raise UnsupportedError(
                f"{type(attention).__name__} does not say its number of heads; its attention cannot be read"
            )
        self.attention: Any = attention  # which modules it has is known to timm alone
        self.heads: int = heads

    def install(self, checks: Callable[[], Checks | None], give: Give) -> Iterable[Any]:
        """A hook that calls ``give`` while something records."""

        @torch.no_grad()
        def fused(module: nn.Module, args: object, output: Tensor) -> None:
            if checks() is not None:
                queries, keys, values = (self._heads(part) for part in output.detach().chunk(3, dim=-1))
                queries, keys = self._normed("q", queries), self._normed("k", keys)
                options = {"scaling": getattr(self.attention, "scale", None), "is_causal": False}
                give(AttentionCall(self.attention, queries, keys, values, None, options))

        yield getattr(self.attention, _FUSED).register_forward_hook(fused)

    def _heads(self, states: Tensor) -> Tensor:
        """(T, S, C) -> (T, H, S, d)."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _normed(self, name: str, states: Tensor) -> Tensor:
        norm = getattr(self.attention, f"{name}_norm", None)
        return states if norm is None else norm(states)


class InnerReader:
    """Reads the module that an attention module of vLLM hands finished queries and keys to.

    Args:
        gather: where it holds a share of the heads: brings the shares of all ranks together.

    Attributes:
        lengths: of the sequences that a call packs, each of which attends to itself; None for whole calls.
            How vLLM says it in its call depends on the backend, so that the host gives them.
    """

    def __init__(self, inner: nn.Module, gather: Gather | None = None) -> None:
        self.inner: Any = inner
        self.gather = gather
        self.lengths: list[int] | None = None

    def install(self, checks: Callable[[], Checks | None], give: Give) -> Iterable[Any]:
        """A hook that calls ``give`` while something records, once per sequence."""

        @torch.no_grad()
        def given(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            if checks() is None:
                return
            names = ("query", "key", "value")
            states = [kwargs[name] if name in kwargs else args[at] for at, name in enumerate(names)]
            parts = [self._heads(one.detach()).split(self.lengths or one.shape[1], dim=2) for one in states]
            options = {"scaling": self.inner.scale, "is_causal": False}
            for queries, keys, values in zip(*parts, strict=True):
                give(AttentionCall(self.inner, queries, keys, values, None, options))

        yield self.inner.register_forward_pre_hook(given, with_kwargs=True)

    def _heads(self, states: Tensor) -> Tensor:
        """(T, S, C) or (T, S, H, d) -> (T, H, S, d)."""
        apart = states if states.ndim == 4 else states.unflatten(-1, (-1, self.inner.head_size))
        apart = apart.transpose(1, 2)
        return apart if self.gather is None else self.gather(apart.contiguous())


Reader = TapReader | FusedReader | InnerReader


def reader_of(attention: nn.Module, gather: Gather | None = None) -> Reader:
    """What reads an attention module that ``attention_of`` found."""
    if reads_interface(attention):
        return TapReader(attention)
    inner = inner_of(attention)
    return FusedReader(attention) if inner is None else InnerReader(inner, gather)
