# SPDX-License-Identifier: Apache-2.0
"""Language models that a VLM may have behind its projector, as fields of tiny configs: one entry per rule of
attention.

``tiny_model("llava", text=name)`` takes any of them. They differ in what is easy to get wrong from outside:
rotation in halves or interleaved, on a part of a head or on some layers only, norms before or after it,
sinks, soft caps, latent keys, windows, chunks, and layers without attention between those with it.
"""

from __future__ import annotations

from typing import Any

# classes call the same thing by different names, and a config ignores those of others
MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
_HEADS: dict[str, Any] = {"head_dim": 16}
_WINDOW: dict[str, Any] = {
    "sliding_window": 64
}  # wider than most tests' prompts; the rule of its layers applies all the same
# with a scale of logits that is not 1 / sqrt(head_dim)
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 20}
# attention in the middle, layers without it on both sides
HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"]
}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
# keys and values come from short vectors, and a part of each head alone is rotated
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}

# name -> (prefix of the transformers classes, fields of the config)
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_sliding": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2_moe": ("Qwen2Moe", MOE),
    "qwen3": ("Qwen3", _HEADS),
    "qwen3_moe": ("Qwen3Moe", MOE | _HEADS),
    "gemma": ("Gemma", _HEADS),
    "gemma2_softcap": ("Gemma2", _GEMMA | _WINDOW | {"attn_logit_softcapping": 3.0}),
    "gemma3_text": ("Gemma3Text", _GEMMA | _WINDOW),
    "granite": ("Granite", {"attention_multiplier": 0.3}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "mixtral": ("Mixtral", MOE),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", _WINDOW),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
    "nemotron": ("Nemotron", {}),
    "gpt_oss": ("GptOss", MOE | _HEADS | _WINDOW),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", _WINDOW),
    "glm": ("Glm", _HEADS),
    "glm4": ("Glm4", _HEADS),
    "ernie4_5": ("Ernie4_5", _HEADS),
    "helium": ("Helium", _HEADS),
    "smollm3": ("SmolLM3", {}),
    "hunyuan": ("HunYuanDenseV1", _HEADS),
    "exaone4": ("Exaone4", _WINDOW | {"sliding_window_pattern": 2}),
    "apertus": ("Apertus", {}),
    "seed_oss": ("SeedOss", _HEADS),
    "ministral3": ("Ministral3", _HEADS),
    "deepseek_v3": ("DeepseekV3", MOE | _LATENT),
    "glm4_moe": ("Glm4Moe", MOE | _HEADS),
    "llama4_text": ("Llama4Text", MOE | _HEADS | {"attention_chunk_size": 64, "intermediate_size_mlp": 64}),
    "qwen3_next": ("Qwen3Next", MOE | _HEADS | DELTA | HYBRID),
    "qwen3_5_text": ("Qwen3_5Text", _HEADS | DELTA | HYBRID),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "full_attention", "conv"]}),
    "falcon_h1": ("FalconH1", _HEADS | _MAMBA | {"mamba_d_ssm": 64, "mamba_n_heads": 4}),
    "granite_hybrid": (
        "GraniteMoeHybrid",
        MOE
        | _MAMBA
        | {"shared_intermediate_size": 32}
        | {"layer_types": ["mamba", "attention", "attention", "mamba"]},
    ),
}
# backbones with layers that keep a running state instead of keys: what entered them cannot be masked out
# later
RECURRENT = ("qwen3_next", "qwen3_5_text", "lfm2", "falcon_h1", "granite_hybrid")
