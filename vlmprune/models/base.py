# SPDX-License-Identifier: Apache-2.0
"""Adapter: where the parts of a model family are. Subclasses are declarations; all pruning happens in the core.

Geometry is never re-implemented: captured quantities are pushed as extra channels through the model's own packing
function, with NaN in place of the newline embedding, so that what comes out NaN is not a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.capture import VisionCapture, has_cls
from ..core.pictures import Picture, Tiles
from ..errors import CaptureError, UnsupportedError

TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Modality:
    """One kind of visual input."""

    name: str  # key in pre-encoded outputs: "image" or "video"
    encode: str  # method of the inner model that turns pixels into features
    pixels: str  # its first argument
    token: str  # config attribute with the placeholder id


class Adapter:
    """Base of all adapters: LLaVA-like models with one vision tower, a token-wise projector and a language model."""

    model_type: ClassVar[str] = ""
    modalities: ClassVar[tuple[Modality, ...]] = (Modality("image", "get_image_features", "pixel_values", "image_token_id"),)
    view: ClassVar[str] = "center"  # how the usual processor maps the picture to the model's view

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inner: nn.Module = model.model
        self.language_model: nn.Module = self.inner.language_model
        self.vision_tower: nn.Module = self.inner.vision_tower
        self.projector: nn.Module = self.inner.multi_modal_projector
        vision = model.config.vision_config
        if vision.model_type not in TOWERS:
            raise UnsupportedError(
                f"{self.model_type} with a {vision.model_type!r} vision tower; supported towers are {list(TOWERS)}"
            )
        self.side = vision.image_size // vision.patch_size
        self.cls = has_cls(self.vision_tower)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def layers(self) -> list[int]:
        """Indices of the hidden states that the model takes its features from."""
        layer = self.config.vision_feature_layer
        return [layer] if isinstance(layer, int) else list(layer)

    def capture(self, needs: Sequence[str], layer: int | None) -> VisionCapture:
        """A capture for this model's tower and projector."""
        return VisionCapture(self.vision_tower, needs, self.layers, layer, self.projector)

    def token_id(self, modality: Modality) -> int:
        return getattr(self.config, modality.token)

    # what a family may override -------------------------------------------------------------------------------------

    def crops(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        """How many crops (tower inputs) each picture has, in order; they sum to ``total``."""
        return [1] * total

    def pack(
        self, modality: Modality, crops: Sequence[Tensor], numbers: Sequence[int], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        """Per picture (crops, n, channels) -> (length, channels) through the model's own geometry, NaN for newlines.

        ``numbers`` are the positions of the pictures in the call, to look up their sizes.
        """
        return [picture[0] for picture in crops]

    def layout(self, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """(across, down) detail crops of a tiled picture."""
        raise UnsupportedError(f"{self.model_type} has no tiles")

    def grids(self, modality: Modality, special: Tensor, crops: int) -> tuple[tuple[int, int], ...]:
        """Rectangular blocks of the patches; ``special`` (length,) marks slots that are not patches."""
        return tile_grids(special, self.side)

    # what the core calls --------------------------------------------------------------------------------------------

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        """Refuse encoder calls that the capture would misread."""
        pixels = arguments.get(modality.pixels)
        if pixels is not None and (not isinstance(pixels, Tensor) or pixels.ndim < 4):
            given = f"has shape {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else f"is a {type(pixels).__name__}"
            raise CaptureError(f"{modality.pixels} {given}; expected (images, [crops,] channels, height, width) as processed")
        if pixels is not None and pixels.numel() == 0:
            raise CaptureError(
                f"{modality.pixels} has shape {tuple(pixels.shape)}: an image of size zero; drop it from the batch"
            )
        for name in ("vision_feature_layer", "vision_feature_layers"):  # VipLLaVA has the plural before transformers 5
            layer, held = arguments.get(name), getattr(self.config, name, None)
            if layer is not None and layer != held:
                raise UnsupportedError(f"{name}={layer} in the call but {held} in the config; set it there before attaching")

    def pictures(
        self, modality: Modality, output: Any, arguments: Mapping[str, Any], found: Mapping[str, Tensor]
    ) -> list[Picture]:
        """Describe every picture of one encoder call; ``found`` holds captured tensors (crops, n, channels)."""
        features = feature_list(output)
        found = dict(found)
        cls_features = found.pop("cls_features", None)  # (T, 1, C)
        tile_features = found.pop("tile_features", None)  # (T, n, D)
        if "cls_attention" in found:
            found["cls_attention"] = found["cls_attention"].transpose(1, 2)  # (T, n, H)
        if "received_attention" in found:
            found["received_attention"] = found["received_attention"][..., None]
        n = self.side * self.side
        extra = {}  # quantities read at the projector may still have their [CLS] row
        for name, value in found.items():
            extra[name] = value[:, value.shape[1] - n :]
        counts = self.crops(modality, arguments, len(features))
        channels = torch.cat([value.float() for value in extra.values()], dim=-1) if extra else None
        if channels is not None and not bool(channels.isfinite().all()):  # NaN would be taken for a newline below
            bad = sorted(name for name, value in extra.items() if not bool(value.isfinite().all()))
            raise CaptureError(f"{modality.pixels} gave {bad}, not finite; check the pixels, and the tower for overflow")
        pictures = []
        starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        for number, (start, count) in enumerate(zip(starts, counts, strict=False)):
            pick = slice(start, start + count)
            pack = partial(self._pack_one, modality, number, count, arguments, features[number])
            packed = pack(torch.zeros(count, n, 1) if channels is None else channels[pick])  # (length, channels)
            special = packed[:, 0].isnan()
            patches = (~special).nonzero()[:, 0]
            tensors = {}
            widths = [value.shape[-1] for value in extra.values()]
            if channels is not None:
                for name, value in zip(extra, packed[patches].split(widths, dim=-1), strict=True):
                    tensors[name] = value.to(extra[name].dtype)
            if cls_features is not None:
                tensors["cls_features"] = cls_features[pick, 0]
            tiles = None
            if tile_features is not None and count > 1 and modality.name == "image":
                raw = {name: value[pick] for name, value in extra.items()}
                raw["features"] = tile_features[pick][:, -n:]
                if cls_features is not None:
                    raw["cls_features"] = cls_features[pick]
                tiles = Tiles(raw, (self.side, self.side), self.layout(number, arguments))
            grids = self.grids(modality, special, count)
            pictures.append(
                Picture(
                    length=features[number].shape[0],
                    patches=patches,
                    features=features[number],
                    grids=grids,
                    tensors=tensors,
                    crops=partial(_crop_of, pack, patches, count, n),
                    tiles=tiles,
                    frames=modality.name == "video",
                    view=self.view,
                )
            )
        return pictures

    def _pack_one(
        self, modality: Modality, number: int, count: int, arguments: Mapping[str, Any], features: Tensor, channels: Tensor
    ) -> Tensor:
        """Pack one picture's channels and check them against its features; a [CLS] token that the model reads is NaN too."""
        packed = self.pack(modality, [channels], [number], arguments)[0]
        if packed.shape[0] == features.shape[0] - 1 and self.cls and count == 1:
            packed = torch.cat([packed.new_full((1, packed.shape[1]), torch.nan), packed])
        if packed.shape[0] != features.shape[0]:
            raise CaptureError(
                f"picture {number} has {features.shape[0]} tokens but its captured scores pack to {packed.shape[0]}; "
                f"this {self.model_type} lays its tokens out in a way that is not supported"
            )
        return packed


def _crop_of(pack: Callable[[Tensor], Tensor], patches: Tensor, count: int, n: int) -> Tensor:
    """(N,) crop of every patch: one channel per crop, since down-scaling mixes neighbouring crops."""
    one_hot = torch.eye(count)[:, None].expand(count, n, count)
    return pack(one_hot)[patches.cpu()].argmax(dim=-1)


def tile_grids(special: Tensor, side: int) -> tuple[tuple[int, int], ...]:
    """Blocks of a picture: its base crop, then the unpadded detail image with one newline per row."""
    special = special.cpu()
    lead = int(special.to(torch.uint8).argmin())
    rest = special[lead + side * side :]
    rows = int(rest.sum())
    patches = rest.shape[0] - rows
    if patches == 0:
        return ((side, side),)
    if rows == 0 or patches % rows:
        raise CaptureError(f"{patches} detail tokens with {rows} newlines do not form rows; this packing is not supported")
    return ((side, side), (rows, patches // rows))


def feature_list(output: Any) -> list[Tensor]:
    """Features per picture from whatever an encoder method returns in this transformers version."""
    pooled = getattr(output, "pooler_output", output)
    if isinstance(pooled, Tensor):
        return list(pooled) if pooled.ndim == 3 else [pooled]
    return list(pooled)
