# SPDX-License-Identifier: Apache-2.0
"""Attention both ways among the tokens of a picture, in place of vLLM's kernel for CPUs.

That kernel lets tokens see earlier ones alone, and leaves unread which tokens are a picture. What is replaced
is the sum over keys and values: where they are kept, and which tokens of a prompt are a picture, is said by
vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def install(patch: Any) -> None:
    """Until ``patch``, pytest's, is undone."""
    from vllm.v1.attention.backends import cpu_attn

    build = cpu_attn.CPUAttentionMetadataBuilder.build

    def told(self: Any, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        made = build(self, common_prefix_len, common, fast_build)
        # number of a sequence -> (first, last) place of each of its pictures; under vLLM's name, by which
        # Gemma 4 takes it from layers that see earlier tokens alone
        made.mm_prefix_range = common.mm_req_doc_ranges
        return made

    patch.setattr(cpu_attn.CPUAttentionMetadataBuilder, "build", told)
    patch.setattr(cpu_attn.CPUAttentionBackendImpl, "do_kv_cache_update", keep)
    patch.setattr(cpu_attn.CPUAttentionBackendImpl, "forward", attend)


def keep(impl: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Keys and values (T, heads, d) side by side into ``kv_cache`` (pages, heads, page, 2 * d)."""
    page = kv_cache.shape[2]
    kv_cache[slot_mapping // page, :, slot_mapping % page] = torch.cat([key, value], dim=-1)


def attend(
    impl: Any,
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    told: Any,
    output: Tensor,
    *scales: Any,
    **more: Any,
) -> Tensor:
    """What queries (T, heads, d) read, into ``output``."""
    if told is None:  # memory is being measured
        return output
    ends = told.query_start_loc.tolist()
    for number, length in enumerate(told.seq_lens.tolist()):
        some = slice(ends[number], ends[number + 1])
        if some.stop == some.start:
            continue
        pages = told.block_table[number, : -(-length // kv_cache.shape[2])].long()
        # (heads, length, 2 * d)
        kept = kv_cache[pages].transpose(0, 1).flatten(1, 2)[:, :length]
        keys, values = kept.chunk(2, dim=-1)
        pictures = (told.mm_prefix_range or {}).get(number, ())
        within = layer.mm_prefix_clamp_sliding_window
        seen = mask(length, some.stop - some.start, impl.sliding_window, pictures, within)
        found = F.scaled_dot_product_attention(
            query[some].transpose(0, 1), keys, values, seen, scale=impl.scale, enable_gqa=True
        )
        output[some] = found.transpose(0, 1).reshape(output[some].shape)
    return output


def mask(length: int, new: int, window: int, pictures: Any, within: bool) -> Tensor:
    """(new, length) bool: which tokens of a sequence the last ``new`` of it see.

    Args:
        window: how many tokens back; less than 1: all. within: whether it binds those of a picture too.
    """
    at, to = torch.arange(length - new, length)[:, None], torch.arange(length)
    near = to > at - window if window > 0 else torch.ones(new, length, dtype=torch.bool)
    both = torch.zeros(new, length, dtype=torch.bool)
    for first, last in pictures:
        both |= (first <= at) & (at <= last) & (first <= to) & (to <= last)
    seen = to <= at
    return (seen | both) & near if within else (seen & near) | both
