# SPDX-License-Identifier: Apache-2.0
"""Which families are served in vLLM, by what, and why the others are not. Imports no vLLM.

Only families are served whose answers were measured equal to vlmprune.prune. The page docs/serve.md shows the
tables that docs/serve_families.py makes of this file.
"""

from __future__ import annotations

_SUFFIX = "ForConditionalGeneration"
_WHOLE = {"NemotronH_Omni_Reasoning_V3", "ShieldGemma2ForImageClassification"}  # names without it
# model type -> (file here, start of the name of its class)
OWN = {
    "llava": ("llava", "Llava"),
    "llava_next": ("llava_next", "LlavaNext"),
    "llava_onevision": ("llava_next", "LlavaOnevision"),
    "internvl": ("internvl", "InternVL"),
    "qianfan_ocr": ("internvl", "QianfanOCR"),
    "qwen2_vl": ("qwen_vl", "Qwen2VL"),
    "qwen2_5_vl": ("qwen_vl", "Qwen2_5_VL"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VL"),
    "qwen3_vl_moe": ("qwen3_vl", "Qwen3VLMoe"),
    "qwen3_5": ("qwen3_5", "Qwen3_5"),
    "qwen3_5_moe": ("qwen3_5", "Qwen3_5Moe"),
    "qwen2_5_omni_thinker": ("qwen_omni", "Qwen2_5Omni"),
    "qwen3_omni_moe_thinker": ("qwen_omni", "Qwen3OmniMoe"),
    "cosmos3_omni": ("cosmos3", "Cosmos3"),
    "gemma3": ("gemma3", "Gemma3"),
    "gemma3n": ("gemma3n", "Gemma3n"),
    "gemma4": ("gemma4", "Gemma4"),
    "granite4_vision": ("granite4_vision", "Granite4Vision"),
    "lfm2_vl": ("lfm2_vl", "Lfm2Vl"),
    "minicpmv4_6": ("minicpmv4_6", "MiniCPMV4_6"),
}
# names in released checkpoints that do not follow from a start -> model type
ALSO = {"Qwen2_5OmniModel": "qwen2_5_omni_thinker"}

# vLLM can run them in its wrapper of transformers, and has a class of its own for some; see layouts.py
_TILES = "square tiles, each with a budget of its own"
_ONE = "one square"
_ANY = "one block of any size"
_QUERIES = "whose tokens have no rows and columns"
_FEATURES = "features"
_TOWER = f"{_FEATURES}, attention of the tower"
_CLS = f"{_TOWER}, [CLS]"
# model type -> (start of the name of its class, what a picture is, what methods can read)
WRAPPED = {
    "aria": ("Aria", f"tiles with a budget of their own, {_QUERIES}", _FEATURES),
    "aya_vision": ("AyaVision", _TILES, _TOWER),
    "cohere2_vision": ("Cohere2Vision", _TILES, _TOWER),
    "deepseek_vl": ("DeepseekVL", _ONE, _TOWER),
    "exaone4_5": ("Exaone4_5_", _ANY, _TOWER),
    "fast_vlm": ("FastVlm", _ONE, _TOWER),
    "got_ocr2": ("GotOcr2", f"with `crop_to_patches`, {_TILES}", _FEATURES),
    "hyperclovax_vision_v2": ("HyperCLOVAXVisionV2", _ANY, _TOWER),
    "idefics3": ("Idefics3", _TILES, _TOWER),
    "janus": ("Janus", f"{_ONE}; where it writes text", _TOWER),
    "lighton_ocr": ("LightOnOcr", _ANY, _TOWER),
    "llava_next_video": (
        "LlavaNextVideo",
        "an overview and a block of tiles with newlines, which stay and are not counted",
        _CLS,
    ),
    "mistral3": (
        "Mistral3",
        f"{_ANY}, a break behind every row; breaks stay and are not counted",
        _TOWER,
    ),
    "perception_lm": ("PerceptionLM", f"{_TILES}; pictures of a prompt have equally many", _FEATURES),
    "smolvlm": ("SmolVLM", _TILES, _TOWER),
    "video_llama_3": ("VideoLlama3", _ANY, _TOWER),
    "vipllava": ("VipLlava", _ONE, _CLS),
}

# the same with M-RoPE: tokens that stay keep their row and column
PLACED = {
    "glm46v": ("Glm46V", _ANY, _TOWER),
    "glm4v": ("Glm4v", _ANY, _TOWER),
    "glm4v_moe": ("Glm4vMoe", _ANY, _TOWER),
    "glm_ocr": ("GlmOcr", _ANY, _TOWER),
    "glmga": ("Glm46V", _ANY, _TOWER),
    "paddleocr_vl": ("PaddleOCRVL", _ANY, _TOWER),
}
# the same with marks around and between tiles, whose embeddings are made of the tower's vocabulary
MARKED = {"ovis2": ("Ovis2", _TILES, _TOWER)}
IN_WRAPPER = WRAPPED | PLACED | MARKED
EXPERTS = {"glm4v_moe"}  # of these, with experts in the decoder

_LATER = "all tokens of its prompt see later ones; in vLLM's class for it those of a picture alone do"
_UNTRIED = "; vLLM's class for it was not tried"
_STATES = "its layers keep running states, which vLLM's wrapper of transformers does not"
_OLD = "the transformers that vLLM 0.32.0 installs has no class for it"
_TEXT = (
    "its processor does not say which text stands for a picture, by which vLLM's wrapper of transformers "
    "finds its tokens"
)
_FUSED = (
    "its checkpoints hold queries, keys and values of the tower in one matrix, under a name that vLLM's "
    "wrapper of transformers cannot read"
)
# model type -> (start of the name of its class, reason)
NOT_SERVED = {
    "cohere_compass": (
        "CohereCompass",
        "a small model answers otherwise in vLLM's class than in transformers, under `dense` too",
    ),
    "cosmos3_edge": (
        "Cosmos3Edge",
        "vLLM's wrapper of transformers ends while it builds it (`_pre_trained_model_classes`); vLLM's class "
        "reads another config (`projector_config`) than that of transformers, and was not tried",
    ),
    "deepseek_ocr2": (
        "DeepseekOcr2",
        f"{_TEXT}; vLLM's class builds its tower in one size, that of the released model, in which no small "
        "model can be compared",
    ),
    "emu3": ("Emu3", "its tokens are words of a codebook, for which vlmprune has no adapter"),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoe",
        "its experts have two sizes, for text and for pictures, which vLLM's wrapper of transformers takes "
        f"for sizes by layer, and ends{_UNTRIED}",
    ),
    "idefics2": ("Idefics2", _TEXT),
    "kimi_k25": ("Kimi_K25", f"{_FUSED}; vLLM's class, which takes images for parts of clips, was not tried"),
    "lfm3_vl": ("Lfm3Vl", _OLD),
    "minicpm_ocr": ("MiniCPMOcr", _OLD),
    "molmo2": ("Molmo2", _OLD),
    "nemotron_h_omni": (
        "NemotronH_Omni_Reasoning_V3",
        f"{_STATES}; vLLM's class rounds the features of its tower to bfloat16, which would hide what is "
        "compared",
    ),
    "paligemma": ("PaliGemma", _LATER),
    "pp_chart2table": ("GotOcr2", _TEXT),
    "shieldgemma2": (
        "ShieldGemma2ForImageClassification",
        "it answers with probabilities of classes, and writes no text",
    ),
    "video_llava": (
        "VideoLlava",
        "vlmprune reads it with transformers 5.23 or newer, and vLLM 0.32.0 installs an older one",
    ),
}
# of these, whose reason was seen by trying; of the others it was read from code of vLLM and transformers
TRIED = {
    "cohere_compass",
    "cosmos3_edge",
    "ernie4_5_vl_moe",
    "lfm3_vl",
    "minicpm_ocr",
    "molmo2",
}


def architecture(start: str) -> str:
    """The name of a class as checkpoints give it."""
    return start if start in _WHOLE else start + _SUFFIX
