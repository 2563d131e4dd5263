# SPDX-License-Identifier: Apache-2.0
"""Where a vision tower keeps its attention, and how it is read in towers that are not of transformers.

Towers of timm attend by themselves; there the fused projection is read. Towers of vLLM hand queries and keys
to a module of its own, which holds the heads of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from ...core.deferred import Checks
from ...errors import UnsupportedError
from ..attention_call import AttentionCall
from ..attention_tap import reads_interface, walk

Gather = Callable[[Tensor], Tensor]  # (T, H of this rank, S, d) -> (T, H of all ranks, S, d)


class CallRecord(Protocol):
    """What is told of every call of a block."""

    checks: Checks

    def attend(self, index: int, call: AttentionCall) -> None: ...


Running = Callable[[], CallRecord | None]  # what records in this thread
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


def _holds_attention(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    return isinstance(module, nn.ModuleList | nn.Sequential) and any(attention_of(block) for block in module)


def find_blocks(tower: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The transformer blocks of a tower, found by structure: attribute paths differ between versions."""
    lists = [module for module in walk(tower, _holds_attention) if _holds_attention(module)]
    if not lists:
        raise UnsupportedError(
            f"no attention blocks found in vision tower {type(tower).__name__}, so attention cannot be read; "
            "choose a method that needs none, e.g. 'divprune@64'"
        )
    # a tower may have other blocks that attend, such as a pooling head: the longest list is the trunk
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


def prefix_length(tower: nn.Module, cls: bool) -> int:
    """How many tokens stand in front of the patches: [CLS], where there is one, and registers."""
    # timm says it, registers included
    counted: int | None = getattr(tower, "num_prefix_tokens", None)
    return int(cls) if counted is None else counted


def has_cls(tower: nn.Module) -> bool:
    """Whether the tower puts a [CLS] token in front of its patches."""
    # asking modules for what they have not takes most of the time of attaching: the tables are read instead
    for module in walk(tower):
        held = vars(module)
        for table in (held["_parameters"], held["_buffers"], held["_modules"], held):
            if table.get("class_embedding") is not None or table.get("cls_token") is not None:
                return True
    return False


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

    def install(self, running: Running, block: int) -> Iterable[Any]:
        """A hook that gives the record every call."""

        @torch.no_grad()
        def fused(module: nn.Module, args: object, output: Tensor) -> None:
            record = running()
            if record is not None:
                queries, keys, values = (self._heads(part) for part in output.detach().chunk(3, dim=-1))
                queries, keys = self._normed("q", queries), self._normed("k", keys)
                options = {"scaling": getattr(self.attention, "scale", None), "is_causal": False}
                call = AttentionCall(self.attention, queries, keys, values, None, options)
                record.attend(block, call)

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

    def install(self, running: Running, block: int) -> Iterable[Any]:
        """A hook that gives the record every sequence of a call."""

        @torch.no_grad()
        def given(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            record = running()
            if record is None:
                return
            names = ("query", "key", "value")
            states = [kwargs[name] if name in kwargs else args[at] for at, name in enumerate(names)]
            parts = [self._heads(one.detach()).split(self.lengths or one.shape[1], dim=2) for one in states]
            options = {"scaling": self.inner.scale, "is_causal": False}
            for queries, keys, values in zip(*parts, strict=True):
                record.attend(block, AttentionCall(self.inner, queries, keys, values, None, options))

        yield self.inner.register_forward_pre_hook(given, with_kwargs=True)

    def _heads(self, states: Tensor) -> Tensor:
        """(T, S, C) or (T, S, H, d) -> (T, H, S, d)."""
        apart = states if states.ndim == 4 else states.unflatten(-1, (-1, self.inner.head_size))
        apart = apart.transpose(1, 2)
        return apart if self.gather is None else self.gather(apart.contiguous())
