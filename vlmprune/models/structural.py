# SPDX-License-Identifier: Apache-2.0
"""An adapter for families that nobody declared: parts are found by structure, and facts are checked in use.

The structure is that of most models of transformers: a multimodal model whose ``get_image_features`` gives
the features of every picture, and a decoder that reads them in the places of placeholder tokens. Nothing is
known of the tower, so that methods that read it are refused. That the sequence holds the features in the
order in which they were encoded is checked in every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..core.deferred import Checks
from ..core.method import Need
from ..errors import CaptureError, UnsupportedError
from ..hooks.vision.pictures import Picture
from .base import Adapter, Modality, feature_list
from .refusals import closed_by_sharing
from .unread import UnreadAdapter

_TEXTS = ("language_model", "text_model")
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder")
_TOKENS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
}
# kinds of decoder layers whose caches and masks are known to be right after a cut
_KINDS = {"full_attention", "sliding_attention", "linear_attention", "conv"}
# something of every token beside its embedding, by the names that models of transformers give it
_ALIGNED = ("per_layer_inputs", "moe_mm_token_type_ids", "ple_input_ids")


class StructuralAdapter(UnreadAdapter):
    """Any model of the structure above."""

    unread = "has no adapter of its own"
    checks_features = True
    note = "no adapter of its own: parts were found by structure"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inner = getattr(model, "model", None)
        self.model_type = self.config.model_type
        text = next((name for name in _TEXTS if hasattr(getattr(self.inner, name, None), "layers")), None)
        if text is None:
            raise self._unlike("no decoder with layers below .model, as language_model or text_model")
        self.language_model = getattr(self.inner, text)
        self.modalities = tuple(self._modalities())
        towers = [getattr(self.inner, name) for name in _TOWERS if hasattr(self.inner, name)]
        self.vision_tower = next((tower for tower in towers if tower is not None), self.inner)
        self.projector = None
        self.cls = False
        known = signature(type(self.language_model).forward).parameters
        self.aligned = tuple(name for name in _ALIGNED if name in known)
        self.deepstack = "_deepstack_process" if hasattr(self.language_model, "_deepstack_process") else None
        self.closed = closed_by_sharing(self.language_model.config)
        self._refuse_decoder()
        self.positions = ("original",) if self._has_places() else Adapter.positions

    def _has_places(self) -> bool:
        """Whether tokens have 2-D positions (M-RoPE)."""
        config = self.language_model.config
        rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        finds = any(hasattr(part, "get_rope_index") for part in (self.inner, self.model))
        return finds or "mrope" in str(rotary)

    def _unlike(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"model type {self.model_type!r} has no adapter, and its structure is none that can be pruned: "
            f"{why}; run it dense, give an adapter of your own (prune(model, spec, adapter=...)), or choose "
            "among tokens of your own with vlmprune.select"
        )

    def _modalities(self) -> list[Modality]:
        found = []
        forward = signature(type(self.inner).forward).parameters
        if "mm_encoder_outputs" not in forward:
            raise self._unlike("its forward takes no mm_encoder_outputs, features that were encoded before")
        for name, encode in (("image", "get_image_features"), ("video", "get_video_features")):
            method = getattr(type(self.inner), encode, None)
            token = next((t for t in _TOKENS[name] if getattr(self.config, t, None) is not None), None)
            if method is None or token is None:
                continue
            pixels = list(signature(method).parameters)[1]
            if pixels in forward:
                found.append(Modality(name, encode, pixels, token))  # type: ignore[arg-type]
        if not any(modality.name == "image" for modality in found):
            raise self._unlike("no get_image_features below .model, or no image_token_id in the config")
        return found

    def _refuse_decoder(self) -> None:
        config = self.language_model.config
        kinds = set(getattr(config, "layer_types", None) or ())
        if kinds - _KINDS:
            raise self._unlike(f"nothing is known of cuts before layers of kind {sorted(kinds - _KINDS)}")
        sparse = [name for name in vars(config) if name.startswith(("index_", "indexer_", "sparse_"))]
        if any(getattr(config, name) for name in sparse):
            raise self._unlike(f"its decoder chooses keys by an index ({sparse[0]}), which a cut would shift")
        known = signature(type(self.language_model).forward).parameters
        adds = getattr(type(self.language_model), self.deepstack or "", None)
        usual = adds is not None and len(signature(adds).parameters) == 4  # self, hidden, columns, features
        if ("visual_pos_masks" in known or self.deepstack) and not usual:
            raise self._unlike("features are added to hidden states (DeepStack) in a way that is not known")
        if hasattr(type(self.model), "create_masks_for_generate"):
            raise self._unlike("it makes masks before its decoder, by a rule that is not known")

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        """Nothing is captured, so nothing can be misread."""

    def pictures(
        self,
        modality: Modality,
        output: Any,
        arguments: Mapping[str, Any],
        found: Mapping[Need, Tensor],
        checks: Checks,
    ) -> list[Picture]:
        features = feature_list(output)
        if any(not isinstance(one, Tensor) or one.ndim != 2 for one in features):
            raise CaptureError(
                f"{modality.encode} of {self.model_type!r} gave no features (tokens, width) of every "
                "picture in its pooler_output; give an adapter of your own: prune(model, spec, adapter=...)"
            )
        pixels = arguments.get(modality.pixels)
        rows, many = pixels.shape[:2] if isinstance(pixels, Tensor) and pixels.ndim == 5 else (0, 0)
        if many > 1 and len(features) == rows:  # pictures of a row, or tiles of a picture: nobody can tell
            raise UnsupportedError(
                f"{modality.encode} of {self.model_type!r} was given {many} pictures in each of {rows} "
                "rows and gave the features of a row as one, so that no budget can be spent on each; give an "
                "adapter of your own: prune(model, spec, adapter=...)"
            )
        # which rows and columns they form is not known, nor what stands between them
        return [Picture(one, (), parted=True) for one in features]
