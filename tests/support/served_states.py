# SPDX-License-Identifier: Apache-2.0
"""The running states of Qwen3.5 in single precision, in place of vLLM's kernel for CPUs.

That kernel takes bfloat16 alone, whose rounding would hide whether answers are those of transformers. What is
replaced reads no positions and knows no pictures: one sequence after the other goes through the function of
transformers. Where a state is kept, and when it is new, is still said by vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def install() -> None:
    """For good: vLLM registers its kernel once in a process, when the first model is made."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
    from vllm.utils.torch_utils import LayerNameType

    # torch reads the types of what is registered, and how vLLM names a layer depends on the release of torch
    states.__annotations__["layer_name"] = LayerNameType
    gdn_attention.cpu_gdn_attention_core = states


def states(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: Any) -> None:
    """What a layer reads of its state, into ``core_attn_out`` (T, heads, channels)."""
    from vllm.forward_context import get_forward_context
    from vllm.utils.torch_utils import _resolve_layer_name

    context = get_forward_context()
    if context.attn_metadata is None:  # memory is being measured
        return
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    told = context.attn_metadata[layer.prefix]
    ends = told.non_spec_query_start_loc.tolist()
    for number, slot in enumerate(told.non_spec_state_indices_tensor.tolist()):
        some = slice(ends[number], ends[number + 1])
        known = number < told.num_decodes or bool(told.has_initial_state[number])
        if some.stop > some.start:
            core_attn_out[some] = one_sequence(layer, mixed_qkv[some], b[some], a[some], slot, known)


def one_sequence(layer: Any, mixed: Tensor, b: Tensor, a: Tensor, slot: int, known: bool) -> Tensor:
    """(T, heads, channels) of the new tokens (T, channels) of a sequence, whose states are in a slot."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    # (width - 1, channels) the last inputs, (heads, keys, values) the state
    inputs, state = layer.kv_cache[0][slot], layer.kv_cache[1][slot]
    state = state.view(state.shape[0], state.shape[2], state.shape[1])
    if not known:
        inputs.zero_()
        state.zero_()
    read = torch.cat([inputs, mixed])
    inputs.copy_(read[-len(inputs) :])
    weight = getattr(layer.conv1d, "_cpu_unpacked_conv_weight", layer.conv1d.weight)
    weight = weight.reshape(mixed.shape[1], 1, -1)
    mixed = F.silu(F.conv1d(read.T[None], weight, layer.conv1d.bias, groups=len(weight)))[0].T
    query, key, value = layer.rearrange_mixed_qkv(mixed)
    group = value.shape[2] // key.shape[2]
    decay = -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias)
    out, last = torch_recurrent_gated_delta_rule(
        query.repeat_interleave(group, dim=2),
        key.repeat_interleave(group, dim=2),
        value,
        g=decay[None],
        beta=b.sigmoid()[None],
        initial_state=state[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    state.copy_(last[0])
    return out[0]
