# SPDX-License-Identifier: Apache-2.0
"""Pictures and units: the visual part of one call, free of any model.

A *picture* is one image or video clip as it stands in the prompt: ``length`` placeholder slots, most of them patches, some
newline or [CLS] embeddings (those are always kept and never counted). A *unit* is what one budget is spent on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InvariantError
from .tokens import VisualTokens


@dataclass(eq=False)
class Tiles:
    """A picture before packing: T raw crops of n = rows * cols patches, base crop first."""

    tensors: dict[str, Tensor]  # (T, n, channels); cls_features (T, 1, C)
    grid: tuple[int, int]  # rows, cols of one crop
    layout: tuple[int, int]  # detail crops: (across, down)


@dataclass(eq=False)
class Picture:
    """One image or clip.

    Args:
        length: placeholder slots in the prompt.
        patches: (N,) ascending slots that are patches.
        grids: rectangular blocks (rows, cols) that the patches form, in order; one per frame for a clip.
        features: (length, D) what the language model is given in the slots.
        tensors: (N, channels) per captured quantity; ``cls_features`` (T, C).
        crops: gives (N,) the crop (tile, frame) of every patch; called only for budgets per crop.
        tiles: raw crops of a tiled picture.
        frames: whether the blocks are frames of a clip.
        view: how boxes lie on the original picture, "stretch" or "center".
    """

    length: int
    patches: Tensor
    features: Tensor
    grids: tuple[tuple[int, int], ...]
    tensors: dict[str, Tensor]
    crops: Callable[[], Tensor]
    tiles: Tiles | None = None
    frames: bool = False
    view: str = "stretch"

    @property
    def count(self) -> int:
        return self.patches.shape[0]

    def __deepcopy__(self, memo: dict) -> Picture:
        return self  # never written to; assisted decoding copies what it rides on, and a copy would drag the model along

    def patch_features(self, index: Tensor | None = None) -> Tensor:
        """(n, D) features of some patches, of all by default; not copied where that is everything in the slots."""
        if self.count == self.length and (index is None or index.shape[0] == self.count):
            return self.features
        slots = self.patches if index is None else self.patches[index.to(self.patches.device)]
        return self.features[slots.to(self.features.device)]


@dataclass(eq=False)
class Unit:
    """Tokens that share one budget: slices of one or (scope "total") several pictures of a sample."""

    members: list[tuple[int, Tensor]]  # picture number, (n,) patch indices in it
    grids: tuple[tuple[int, int], ...]
    ordinal: int
    crop: int | None = None
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = sum(index.shape[0] for _, index in self.members)


def make_units(pictures: Sequence[Picture], samples: Sequence[Sequence[int]], scope: str) -> list[Unit]:
    """Group the patches of all samples (lists of picture numbers) into units."""
    units = []
    for sample in samples:
        if scope == "total":
            if sample:
                members = [(p, torch.arange(pictures[p].count)) for p in sample]
                units.append(Unit(members, tuple(g for p in sample for g in pictures[p].grids), 0))
            continue
        ordinal = 0
        for p in sample:
            for unit in _crop_units(p, pictures[p]) if scope == "crop" else [_whole(p, pictures[p])]:
                unit.ordinal, ordinal = ordinal, ordinal + 1
                units.append(unit)
    return units


def _whole(number: int, picture: Picture) -> Unit:
    return Unit([(number, torch.arange(picture.count))], picture.grids, 0)


def _crop_units(number: int, picture: Picture) -> list[Unit]:
    crops = picture.crops().cpu()
    places = _places(picture.grids)
    units = []
    for crop in crops.unique().tolist():
        index = (crops == crop).nonzero()[:, 0]
        rows, cols = (places[index, axis].unique().shape[0] for axis in (0, 1))
        if rows * cols != index.shape[0]:
            raise InvariantError(
                f"crop {crop} of picture {number} is not a rectangle: {index.shape[0]} tokens in {rows} rows x {cols} columns"
            )
        units.append(Unit([(number, index)], ((rows, cols),), 0, crop))
    return units


def _places(grids: Sequence[tuple[int, int]]) -> Tensor:
    """(N, 2) row and column of every patch inside its block."""
    return torch.cat([torch.cartesian_prod(torch.arange(r), torch.arange(c)).view(-1, 2) for r, c in grids])


def stack_units(
    units: Sequence[Unit], pictures: Sequence[Picture], needs: Sequence[str], projector: Callable[[Tensor], Tensor]
) -> VisualTokens:
    """VisualTokens of units with the same number of tokens, grids and crops; only what is needed is gathered."""
    first = pictures[units[0].members[0][0]]
    found: dict[str, Tensor] = {}
    for name in [name for name in (*first.tensors, "features") if name in needs]:
        rows = [[_slice(pictures[p], name, index, unit.crop) for p, index in unit.members] for unit in units]
        whole = [row[0] if len(row) == 1 else torch.cat(row) for row in rows]
        found[name] = whole[0][None] if len(whole) == 1 else torch.stack(whole)  # one image is not copied
    if "cls_attention" in found:
        found["cls_attention"] = found["cls_attention"].transpose(1, 2)  # (B, N, H) -> (B, H, N)
    if "received_attention" in found:
        found["received_attention"] = found["received_attention"][..., 0]
    ordinal = torch.tensor([unit.ordinal for unit in units], device=first.features.device)
    return VisualTokens(**found, projector=projector, grids=units[0].grids, ordinal=ordinal, size=(len(units), units[0].count))


def _slice(picture: Picture, name: str, index: Tensor, crop: int | None) -> Tensor:
    if name == "features":
        return picture.patch_features(index)
    value = picture.tensors[name]
    if name == "cls_features":
        return value if crop is None else value[crop : crop + 1]
    if index.shape[0] == picture.count:
        return value
    if value.shape[0] != picture.count:  # r encoder patches behind every token
        return value.unflatten(0, (picture.count, -1))[index.to(value.device)].flatten(0, 1)
    return value[index.to(value.device)]
