# SPDX-License-Identifier: Apache-2.0
"""Score, select and place: from the pictures of a call and one method to the placeholder slots that stay.

This is the only place that knows how a choice of tokens becomes a cut of the prompt: newline and [CLS] slots stay, kept
patches keep their own slot, and rows of merging methods take over the slots they stand for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvariantError, UnsupportedError
from ..kernels import dispatch
from ..spec import Budget
from .base import Merged, Method
from .keepmap import KeepMap
from .layout import pack_tiles
from .pictures import Picture, Tiles, Unit, make_units, stack_units
from .select import choose
from .tokens import VisualTokens


@dataclass(eq=False)
class Cut:
    """What stays of one picture.

    Args:
        keep: (length,) bool over the placeholder slots.
        keep_idx: (K,) ascending indices of kept patches, on the CPU, for KeepMaps.
        slots, rows: (M,) slots and (M, D) embeddings that take their place, for merging methods.
        grids: blocks that ``keep_idx`` counts in; those of the picture, or of its tiles before unpadding.
    """

    keep: Tensor
    keep_idx: Tensor
    grids: tuple[tuple[int, int], ...]
    slots: Tensor | None = None
    rows: Tensor | None = None

    @property
    def realised(self) -> int:
        """Visual tokens that the language model reads for this picture, newline and [CLS] slots of the prompt not counted."""
        return self.rows.shape[0] if self.rows is not None else self.keep_idx.shape[0]


def cut_pictures(
    pictures: Sequence[Picture],
    samples: Sequence[Sequence[int]],
    method: Method,
    budget: Budget | None,
    projector: Callable[[Tensor], Tensor],
    strict: bool = False,
) -> list[Cut | None]:
    """One Cut per picture, None where the picture stays whole. ``samples`` lists the pictures of each prompt."""
    if budget is None:
        return [None] * len(pictures)
    spatial = {p for p, picture in enumerate(pictures) if method.layout == "spatial" and picture.tiles is not None}
    cuts: list[Cut | None] = [None] * len(pictures)
    for p in spatial:
        cuts[p] = _cut_tiles(pictures[p], method, budget, projector)
    units = make_units(pictures, [[p for p in sample if p not in spatial] for sample in samples], budget.scope)
    chosen = choose_units(units, pictures, method, budget, projector, strict)
    by_picture: dict[int, list[tuple[Unit, Tensor, Tensor | None]]] = defaultdict(list)
    for unit, (slots, rows) in zip(units, chosen, strict=True):
        if rows is not None and len(unit.members) > 1:
            raise UnsupportedError(
                f"{method.name} merges tokens and cannot spread one budget over several images: use scope image or crop"
            )
        start = 0
        for p, index in unit.members:
            here = slots if len(unit.members) == 1 else slots[(slots >= start) & (slots < start + index.shape[0])] - start
            by_picture[p].append((Unit([(p, index)], unit.grids, unit.ordinal, unit.crop), here, rows))
            start += index.shape[0]
    for p, parts in by_picture.items():
        cuts[p] = _place(pictures[p], parts)
    return cuts


def choose_units(
    units: Sequence[Unit],
    pictures: Sequence[Picture],
    method: Method,
    budget: Budget,
    projector: Callable[[Tensor], Tensor],
    strict: bool,
) -> list[tuple[Tensor, Tensor | None]]:
    """For every unit (token indices (K,) on the CPU with -1 for rows without a place, rows (K, D) of merging methods or None)."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for number, unit in enumerate(units):
        if strict and isinstance(budget.keep, int) and budget.keep > unit.count:
            raise InvariantError(
                f"strict: keep={budget.keep} tokens but unit {number} holds {unit.count}; lower keep or drop strict"
            )
        method.check_unit(unit.count)
        crops = sum(1 if unit.crop is not None else _crop_count(pictures[p]) for p, _ in unit.members)
        groups[(unit.count, unit.grids, crops)].append(number)
    chosen: list[tuple[Tensor, Tensor | None]] = [(torch.empty(0), None)] * len(units)
    for (count, _, _), numbers in groups.items():
        k = budget.count(count)
        if k >= count:  # keep = all is dense for every method, merging ones included
            for number in numbers:
                chosen[number] = (torch.arange(count), None)
            continue
        result = choose(method, stack_units([units[n] for n in numbers], pictures, method.needs, projector), k)
        index = (result.slots if isinstance(result, Merged) else result).cpu()
        for row, number in enumerate(numbers):
            chosen[number] = (index[row], result.features[row] if isinstance(result, Merged) else None)
    return chosen


def _crop_count(picture: Picture) -> int:
    return picture.tensors["cls_features"].shape[0] if "cls_features" in picture.tensors else 1


