# SPDX-License-Identifier: Apache-2.0
"""Pictures and units: the visual part of one forward, free of any model.

A *picture* is one image or video clip as it stands in the prompt: ``length`` placeholder slots, most of them
patches, some newline or [CLS] embeddings (those are always kept and never counted). A *unit* is what one
budget is spent on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ...core.deferred import NOW, Checks
from ...core.method import Need
from ...core.tokens import VisualTokens
from ...errors import InvariantError, UnsupportedError
from .tiles import Tiles

Grids = tuple[tuple[int, int], ...]
CLS_FEATURES, FRAME_VECTORS = Need("cls_features"), Need("frame_vectors")


@dataclass(eq=False)
class Picture:
    """One image or clip.

    Args:
        features: (length, D) what the language model is given in the slots.
        grids: rectangular blocks (rows, cols) that the patches form, in order; one per frame for a clip.
        captured: per need, patches before channels: (N, channels); cls_features and frame_vectors (T, C);
            text_embeds (R, D).
        special: (length,) bool on the CPU, slots that are no patches; None where all are.
        crops: gives (N,) the crop (tile, frame) of every patch; called only for budgets per crop.
        tiles: the raw crops of a tiled picture, where a method asked for them.
        frames: whether the blocks are frames of a clip.
        view: how boxes lie on the original picture, "stretch" or "center".
        sources: gives (N,) the number of every patch among those of its crops as the tower has them.
        joins: gives (N,) what patches became part of inside the tower, where some were averaged there.
        parted: text stands between its tokens in a prompt, such as the mark behind each row of Pixtral.
        left: (N,) ascending, on the CPU: the patches that a compression of the model itself left, of all that
            were encoded; None where it has none, or left all.
        encoded: the blocks of all that were encoded, which ``left`` counts in; () without ``left``.

    Attributes:
        length: placeholder slots in the prompt.
        count: N, patches among them.
        encoded_count: the same before the model itself dropped any.
        cls_count: crops with a [CLS] row of their own, where a method asked for these rows; else 1.
        word_counts: R of every text that it is asked about, where a method reads text.
    """

    features: Tensor
    grids: Grids
    captured: Mapping[Need, Tensor] = field(default_factory=dict)
    special: Tensor | None = None
    crops: Callable[[], Tensor] | None = None
    tiles: Tiles | None = None
    frames: bool = False
    view: str = "stretch"
    sources: Callable[[], Tensor] | None = None
    joins: Callable[[], Tensor] | None = None
    parted: bool = False
    left: Tensor | None = None
    encoded: Grids = ()

    length: int = field(init=False)
    count: int = field(init=False)
    encoded_count: int = field(init=False)
    cls_count: int = field(init=False)
    word_counts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.length = self.features.shape[0]
        self.count = self.length if self.special is None else self.length - int(self.special.sum())
        self.encoded_count = self.count
        if self.left is not None:
            self.encoded_count = sum([rows * cols for rows, cols in self.encoded])
        rows = self.captured.get(CLS_FEATURES)
        self.cls_count = 1 if rows is None else rows.shape[0]
        self.word_counts = tuple(
            [text.shape[0] for need, text in self.captured.items() if need.what == "text_embeds"]
        )

    @cached_property
    def patches(self) -> Tensor:
        """(N,) ascending slots that are patches, on the CPU."""
        if self.special is None:
            return torch.arange(self.length)
        return (~self.special).nonzero()[:, 0]

    @cached_property
    def specials(self) -> Tensor:
        """(length - N,) ascending slots that are none, on the CPU."""
        return torch.empty(0, dtype=torch.int64) if self.special is None else self.special.nonzero()[:, 0]

    @property
    def unbroken(self) -> bool:
        """Whether nothing stands between its patches, so that rows that stand for them may have any order."""
        return self.special is None and not self.parted

    def slots_of(self, index: Tensor) -> Tensor:
        """(...) slots of patches, on the device of ``index``."""
        return index if self.special is None else self.patches.to(index.device)[index]

    def patch_features(self, index: Tensor | None = None) -> Tensor:
        """(n, D) features of some patches, of all by default, without a copy where possible."""
        if index is None:
            return (
                self.features
                if self.special is None
                else self.features[self.patches.to(self.features.device)]
            )
        return self.features[self.slots_of(index.to(self.features.device))]

    def __deepcopy__(self, memo: dict) -> Picture:
        return self  # never written to; assisted decoding copies the output that holds it, and the model


def compressed(picture: Picture, stays: Tensor) -> Picture:
    """What a compression of the model itself leaves of a picture, ``stays`` (length,) bool on the CPU.

    What is left has places in the picture, but forms no rows, so that it has no blocks.
    """
    if bool(stays.all()):
        return picture
    if picture.special is not None:
        raise InvariantError(
            f"the model itself drops {int((~stays).sum())} tokens of a picture that has separators between "
            "them; expected patches only"
        )
    left = stays.nonzero()[:, 0]  # (N,)
    captured = {need: _slice(picture, need, left, None) for need in picture.captured}
    features = picture.patch_features(left)
    return Picture(
        features,
        (),
        captured,
        frames=picture.frames,
        view=picture.view,
        parted=picture.parted,
        left=left,
        encoded=picture.grids,
    )


def with_joins(
    pictures: Sequence[Picture], counts: Sequence[int], hosts: Callable[[int, int], Tensor]
) -> list[Picture]:
    """Pictures of so many crops each, whose patches were averaged inside the tower, see ``Record.hosts``."""
    found, start = [], 0
    for picture, count in zip(pictures, counts, strict=True):
        sources = picture.sources
        ask = None if sources is None else partial(_joins_of, sources, partial(hosts, start, start + count))
        found.append(replace(picture, joins=ask))
        start += count
    return found


def _joins_of(sources: Callable[[], Tensor], hosts: Callable[[], Tensor]) -> Tensor:
    """(N,) ``KeepMap.joins`` of a picture, on the CPU."""
    raw, into = sources(), hosts().cpu()  # (N,), (crops, n)
    crops, n = into.shape
    first = n * torch.arange(crops)[:, None]
    flat = torch.where(into < 0, -1, into + first).flatten()
    # a patch that was cut off with the padding of a tile takes what is part of it along
    place = torch.full((crops * n + 1,), -1)
    place[raw] = torch.arange(len(raw))
    return place[flat[raw]]


@dataclass(eq=False)
class Unit:
    """Tokens that share one budget: slices of one or (scope "total") several pictures of a sample.

    Args:
        members: picture number, and (n,) patch indices in it, None for all of them.
        count: tokens of all members.
        ordinal: number of the unit in its sample, so that seeds differ between images.
        crop: the crop that it is, where the budget is per crop.
        frames: its members are images that the user calls frames of one clip.
    """

    members: list[tuple[int, Tensor | None]]
    grids: Grids
    count: int
    ordinal: int = 0
    crop: int | None = None
    frames: bool = False


def make_units(pictures: Sequence[Picture], samples: Sequence[Sequence[int]], scope: str) -> list[Unit]:
    """Group the patches of all samples (lists of picture numbers) into units.

    Args:
        scope: of a budget, or "clip": the images of a sample are frames of one clip and share the budget.
    """
    units = []
    for sample in samples:
        if scope in ("total", "clip"):
            if scope == "clip":
                _check_frames([pictures[p] for p in sample])
            # of a prompt without pictures there is nothing to spend a budget on
            if sample:
                grids = tuple(grid for p in sample for grid in pictures[p].grids)
                count = sum(pictures[p].count for p in sample)
                units.append(Unit([(p, None) for p in sample], grids, count, frames=scope == "clip"))
            continue
        if scope == "crop":
            own = [unit for p in sample for unit in _crops_of(p, pictures[p])]
        else:
            own = [Unit([(p, None)], pictures[p].grids, pictures[p].count) for p in sample]
        for ordinal, unit in enumerate(own):
            unit.ordinal = ordinal
        units += own
    return units


def _check_frames(sample: Sequence[Picture]) -> None:
    """Refuse what cannot be a frame of a clip that was given as images."""
    for number, picture in enumerate(sample):
        if picture.frames:
            raise UnsupportedError(
                "frames=True says that the images of a prompt are frames of one clip, but the prompt holds a "
                "clip already; leave frames out"
            )
        if len(picture.grids) > 1:
            raise UnsupportedError(
                f"frames=True: image {number} was cut into {len(picture.grids)} blocks of tokens, and a "
                "frame is one; process the frames without tiles, or as a clip where the model takes clips"
            )


def _crops_of(number: int, picture: Picture) -> list[Unit]:
    if picture.crops is None:
        raise InvariantError(
            f"picture {number} does not say which crop its patches belong to, which a budget per crop needs; "
            "give Picture(crops=...), or a budget without '/crop'"
        )
    # on the CPU, since a unit lists the indices of its tokens
    crops = picture.crops().cpu()
    places = coordinates(picture.grids)
    units = []
    for crop in crops.unique().tolist():
        index = (crops == crop).nonzero()[:, 0]
        rows, cols = (places[index, axis].unique().shape[0] for axis in (0, 1))
        # methods read the rows and columns of a crop, so that its tokens must form some
        if rows * cols != index.shape[0]:
            raise InvariantError(
                f"crop {crop} of picture {number} is not a rectangle: {index.shape[0]} tokens in {rows} rows "
                f"x {cols} columns"
            )
        units.append(Unit([(number, index)], ((rows, cols),), index.shape[0], crop=crop))
    return units


def coordinates(grids: Sequence[tuple[int, int]]) -> Tensor:
    """(N, 2) row and column of every patch inside its block."""
    return torch.cat([torch.cartesian_prod(torch.arange(r), torch.arange(c)).view(-1, 2) for r, c in grids])


def stack_units(
    units: Sequence[Unit],
    pictures: Sequence[Picture],
    needs: Sequence[Need],
    projector: Callable[[Tensor], Tensor] | None,
    checks: Checks = NOW,
) -> VisualTokens:
    """VisualTokens of units with the same number of tokens, grids and crops."""
    one = units[0]
    first = pictures[one.members[0][0]]
    found: dict[Need, Tensor] = {}
    for need in needs:
        if need.what != "features" and need not in first.captured:
            # what was not captured is left out: a method that asks for it is told what is missing
            continue
        # pictures of one unit are asked about by the same text
        last = 1 if need.what == "text_embeds" else None
        rows = [
            [_slice(pictures[p], need, index, unit.crop) for p, index in unit.members[:last]]
            for unit in units
        ]
        whole = [row[0] if len(row) == 1 else torch.cat(row) for row in rows]
        found[need] = whole[0][None] if len(whole) == 1 else torch.stack(whole)  # one image is not copied
    return VisualTokens.of(
        found,
        projector=projector,
        checks=checks,
        grids=one.grids,
        ordinals=tuple(unit.ordinal for unit in units),
        size=(len(units), one.count),
        # a frame alone is no clip, and several clips are not one
        frames=one.frames or (first.frames and one.crop is None and len(one.members) == 1),
        like=first.features,
    )


def _slice(picture: Picture, need: Need, index: Tensor | None, crop: int | None) -> Tensor:
    """What was captured of some patches of a picture, patches first; of its text, all."""
    if need.what == "features":
        return picture.patch_features(index)
    value = picture.captured[need]
    if need.what == "text_embeds":
        return value
    if need in (CLS_FEATURES, FRAME_VECTORS):
        return value if crop is None else value[crop : crop + 1]
    if index is None or index.shape[0] == picture.count:
        return value
    # nothing else has another number of rows than the picture has patches
    if value.shape[0] != picture.count:  # r encoder patches behind every token
        return value.unflatten(0, (picture.count, -1))[index.to(value.device)].flatten(0, 1)
    return value[index.to(value.device)]
