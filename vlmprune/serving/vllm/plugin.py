# SPDX-License-Identifier: Apache-2.0
"""The entry point of vLLM's plug-ins: names our classes, imports nothing heavy.

vLLM calls ``register`` in every one of its processes. Its own classes stay in their places unless the
variable VLMPRUNE says what to prune.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from uuid import uuid4

from ...errors import UnsupportedError
from ..names import FALLBACKS_VARIABLE, PREFIX, UNTESTED_VARIABLE, VARIABLE

TESTED = ("0.32.0",)
# architecture -> class; only families whose answers were measured equal to vlmprune.prune
_HERE = "vlmprune.serving.vllm"
FAMILIES = {
    f"{name}ForConditionalGeneration": f"{_HERE}.{file}:{name}ForConditionalGeneration"
    for name, file in (
        ("Llava", "llava"),
        ("LlavaNext", "llava_next"),
        ("LlavaOnevision", "llava_next"),
        ("InternVL", "internvl"),
        ("Qwen2VL", "qwen_vl"),
        ("Qwen2_5_VL", "qwen_vl"),
        ("Qwen3VL", "qwen3_vl"),
    )
}
# vLLM can run them in its wrapper of transformers, and has a class of its own for some; see layouts.py
WRAPPER = "TransformersMultiModalForCausalLM"
WRAPPED = (
    "AyaVision",
    "Cohere2Vision",
    "DeepseekVL",
    "GotOcr2",
    "Idefics3",
    "Janus",
    "LightOnOcr",
    "Mistral3",
    "VipLlava",
)
FAMILIES |= {f"{name}ForConditionalGeneration": f"{_HERE}.wrapped:{WRAPPER}" for name in WRAPPED}
REFUSED = f"{_HERE}.refused"
RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"  # vLLM's: names of variables that Ray's workers are given


def register() -> None:
    """Tell vLLM of our classes; a wrong VLMPRUNE or an untested release ends the start of the server."""
    from vllm import ModelRegistry

    # the first process names it, those that it starts inherit it; made when there is something to say
    os.environ.setdefault(FALLBACKS_VARIABLE, str(Path(tempfile.gettempdir(), f"vlmprune-{uuid4().hex}")))
    _hand_on()
    for name, path in FAMILIES.items():
        # a path, not a class: vLLM imports it when the model is asked for
        ModelRegistry.register_model(PREFIX + name, path)
    default = os.environ.get(VARIABLE)
    if not default:
        return
    from ..request import read

    check_release()
    # raises for a wrong spec, rather now than at the first request
    read(default)
    for name in multimodal_names():
        # a family that cannot be pruned must not be served whole in silence
        ModelRegistry.register_model(name, FAMILIES.get(name, f"{REFUSED}:{name}"))


def _hand_on() -> None:
    """Let vLLM copy our variables to workers of Ray, which would run its own classes without them."""
    given = [name for name in os.environ.get(RAY_COPIES, "").split(",") if name]
    ours = (VARIABLE, UNTESTED_VARIABLE, FALLBACKS_VARIABLE)
    os.environ[RAY_COPIES] = ",".join(dict.fromkeys([*given, *ours]))


def multimodal_names() -> list[str]:
    """Architectures of this vLLM that see pictures, its wrappers of models of transformers among them."""
    from vllm.model_executor.models import registry

    # name -> (module, class)
    wrapped = {**registry._TRANSFORMERS_BACKEND_MODELS, **registry._TRANSFORMERS_SUPPORTED_MODELS}
    wrappers = [name for name, (_, held) in wrapped.items() if "MultiModal" in held]
    return sorted({*registry._MULTIMODAL_MODELS, *wrappers, *FAMILIES})


def check_release() -> None:
    """Refuse a vLLM that was not tested: its processors change between releases."""
    import vllm

    # 0.32.0+cpu -> 0.32.0
    release = vllm.__version__.split("+")[0]
    if release not in TESTED and not os.environ.get(UNTESTED_VARIABLE):
        raise UnsupportedError(
            f"vLLM {release} was not tested with this vlmprune; tested: {', '.join(TESTED)}. Install one of "
            f"them, or set {UNTESTED_VARIABLE}=1 to try it"
        )


# where it is known why a family is not served; the page docs/serve.md says the same
_LATER = "its tokens see later ones, which vLLM's attention for CPUs, where answers are compared, does not do"
_PLACES = "its tokens have rows and columns (M-RoPE), which are handed on in vLLM's classes for Qwen only"
_TIMM = "its tower is one of timm, with which nothing was measured in vLLM"
_STATES = "its layers keep running states, which vLLM's wrapper of transformers does not"
REASONS = {
    "Emu3": "its tokens are words of a codebook, for which vlmprune has no adapter",
    "Gemma3": _LATER,
    "Gemma3n": _TIMM,
    "Glm4v": _PLACES,
    "Glm4vMoe": _PLACES,
    "Glm46V": _PLACES,
    "Lfm2Vl": _STATES,
    "Ovis2": "the rows of its markers between tiles are made in a forward that vLLM's wrapper does not run",
    "PaliGemma": _LATER,
    "PerceptionLM": _TIMM,
    "SmolVLM": "faults in the attention that is read of its tower are not noticed in vLLM's wrapper; its "
    "processor also needs the package num2words",
}


def refusal(name: str) -> UnsupportedError:
    """Why a family is not served."""
    why = REASONS.get(name.removesuffix("ForConditionalGeneration"))
    return UnsupportedError(
        f"{name} cannot be pruned in vLLM yet{f': {why}' if why else ''}; served are {', '.join(FAMILIES)}. "
        f"Unset {VARIABLE} to serve it whole, or use vlmprune.prune with transformers"
    )