def _place(picture: Picture, parts: Sequence[tuple[Unit, Tensor, Tensor | None]]) -> Cut | None:
    """Turn the choices inside one picture into slots."""
    patches = picture.patches.cpu()
    keep = torch.ones(picture.length, dtype=torch.bool)
    keep[patches] = False
    kept, slots, rows = [], [], []
    # rows may be reordered freely only where nothing else stands between the patches
    listed = len(parts) == 1 and picture.count == picture.length
    for unit, index, merged in parts:
        own = unit.members[0][1]  # (n,) patch indices of the unit
        kept.append(own[index[index >= 0]])
        if merged is None:
            keep[patches[kept[-1]]] = True
            continue
        hosts = _hosts(patches[own], index)  # (K,)
        keep[hosts] = True
        slots.append(hosts.sort().values if listed else hosts)
        rows.append(merged)
    if bool(keep.all()) and not rows:
        return None
    keep_idx = torch.cat(kept).unique()
    if not rows:
        return Cut(keep, keep_idx, picture.grids)
    whole = [own for own, (_, _, merged) in zip(kept, parts, strict=True) if merged is None]
    if whole:  # a unit kept whole beside merged ones still counts as rows of this picture
        slots.append(patches[torch.cat(whole)])
        rows.append(picture.patch_features(torch.cat(whole)).to(rows[0].device, rows[0].dtype))
    return Cut(keep, keep_idx, picture.grids, torch.cat(slots), torch.cat(rows))


def _hosts(slots: Tensor, index: Tensor) -> Tensor:
    """The slot of every row (K,): its token's own, or the lowest free one for rows without a token."""
    taken = torch.zeros(slots.shape[0], dtype=torch.bool)
    taken[index[index >= 0]] = True
    free = (~taken).nonzero()[:, 0]
    place = index.clone()
    place[index < 0] = free[: int((index < 0).sum())]
    return slots[place]


def _cut_tiles(picture: Picture, method: Method, budget: Budget, projector: Callable[[Tensor], Tensor]) -> Cut | None:
    """The "spatial" layout: a budget per raw tile, rows interleaved over the detail tiles, no newlines, no unpadding."""
    if budget.scope != "crop":
        raise UnsupportedError(f"anyres='spatial' spends its budget per tile: write '@{budget.keep}/crop' instead of '@{budget}'")
    tiles = picture.tiles
    side = tiles.grid
    n, count = side[0] * side[1], tiles.tensors["features"].shape[0]
    k = budget.count(n)
    if k >= n:
        return None  # every patch of every tile is kept: leave the checkpoint's own layout alone
    tensors = dict(tiles.tensors)
    if "cls_attention" in tensors:
        tensors["cls_attention"] = tensors["cls_attention"].transpose(1, 2)
    if "received_attention" in tensors:
        tensors["received_attention"] = tensors["received_attention"][..., 0]
    result = choose(method, VisualTokens(**tensors, projector=projector, grids=(side,), ordinal=torch.arange(count)), k)
    if isinstance(result, Merged):
        slots, rows = result.slots.cpu(), result.features
    else:
        slots = result.cpu()
        (rows,) = dispatch.gather_rows([tensors["features"]], result, ordered=True)
    context = result.context if isinstance(result, Merged) else None
    order = pack_tiles(slots, tiles.layout, side[0], None if context is None else ~context.cpu())
    if order.shape[0] > picture.length:
        raise UnsupportedError(
            f"anyres='spatial' makes {order.shape[0]} tokens but the prompt has {picture.length} places; lower keep"
        )
    keep = torch.zeros(picture.length, dtype=torch.bool)
    keep[: order.shape[0]] = True
    flat = rows.flatten(0, 1)[order.to(rows.device)]
    keep_idx = torch.cat([_in_detail(t, s[s >= 0], tiles) for t, s in enumerate(slots)]).unique()
    across, down = tiles.layout
    return Cut(keep, keep_idx, (side, (down * side[0], across * side[1])), torch.arange(order.shape[0]), flat)


def _in_detail(tile: int, patch: Tensor, tiles: Tiles) -> Tensor:
    """Index of a tile's patches when the base tile comes first and the detail tiles form one big raster."""
    if tile == 0:
        return patch
    (rows, cols), across = tiles.grid, tiles.layout[0]
    row = (tile - 1) // across * rows + patch // cols
    return rows * cols + row * across * cols + (tile - 1) % across * cols + patch % cols


def keep_maps(pictures: Sequence[Picture], cuts: Sequence[Cut | None], method: str) -> list[KeepMap]:
    """One KeepMap per image, one per frame for clips."""
    maps = []
    for number, (picture, cut) in enumerate(zip(pictures, cuts, strict=True)):
        grids = picture.grids if cut is None else cut.grids
        keep_idx = torch.arange(picture.count) if cut is None else cut.keep_idx
        if not picture.frames:
            maps.append(KeepMap(keep_idx, sum(r * c for r, c in grids), grids, method=method, view=picture.view, index=number))
            continue
        start = 0
        for frame, (rows, cols) in enumerate(grids):
            here = keep_idx[(keep_idx >= start) & (keep_idx < start + rows * cols)] - start
            maps.append(KeepMap(here, rows * cols, ((rows, cols),), method=method, view=picture.view, index=number, frame=frame))
            start += rows * cols
    return maps
