# SPDX-License-Identifier: Apache-2.0
"""One adapter per model family; ``adapter_for(model)`` finds the right one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import version
from inspect import signature
from operator import attrgetter
from typing import Any, TypeVar

from torch import nn

from ..errors import SpecError, UnsupportedError
from ..lazytable import LazyTable
from .base import Adapter

A = TypeVar("A", bound=type[Adapter])

_ADAPTERS = {
    "llava": ".llava:LlavaAdapter",
    "vipllava": ".llava:VipLlavaAdapter",
    "llava_next": ".llava_next:LlavaNextAdapter",
    "llava_next_video": ".llava_video:LlavaNextVideoAdapter",
    "llava_onevision": ".llava_onevision:LlavaOnevisionAdapter",
    "video_llava": ".llava_video:VideoLlavaAdapter",
    "internvl": ".internvl:InternVLAdapter",
    "qwen2_vl": ".qwen_vl:Qwen2VLAdapter",
    "qwen2_5_vl": ".qwen_vl:Qwen2_5VLAdapter",
    "qwen3_vl": ".qwen_vl:Qwen3VLAdapter",
    "idefics3": ".idefics3:Idefics3Adapter",
    "fast_vlm": ".fast_vlm:FastVlmAdapter",
    "smolvlm": ".idefics3:SmolVLMAdapter",
    "paligemma": ".gemma:PaliGemmaAdapter",
    "gemma3": ".gemma:Gemma3Adapter",
    "qwen3_vl_moe": ".qwen_vl:Qwen3VLMoeAdapter",
    "qwen3_5": ".qwen_vl:Qwen3_5Adapter",
    "qwen3_5_moe": ".qwen_vl:Qwen3_5MoeAdapter",
    "glm4v": ".glm_vl:Glm4vAdapter",
    "glm46v": ".glm_vl:Glm46VAdapter",
    "glm4v_moe": ".glm_vl:Glm4vMoeAdapter",
    "glm_ocr": ".glm_vl:GlmOcrAdapter",
    "mistral3": ".pixtral:Mistral3Adapter",
    "lighton_ocr": ".pixtral:LightOnOcrAdapter",
    "cohere2_vision": ".shuffled:Cohere2VisionAdapter",
    "aya_vision": ".shuffled:AyaVisionAdapter",
    "lfm2_vl": ".shuffled:Lfm2VlAdapter",
    "ovis2": ".ovis2:Ovis2Adapter",
    "glmga": ".glm_vl:GlmgaAdapter",
    "shieldgemma2": ".gemma:ShieldGemma2Adapter",
    "qianfan_ocr": ".internvl:QianfanOcrAdapter",
    "janus": ".llava:JanusAdapter",
    "deepseek_vl": ".llava:DeepseekVLAdapter",
    "qwen2_5_omni_thinker": ".qwen_vl:Qwen2_5OmniThinkerAdapter",
    "qwen3_omni_moe_thinker": ".qwen_vl:Qwen3OmniMoeThinkerAdapter",
    "cosmos3_omni": ".qwen_vl:Cosmos3OmniAdapter",
    "cohere_compass": ".qwen_vl:CohereCompassAdapter",
    "exaone4_5": ".packed:Exaone4_5Adapter",
    "hyperclovax_vision_v2": ".packed:HyperClovaXVisionAdapter",
    "lfm3_vl": ".packed:Lfm3VlAdapter",
    "cosmos3_edge": ".packed:Cosmos3EdgeAdapter",
    "paddleocr_vl": ".packed:PaddleOcrVlAdapter",
    "ernie4_5_vl_moe": ".packed:Ernie4_5VlMoeAdapter",
    "kimi_k25": ".packed:KimiK25Adapter",
    "video_llama_3": ".packed:VideoLlama3Adapter",
    "gemma4": ".gemma4:Gemma4Adapter",
    "aria": ".unread:AriaAdapter",
    "idefics2": ".unread:Idefics2Adapter",
    "minicpmv4_6": ".unread:MiniCpmVAdapter",
    "minicpm_ocr": ".unread:MiniCpmOcrAdapter",
    "got_ocr2": ".unread:GotOcr2Adapter",
    "pp_chart2table": ".unread:PPChart2TableAdapter",
    "perception_lm": ".unread:PerceptionLmAdapter",
    "gemma3n": ".unread:Gemma3nAdapter",
    "molmo2": ".unread:Molmo2Adapter",
    "deepseek_ocr2": ".unread:DeepseekOcr2Adapter",
    "granite4_vision": ".granite:Granite4VisionAdapter",
    "nemotron_h_omni": ".nemotron:NemotronHOmniAdapter",
}
GROUP = "vlmprune.models"
_TABLE: LazyTable[type[Adapter]] = LazyTable(
    "family", _ADAPTERS, UnsupportedError, group=GROUP, package=__name__
)
_REGISTERED: dict[str, type[Adapter]] = {}  # by hand, see register_family
# families that were never tried where generate does not encode pictures by itself, which is before
# transformers 5.20
_RECENT = set(_ADAPTERS) - {"llava", "vipllava", "llava_next", "llava_onevision"}
# types that are known and cannot be cut, and why
_REFUSED = {
    "mllama": "its pictures are read by cross-attention and are no tokens of the sequence",
    "idefics": "its pictures are read by cross-attention and are no tokens of the sequence",
    "evolla": "it reads proteins by cross-attention, and no pictures",
    "florence2": "it is an encoder-decoder, whose pictures go through the encoder",
    "t5gemma2": "it is an encoder-decoder, whose pictures go through the encoder",
    "udop": "it is an encoder-decoder, whose pictures go through the encoder",
    "pix2struct": "it is an encoder-decoder, whose decoder reads pictures by cross-attention",
    "pp_formulanet": "it is an encoder-decoder, whose decoder reads pictures by cross-attention",
    "vision-encoder-decoder": "it is an encoder-decoder, whose decoder reads pictures by cross-attention",
    "blip": "its decoder reads pictures by cross-attention",
    "blip-2": "a Q-former makes a few fixed tokens of a picture, which stand for no places in it",
    "instructblip": "a Q-former makes a few fixed tokens of a picture, which stand for no places in it",
    "instructblipvideo": "a Q-former makes a few fixed tokens of a picture, which stand for no places in it",
    "kosmos-2": "a resampler makes a few fixed tokens of a picture, which stand for no places in it",
    "kosmos-2.5": "a resampler makes a few fixed tokens of a picture, which stand for no places in it",
    "git": "its text model puts pictures in front of the text by itself, without placeholders",
    "fuyu": "it has no vision tower: its decoder reads pixels, merged by code that cannot be watched",
    "diffusion_gemma": "it writes blocks of text by diffusion, and reads its prompt anew in every step",
    "pi0": "it makes actions and no text",
    "mistral4": "it is a language model without a vision tower",
    "llama4": "transformers 5.24 cannot run it: its forward ends by reading a field that the output of its "
    "decoder has not",
}
# types of checkpoints that only their authors' code reads, each with one that was converted
_CONVERTED = {
    "internvl_chat": "OpenGVLab/InternVL3-1B-hf",
    "llava_llama": "llava-hf/llava-1.5-7b-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}
_INSTEAD = (
    "Run it dense, or choose among tokens of your own with vlmprune.select, which needs no model: divprune "
    "reads their features, fastervlm the attention of [CLS]"
)


def families() -> list[str]:
    """Model types (as in HF configs) that have an adapter."""
    return sorted({*_TABLE.names(), *_REGISTERED})


def register_family(model_type: str) -> Callable[[A], A]:
    """Class decorator that makes an adapter known for models of this type, as in their config.

    A package does the same with an entry point of the group ``vlmprune.models``.
    """
    if not isinstance(model_type, str) or not model_type:
        raise SpecError(
            f"register_family got {model_type!r}; expected the model_type of a config: "
            "@register_family('my_vlm')"
        )

    def decorate(cls: A) -> A:
        check_adapter(cls)
        known = _REGISTERED.get(model_type)
        if known is None and model_type in _TABLE and model_type not in _ADAPTERS:
            known = check_adapter(_TABLE.load(model_type))  # a package offers it
        again = known is not None and (known.__module__, known.__qualname__) == (
            cls.__module__,
            cls.__qualname__,
        )
        if model_type in _ADAPTERS or (known is not None and not again):
            raise SpecError(
                f"model type {model_type!r} has an adapter already; give yours to one call, as in "
                "prune(model, spec, adapter=...)"
            )
        cls.model_type = model_type
        _REGISTERED[model_type] = cls
        return cls

    return decorate


def check_adapter(cls: object) -> type[Adapter]:
    """The class, if it is one of adapters."""
    if isinstance(cls, type) and issubclass(cls, Adapter):
        return cls
    raise SpecError(f"adapter={cls!r}; expected a subclass of vlmprune.models.Adapter, or an object of one")


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile and PEFT: that is where ``generate`` runs."""
    inside: Any = model
    # either may be inside the other
    while True:
        if hasattr(inside, "_orig_mod"):
            inside = inside._orig_mod
        elif hasattr(inside, "get_base_model"):
            inside = inside.get_base_model()
        else:
            found: nn.Module = inside
            return found


