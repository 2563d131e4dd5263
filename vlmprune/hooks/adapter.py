# SPDX-License-Identifier: Apache-2.0
"""What hooks must know of a model; ``vlmprune.models`` has one adapter per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from ..core.deferred import Checks
from ..core.method import Need, Positions, SlotName, What
from .vision.capture import VisionCapture
from .vision.pictures import Picture

ModalityName = Literal["image", "video"]


@dataclass(frozen=True)
class Modality:
    """One kind of visual input.

    Args:
        name: its key in pre-encoded outputs.
        encode: method of the inner model that turns pixels into features.
        pixels: the first argument of that method.
        token: attribute of the config with the id of the placeholder.
    """

    name: ModalityName
    encode: str
    pixels: str
    token: str


class Adapter(Protocol):
    """A model of one family.

    Attributes:
        model_type: of the config.
        modalities: what it reads.
        positions: what position ids may be after a cut; the first is taken where a method wants another one.
        text_type: type (token_type_ids) of tokens that see earlier ones only, where others see later ones
            too; None where all are like that.
        types: keyword of the multimodal model that holds these types.
        aligned: keywords of the language model that hold something of every token beside its embedding.
        beside: what its layers call that, where cuts between layers can follow it.
        compresses: kinds of pictures of which the model itself may drop tokens before its language model.
        takes_columns: whether it takes their columns out of a prompt with the placeholders of all of them.
        checks_features: check in every call that the sequence holds the features in the order in which they
            were encoded, where nobody declared that it does.
        numbers_padding: whether ``generate`` of this family counts padding as positions.
        note: what every report says of it.
        closed: slots inside the language model where no method can act, and why.
        deepstack: method of the language model that adds features to hidden states after a layer.
        added: keywords of the language model where its layers add features by themselves: the columns of
            pictures (B, L, 1), and for every such layer what it adds there (V, D).
        shortens: whether patches can leave inside the tower: a tower of plain blocks over (crops, patches,
            width), and a projector of single patches.
        pools: what has its patches averaged in front of the projector.
        layers: indices of the hidden states that features are taken from.
        model: the whole ``...ForConditionalGeneration``.
        inner: the multimodal model in it, which encodes pictures and merges them into the text.
        vision_tower: the encoder in it.
        language_model: the decoder.
        projector: maps rows of the tower to rows of the language model, where that is a function of single
            rows.
        depth: decoder layers.
    """

    model_type: str
    positions: tuple[Positions, ...]
    text_type: ClassVar[int | None]
    types: ClassVar[str]
    aligned: tuple[str, ...]
    beside: tuple[str, ...]
    compresses: ClassVar[tuple[ModalityName, ...]]
    takes_columns: ClassVar[bool]
    checks_features: bool
    numbers_padding: ClassVar[bool]
    note: str
    closed: Mapping[SlotName, str]
    deepstack: str | None
    added: tuple[str, str] | None
    shortens: ClassVar[bool]
    pools: ClassVar[tuple[ModalityName, ...]]
    # modules of transformers, whose attributes are known to the adapter of their family alone
    model: Any
    inner: Any
    vision_tower: Any
    language_model: Any

    @property
    def modalities(self) -> tuple[Modality, ...]: ...

    @property
    def projector(self) -> Callable[[Tensor], Tensor] | None: ...

    @property
    def config(self) -> Any: ...

    @property
    def depth(self) -> int: ...

    @property
    def layers(self) -> Sequence[int]: ...

    def token_id(self, modality: Modality) -> int:
        """Id of the placeholder tokens."""

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        """A capture of this model's tower and projector."""

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        """Refuse encoder calls that the capture would misread."""

    def crops(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        """Crops, or frames, of each of ``total`` pictures of an encoder call."""

    def pictures(
        self,
        modality: Modality,
        output: Any,
        arguments: Mapping[str, Any],
        found: Mapping[Need, Tensor],
        checks: Checks,
    ) -> list[Picture]:
        """Describe every picture of one encoder call."""

    def leaves(
        self, modality: Modality, pictures: Sequence[Picture], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor] | None:
        """What the model itself leaves of pictures before its language model, from what it was called with:
        (length,) bool each, on the CPU. None: all.
        """
