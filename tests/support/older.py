# SPDX-License-Identifier: Apache-2.0
"""Tests that speak of transformers 5, and are left out with 4.57: by file, parts of names, and the reason."""

from __future__ import annotations

NEEDS_5 = {
    "core/test_batching.py": (("text_passes",), "continuous batching is another program there"),
    "core/test_hybrids.py": (
        ("qwen3_next", "lfm2", "falcon_h1", "granite_hybrid"),
        "caches of hybrid decoders are other classes there",
    ),
    "core/test_attention_tap.py": (
        (
            "qwen2_moe",
            "gemma2_softcap",
            "gemma3_text",
            "olmo3",
            "stablelm",
            "nemotron",
            "qwen3_next",
            "lfm2",
            "granite_hybrid",
            "falcon_h1",
        ),
        "these decoders attend by other code there",
    ),
    "core/test_attention_norm.py": (
        ("gemma3_text", "ministral3", "qwen3_5"),
        "these decoders are other classes there, or not there",
    ),
    "core/test_landing.py": (
        ("lands_on", "user_wrote", "moved_cut"),
        "the hybrid decoders that show it need a newer one",
    ),
    "core/test_attention_edits.py": (
        ("qwen2", "qwen3_vl", "paligemma", "gemma3", "internvl", "smolvlm"),
        "these families need a newer one",
    ),
    "models/test_structural.py": (
        ("same_tokens_are_cut_as_by_declaration", "does_not_hold_the_features"),
        "its models take no features that were encoded before",
    ),
    "core/test_text.py": (("qwen2_vl", "gemma3", "share_their_picture"), "these families need a newer one"),
    "core/test_encoder_slot.py": (
        ("projector_gets", "paligemma", "llava_onevision", "combined_or_asked", "clips_whose"),
        "blocks of towers take other arguments there, and these families need a newer one",
    ),
    "core/test_pictures.py": (
        ("video_llava", "internvl", "qwen2_vl", "pooled_clip", "projector_of_gemma"),
        "these families need a newer one",
    ),
    "core/test_calls.py": (
        ("positions_given_to_generate",),
        "generate goes on from given positions by other rules there",
    ),
    "core/test_frame_prompts.py": (("internvl", "smolvlm", "qwen2_5_vl"), "these families need a newer one"),
    "core/test_streaming.py": (("llava_next_video",), "this family needs a newer one"),
    "models/test_clip_inputs.py": (("internvl", "smolvlm"), "these families need a newer one"),
    "models/test_parted.py": (("declared", "of_mistral3"), "these families need a newer one"),
    "evaluation/test_tile_budgets.py": (
        ("internvl", "idefics3", "_vision", "smolvlm", "splits_nothing", "canvases", "gemma_3", "draws"),
        "these families need a newer one",
    ),
    "serving/test_mrope.py": (("of_the_tokens_that_stay",), "these families need a newer one"),
    "core/test_session.py": (("merged_by_hand",), "encoders return lists there"),
    "core/test_static_steps.py": (
        ("test_generate_compiles", "never_waited_for"),
        "generate asks a static cache for its length there, and compiles its steps anew",
    ),
    "core/test_compiled.py": (("wrapper_of_torch_compile",), "a compiled model cannot generate there"),
    "models/test_tower_attention.py": (
        ("eager_twin[llava]", "eager_twin[llava_next]", "eager_twin[vipllava]", "packed_pictures"),
        "towers return no attention maps there to compare with",
    ),
}


def reason(path: str, name: str) -> str | None:
    """Why a test of a file is left out; None where it runs."""
    for file, (parts, why) in NEEDS_5.items():
        if path.endswith(file) and any(part in name for part in parts):
            return f"needs transformers 5: {why}"
    return None