def check_family(model_type: str | None, config: Mapping[str, Any] | None = None) -> str:
    """The model type, if its models may be pruned; ``config`` is the content of a config.json.

    A model type is a fact and no word that a user types, so none is suggested in place of it.
    """
    config = config or {}
    # the authors' own format has the model type of the converted one, but names a class and no vision_config
    authors = (
        model_type in _ADAPTERS and bool(config.get("architectures")) and not config.get("vision_config")
    )
    if model_type is not None and not authors:
        if model_type in _ADAPTERS or model_type in _TABLE or model_type in _REGISTERED:
            return model_type
        if model_type not in _REFUSED and model_type in structural_types():
            return model_type
    why = f": {_REFUSED[model_type]}" if model_type in _REFUSED else ""
    if model_type in _CONVERTED or authors:
        example = _CONVERTED.get(model_type or "", _CONVERTED["llava_llama"])
        why = (
            " in the format of its authors' code; give a converted checkpoint, whose name ends in -hf, such "
            f"as {example}"
        )
    elif config.get("auto_map"):
        why = ", and the code that comes with it was not run"
    raise UnsupportedError(
        f"model type {model_type!r} is not supported{why}; families with an adapter: {families()}. {_INSTEAD}"
    )


def structural_types() -> list[str]:
    """Types of transformers that read pictures and have no adapter: parts are looked for by structure."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    known = {*families(), *_REFUSED}
    return sorted(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in known)


def adapter_for(model: Any, adapter: type[Adapter] | Adapter | None = None) -> Adapter:
    """The adapter of a model, wrappers of PEFT and torch.compile taken off; an error for all others.

    Args:
        model: a loaded model.
        adapter: an adapter of yours, as a class or as an object, in place of the one that would be found.
    """
    if not isinstance(model, nn.Module):
        # a pipeline or a trainer holds one
        held = isinstance(getattr(model, "model", None), nn.Module)
        todo = "give the model in it, its .model" if held else "load it first with from_pretrained"
        raise UnsupportedError(f"expected a loaded transformers model, got {type(model).__name__}; {todo}")
    if isinstance(model, nn.DataParallel):
        raise UnsupportedError(
            "nn.DataParallel copies the model, hooks stay with the original; use one process per device "
            "instead"
        )
    model = unwrap(model)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    # DistributedDataParallel and its like
    if config is None and isinstance(getattr(model, "module", None), nn.Module):
        raise UnsupportedError(
            f"{type(model).__name__} wraps a model; give the one inside, its .module, or wrap it later"
        )
    if adapter is not None:
        return _given(model, adapter)
    if model_type in _REFUSED:
        check_family(model_type)
    named = model_type in _REGISTERED or model_type in _TABLE.offers.points
    if getattr(config, "vision_config", None) is None and not named:
        raise UnsupportedError(
            f"{type(model).__name__} (model type {model_type!r}) has no vision tower in its config; families "
            f"with an adapter: {families()}"
        )
    known = check_family(model_type)
    found = _class_of(known)
    if known in _ADAPTERS and not (hasattr(model, "generate") and _has_decoder(model, found)):
        raise UnsupportedError(
            f"{type(model).__name__} is a part of a {model_type} model; attach to the whole "
            "...ForConditionalGeneration"
        )
    # mypy takes the __hash__ of its objects for that of the class
    if known in _ADAPTERS and too_old(known, type(model)):  # type: ignore[arg-type]
        here = version("transformers")
        raise UnsupportedError(f"{model_type} needs a newer transformers than {here}; install the newest")
    return found(model)


def _has_decoder(model: nn.Module, adapter: type[Adapter]) -> bool:
    """Whether the decoder stands where it does in the whole model of a family."""
    try:
        attrgetter(f"{adapter.within}.{adapter.text}".lstrip("."))(model)
    except AttributeError:
        return False
    return True


def adapter_class(model_type: str) -> type[Adapter]:
    """The adapter of a family that may be pruned, before any model of it is loaded."""
    return _class_of(check_family(model_type))


def _class_of(known: str) -> type[Adapter]:
    """The adapter of a family that was checked."""
    if known in _REGISTERED:
        return _REGISTERED[known]
    if known in _ADAPTERS or known in _TABLE:
        return check_adapter(_TABLE.load(known))
    from .structural import StructuralAdapter

    return StructuralAdapter


def reads_any_size(model_type: str) -> bool:
    """Whether ``downsample`` can make any number of tokens of a picture, as smaller tiles cannot."""
    family = adapter_class(model_type)
    return family.resolution is not Adapter.resolution and not family.tiled


def _given(model: nn.Module, adapter: type[Adapter] | Adapter) -> Adapter:
    """An adapter that was given for this model."""
    if not isinstance(adapter, Adapter):
        return check_adapter(adapter)(model)
    if adapter.model is not model:
        raise SpecError(
            f"adapter={type(adapter).__name__} was made of another model; give the class, or "
            f"{type(adapter).__name__}(model)"
        )
    return adapter


@lru_cache  # reading a signature takes as long as all else that is looked up here
def too_old(model_type: str, model_class: type[nn.Module]) -> bool:
    """Whether the class of a model is of a transformers version that its family was not tried with."""
    known = signature(model_class.forward).parameters
    # Video-LLaVA has called its pixels so since transformers 5.23
    return model_type in _RECENT and not {"mm_encoder_outputs", "pixel_values"} <= set(known)
