# SPDX-License-Identifier: Apache-2.0
"""A small factory of adapters, for models of other people that are built as LLaVA is, under other names."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

from ..errors import SpecError
from .base import Adapter, Modality


class DeclaredAdapter(Adapter):
    """What :func:`declare_family` makes children of: parts are where their paths say."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inner = self._part(model, self.within)
        self.language_model = self._part(self.inner, self.text)
        self.vision_tower = self._part(self.inner, self.tower)
        self.projector = self._part(self.inner, self.connector)
        for modality in self.modalities:
            self._part(self.inner, modality.encode)

    def _part(self, owner: Any, path: str) -> Any:
        try:
            return attrgetter(path)(owner) if path else owner
        except AttributeError as error:
            raise SpecError(
                f"the adapter of {self.model_type!r} says {path!r}, but {type(owner).__name__} has no such "
                f"part ({error}); give the path of an attribute, such as 'language_model'"
            ) from error


def declare_family(
    model_type: str,
    *,
    tower: str,
    projector: str,
    language_model: str,
    encode: str = "get_image_features",
    pixels: str = "pixel_values",
    token: str = "image_token_id",
    within: str = "model",
) -> type[Adapter]:
    """An adapter class for a model with one square crop per image and one token per patch.

    Give it to one call, ``prune(model, spec, adapter=...)``, or make it known with ``register_family``. For
    other geometries write a subclass of ``vlmprune.models.Adapter``.

    Args:
        model_type: of the config.
        tower, projector, language_model: paths of the parts below the multimodal model; the projector maps
            single rows.
        encode: method of the multimodal model from pixels to features, one (tokens, width) per image.
        pixels: its first argument, which the forward of the multimodal model takes under the same name.
        token: attribute of the config with the id of the placeholder.
        within: path of the multimodal model below the whole one; its forward calls ``encode`` and hands the
            merged sequence to the language model as ``inputs_embeds``.
    """
    return type(
        "Declared_" + "".join(part for part in model_type if part.isalnum()),
        (DeclaredAdapter,),
        {
            "model_type": model_type,
            "modalities": (Modality("image", encode, pixels, token),),
            "tower": tower,
            "connector": projector,
            "text": language_model,
            "within": within,
        },
    )
