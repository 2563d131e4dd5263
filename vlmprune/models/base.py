# SPDX-License-Identifier: Apache-2.0
"""Adapter: where the parts of a model family are. Subclasses declare; all pruning happens in the core.

Geometry is never re-implemented: captured quantities are pushed as extra channels through the model's own
packing function, with NaN in place of the newline embedding, so that what comes out NaN is not a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.deferred import Checks
from ..core.method import Need, Positions, SlotName, What
from ..core.tokens import patches_first
from ..errors import CaptureError, UnsupportedError
from ..hooks.adapter import Modality, ModalityName
from ..hooks.vision.capture import OF_PROJECTOR, VisionCapture
from ..hooks.vision.pictures import Grids, Picture
from ..hooks.vision.tiles import Tiles
from ..hooks.vision.tower import has_cls
from .shrink import Resolution, TileSizes

IMAGE = Modality("image", "get_image_features", "pixel_values", "image_token_id")
VIDEO = Modality("video", "get_video_features", "pixel_values_videos", "video_token_id")
Part = Any  # a module of transformers: which attributes it has is known to the adapter of its family alone
CLS_FEATURES, TILE_FEATURES, FEATURES = Need("cls_features"), Need("tile_features"), Need("features")
FRAME_VECTORS = Need("frame_vectors")


class Adapter:
    """Base of all: LLaVA-like models with one vision tower, a token-wise projector and a language model."""

    model_type: str = ""
    modalities: tuple[Modality, ...] = (IMAGE,)
    view: ClassVar[str] = "center"  # how the usual processor maps the picture to the model's view
    within: ClassVar[str] = "model"  # path of the multimodal model below the whole one; "" is the whole one
    # attributes of the inner model; the first and the last may be paths
    text: ClassVar[str] = "language_model"
    tower: ClassVar[str] = "vision_tower"
    connector: ClassVar[str] = "multi_modal_projector"
    # model types of the tower
    towers: ClassVar[tuple[str, ...]] = ("clip_vision_model", "siglip_vision_model")
    # what position ids may be after a cut; the first is taken where a method wants another one
    positions: tuple[Positions, ...] = ("compact", "original")
    # type (token_type_ids) of tokens that see earlier ones only, where others see later ones; None: all do
    text_type: ClassVar[int | None] = None
    types: ClassVar[str] = "token_type_ids"
    # keywords of the language model that hold something of every token (B, L, ...) beside its embedding
    aligned: tuple[str, ...] = ()
    # what its layers call that (B, L, ...); without a name, no method can cut between them
    beside: tuple[str, ...] = ()
    # whether every call checks that the sequence holds the features in the order in which they were encoded
    checks_features: bool = False
    numbers_padding: ClassVar[bool] = False  # generate counts padding as positions
    # what reports say of it
    note: str = ""
    # slots where no method can act, and why, as the end of "the language model, ..."
    closed: Mapping[SlotName, str] = {}
    # whether patches can leave inside the tower: plain blocks, and a projector of single patches
    shortens: ClassVar[bool] = False
    pools: ClassVar[tuple[ModalityName, ...]] = ()
    # kinds of pictures between whose tokens text stands in a prompt
    parted: ClassVar[tuple[ModalityName, ...]] = ()
    # kinds of pictures of which the model itself may drop tokens, see ``leaves``
    compresses: ClassVar[tuple[ModalityName, ...]] = ()
    # whether it takes their columns out of a prompt that has the placeholders of all
    takes_columns: ClassVar[bool] = False
    # whether its processor takes the pictures of each text as a list of their own
    nests: ClassVar[bool] = True
    # whether smaller pictures have fewer tiles, each of which has as many tokens as ever
    tiled: ClassVar[bool] = False
    # why smaller pictures have as many tokens, where they do
    one_size: ClassVar[str] = "reads pictures, or tiles of them, at one size"
    # options of its processor under which a picture is one block of tokens, as the frame of a clip must be
    of_frames: ClassVar[Mapping[str, object]] = {}
    # method of the language model that adds features to hidden states after a layer
    deepstack: str | None = None
    # keywords of the language model with columns of pictures, and what its layers add there
    added: tuple[str, str] | None = None

    def __init__(self, model: nn.Module) -> None:
        self._find_parts(model)
        self.projector: Part = self._projector()
        vision = self.config.vision_config
        if vision.model_type not in self.towers:
            raise UnsupportedError(
                f"{self.model_type} with a {vision.model_type!r} vision tower; supported towers are "
                f"{list(self.towers)}"
            )

    def _find_parts(self, model: nn.Module) -> None:
        self.model = model
        self.inner: Part = attrgetter(self.within)(model) if self.within else model
        self.language_model: Part = attrgetter(self.text)(self.inner)
        self.vision_tower: Part = getattr(self.inner, self.tower)

    def _projector(self) -> nn.Module:
        return attrgetter(self.connector)(self.inner)

    @property
    def config(self) -> Any:
        return self.model.config

    @cached_property
    def cls(self) -> bool:
        """Whether the tower has a [CLS] token."""
        return has_cls(self.vision_tower)

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return self.language_model.config.num_hidden_layers

    @property
    def layers(self) -> list[int]:
        """Indices of the hidden states that the model takes its features from."""
        layer = getattr(self.config, "vision_feature_layer", -1)
        return [layer] if isinstance(layer, int) else list(layer)

    @property
    def side(self) -> int:
        """Patches along each side of a crop."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        """A capture for this model's tower and projector."""
        return VisionCapture(self.vision_tower, needs, self.layers, self.read_by)

    @property
    def read_by(self) -> nn.Module:
        """The module whose input is what the projector reads."""
        return self.projector

    def token_id(self, modality: Modality) -> int:
        return getattr(self.config, modality.token)

    # --- what a family may override ---------------------------------------------------------------

    def features(self, modality: Modality, output: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        """(length, D) features of every picture, in order."""
        return feature_list(output)

    def crops(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        """How many crops (tower inputs) each picture has, in order."""
        return [1] * total

    def grid(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """(rows, cols) of patches in every crop of a picture."""
        return self.side, self.side

    def divide(
        self,
        modality: Modality,
        need: Need,
        value: Tensor,
        counts: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        """What was captured of all pictures (T, n, channels) as one (crops, n, channels) per picture.

        What the projector reads may have fewer rows than the tower has patches, so ``need`` says which it is.
        """
        return value.split(list(counts))

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        """(crops, n, channels) -> (length, channels) of a picture by the model's geometry; newlines: NaN."""
        return crops[0]

    def projects_tokens(self, modality: Modality) -> bool:
        """Whether the projector comes after that geometry or in it: what it reads then needs no packing."""
        return False

    def layout(self, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """(across, down) detail crops of a tiled picture."""
        raise UnsupportedError(f"{self.model_type} has no tiles")

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        """Blocks (rows, cols); ``special`` (length,) marks what is no patch, ``grid`` is that of a crop."""
        return tile_grids(special, self.side)

    def resolution(self, processor: Any) -> Resolution | TileSizes:
        """How its processor makes fewer tokens of smaller pictures; refused where it makes as many of all."""
        raise UnsupportedError(
            f"{self.model_type} {self.one_size}, so that they cannot be shrunk to a number of tokens; "
            "compare with 'pool@64'"
        )

    def parts(self, processor: Any, picture: Any) -> int:
        """Pictures that the model makes of a PIL picture: of its tiles, where each is one to it."""
        return 1

    def leaves(
        self, modality: Modality, pictures: Sequence[Picture], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor] | None:
        """What a compression of the model itself leaves of each picture, (length,) bool on the CPU, or None;
        ``arguments`` are those of the whole call.
        """
        return None

    # --- what the core calls ----------------------------------------------------------------------

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        """Refuse encoder calls that the capture would misread."""
        pixels = arguments.get(modality.pixels)
        check_pixels(modality.pixels, pixels, 4, "(images, [crops,] channels, height, width)")
        # a call may ask for another layer than the config does, and the capture was set up by the config
        for name in ("vision_feature_layer", "vision_feature_layers"):  # VipLLaVA: plural in transformers 4
            layer, held = arguments.get(name), getattr(self.config, name, None)
            if layer is not None and layer != held:
                raise UnsupportedError(
                    f"{name}={layer} in the call but {held} in the config; set it there before attaching"
                )

    def pictures(
        self,
        modality: Modality,
        output: Any,
        arguments: Mapping[str, Any],
        found: Mapping[Need, Tensor],
        checks: Checks,
    ) -> list[Picture]:
        """Describe every picture of one encoder call; ``found`` holds (T, n, channels) of its T crops."""
        captured = {need: patches_first(need.what, value) for need, value in found.items()}
        for need, value in captured.items():
            # noted and read later: looking at the answer here would make the host wait for the tower
            checks.finite(value, partial(_not_finite, modality, need))
        features = self.features(modality, output, arguments)
        counts = self.crops(modality, arguments, len(features))
        parts = {
            need: self.divide(modality, need, value, counts, arguments) for need, value in captured.items()
        }
        return [
            self._picture(
                modality,
                number,
                features[number],
                count,
                {need: part[number] for need, part in parts.items()},
                arguments,
            )
            for number, count in enumerate(counts)
        ]

    def _picture(
        self,
        modality: Modality,
        number: int,
        features: Tensor,
        count: int,
        found: dict[Need, Tensor],
        arguments: Mapping[str, Any],
    ) -> Picture:
        """One picture of ``count`` crops; ``found`` holds (count, n, channels) of it."""
        grid = self.grid(modality, number, arguments)
        n = grid[0] * grid[1]
        pack = partial(self._pack_one, modality, number, count, arguments, features.shape[0])
        cls_features, tile_features = found.pop(CLS_FEATURES, None), found.pop(TILE_FEATURES, None)
        frame_vectors = found.pop(FRAME_VECTORS, None)
        captured: dict[Need, Tensor] = {}
        if self.projects_tokens(modality):
            captured = {
                need: found.pop(need).flatten(0, 1) for need in list(found) if need.what in OF_PROJECTOR
            }
        # [CLS] rows may stand in front
        raw = {need: value[:, value.shape[1] - n :] for need, value in found.items()}
        # (length,): the CPU knows where the newlines are
        marks = pack(torch.zeros(count, n, 1))[:, 0].isnan()
        special = marks if bool(marks.any()) else None
        if raw:
            # all quantities go through the model's packing as channels of one tensor, in float32, since it
            # may scale down
            channels = [value.float() for value in raw.values()]
            packed = pack(channels[0] if len(channels) == 1 else torch.cat(channels, dim=-1))  # (length, c)
            if special is not None:
                # indices from the CPU: a mask on the device would make the host wait for its count
                packed = packed[(~special).nonzero()[:, 0].to(packed.device)]
            carried = packed.split([value.shape[-1] for value in raw.values()], dim=-1)
            captured |= {need: value.to(raw[need].dtype) for need, value in zip(raw, carried, strict=True)}
        tiles = None
        if tile_features is not None and count > 1 and modality.name == "image":
            whole = raw | {FEATURES: tile_features[:, -n:]}
            if cls_features is not None:
                whole[CLS_FEATURES] = cls_features
            tiles = Tiles(whole, grid, self.layout(number, arguments))
        for need, value in ((CLS_FEATURES, cls_features), (FRAME_VECTORS, frame_vectors)):
            if value is not None:
                captured[need] = value[:, 0]
        return Picture(
            features,
            self.grids(modality, marks, count, grid),
            captured,
            special,
            crops=partial(_crop_of, pack, special, count, n),
            sources=partial(_sources_of, pack, special, count, n),
            tiles=tiles,
            frames=modality.name == "video",
            view=self.view,
            parted=modality.name in self.parted,
        )

    def _pack_one(
        self,
        modality: Modality,
        number: int,
        count: int,
        arguments: Mapping[str, Any],
        length: int,
        channels: Tensor,
    ) -> Tensor:
        """Pack one picture's channels to ``length`` rows; a [CLS] token that the model reads is NaN too."""
        packed = self.pack(modality, channels, number, arguments)
        # vision_feature_select_strategy="full" hands [CLS] to the language model, in front
        if packed.shape[0] == length - 1 and self.cls and count == 1:
            packed = torch.cat([packed.new_full((1, packed.shape[1]), torch.nan), packed])
        if packed.shape[0] != length:
            raise CaptureError(
                f"picture {number} has {length} tokens but its captured scores pack to {packed.shape[0]}; "
                f"this {self.model_type} lays its tokens out in a way that is not supported"
            )
        return packed


def _not_finite(modality: Modality, need: Need) -> CaptureError:
    return CaptureError(
        f"{modality.pixels} gave {[str(need)]}, not finite; check the pixels, and the tower for overflow"
    )


def check_pixels(name: str, pixels: Any, axes: int, expected: str) -> None:
    """Refuse pixels of the wrong form; None is no pixels."""
    if pixels is None:
        return
    if not isinstance(pixels, Tensor) or pixels.ndim < axes:
        given = (
            f"has shape {tuple(pixels.shape)}"
            if isinstance(pixels, Tensor)
            else f"is a {type(pixels).__name__}"
        )
        raise CaptureError(f"{name} {given}; expected {expected} as processed")
    if pixels.numel() == 0:
        raise CaptureError(
            f"{name} has shape {tuple(pixels.shape)}: an image of size zero; drop it from the batch"
        )


def _crop_of(pack: Callable[[Tensor], Tensor], special: Tensor | None, count: int, n: int) -> Tensor:
    """(N,) crop of every patch: one channel per crop, since down-scaling mixes neighbouring crops."""
    packed = pack(torch.eye(count)[:, None].expand(count, n, count))
    return (packed if special is None else packed[~special]).argmax(dim=-1)


def _sources_of(pack: Callable[[Tensor], Tensor], special: Tensor | None, count: int, n: int) -> Tensor:
    """(N,) the number of every patch among the count * n of its crops, where packing averages none."""
    packed = pack(torch.arange(count * n, dtype=torch.float64).view(count, n, 1))
    return (packed if special is None else packed[~special])[:, 0].round().long()


def tile_grids(special: Tensor, side: int) -> Grids:
    """Blocks of a picture: its base crop, then the unpadded detail image with one newline per row."""
    if special.shape[0] == side * side:  # the patches of one crop, and nothing beside them
        return ((side, side),)
    special = special.cpu()
    # what stands before the first patch, such as [CLS]
    lead = int(special.to(torch.uint8).argmin())
    rest = special[lead + side * side :]
    # a newline ends every row
    rows = int(rest.sum())
    patches = rest.shape[0] - rows
    if patches == 0:
        return ((side, side),)
    if rows == 0 or patches % rows:
        raise CaptureError(
            f"{patches} detail tokens with {rows} newlines do not form rows; this packing is not supported"
        )
    return ((side, side), (rows, patches // rows))


def feature_list(output: Any) -> list[Tensor]:
    """Features per picture from whatever an encoder method returns in this transformers version."""
    pooled = getattr(output, "pooler_output", output)
    if isinstance(pooled, Tensor):
        return list(pooled) if pooled.ndim == 3 else [pooled]
    return list(pooled)
