# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the adapters of model families: geometry, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mutant_targets as at
import torch
from mutant import Mutant, Pytest

Function = Callable[..., Any]
FAMILIES = Pytest("tests/models/test_families.py")
ADAPTERS = Pytest("tests/models/test_adapters.py")
TILES = Pytest("tests/models/test_tiles.py")
LATER = Pytest("tests/models/test_later_families.py")
COMPRESSED = Pytest("tests/models/test_compressed.py")
PICTURES = Pytest("tests/core/test_pictures.py")


def windows_not_undone(in_order: Function) -> Function:
    return lambda self, packed, modality, arguments: packed


def first_patch_of_each_token(pack: Function) -> Function:
    def changed(self: Any, modality: Any, crops: Any, number: int, arguments: Any) -> Any:
        return crops.unflatten(1, (-1, self.merge**2))[:, :, 0].flatten(0, 1)

    return changed


def columns_before_rows(shuffled_mean: Function) -> Function:
    def changed(patches: Any, grid: tuple[int, int], shuffle: Any) -> Any:
        turned = patches.unflatten(0, grid).transpose(0, 1).flatten(0, 1)
        return shuffled_mean(turned, grid[::-1], shuffle)

    return changed


def down_for_across(layout: Function) -> Function:
    return lambda self, number, arguments: layout(self, number, arguments)[::-1]


def second_block_turned(tile_grids: Function) -> Function:
    def changed(special: Any, side: int) -> Any:
        first, *rest = tile_grids(special, side)
        return (first, *(grid[::-1] for grid in rest))

    return changed


def tiles_in_reverse(crop_of: Function) -> Function:
    def changed(pack: Any, patches: Any, count: int, n: int) -> Any:
        return count - 1 - crop_of(pack, patches, count, n)

    return changed


def only_the_pixels(check: Function) -> Function:
    """Another feature layer than that of the config is taken."""

    def changed(self: Any, arguments: Any, modality: Any) -> None:
        layers = ("vision_feature_layer", "vision_feature_layers")
        check(self, {name: value for name, value in arguments.items() if name not in layers}, modality)

    return changed


def masks_not_looked_at(check: Function) -> Function:
    def changed(self: Any, arguments: Any, modality: Any) -> None:
        check(
            self,
            {name: value for name, value in arguments.items() if name != "pixel_attention_mask"},
            modality,
        )

    return changed


def whole_pictures(left_of: Function) -> Function:
    return lambda adapter, modality, pictures, arguments: pictures


def masks_of_all(left_by_model: Function) -> Function:
    return lambda mask, stays: mask


def joins_of_what_is_left(among_all: Function) -> Function:
    def changed(joins: Any, left: Any, count: int) -> Any:
        whole = among_all(joins, left, count)
        return whole if whole is None else whole.index_copy(0, left, joins)

    return changed


def frames_in_reverse(pack: Function) -> Function:
    def changed(self: Any, modality: Any, crops: Any, number: int, arguments: Any) -> Any:
        return pack(self, modality, crops.flip(0) if modality.name == "video" else crops, number, arguments)

    return changed


def highest_of_the_cell(pack: Function) -> Function:
    def changed(self: Any, modality: Any, crops: Any, number: int, arguments: Any) -> Any:
        if modality.name != "video":
            return pack(self, modality, crops, number, arguments)
        cells = crops.transpose(1, 2).unflatten(2, (self.side, self.side))
        return torch.nn.functional.max_pool2d(cells, self._stride()).flatten(2).transpose(1, 2).flatten(0, 1)

    return changed


def always_tiled(crops: Function) -> Function:
    def changed(self: Any, modality: Any, arguments: Any, total: int) -> Any:
        return crops(self, modality, {**arguments, "batch_num_images": None}, total)

    return changed


def norm_left_out(after_pooling: Function) -> Function:
    return lambda connector, tokens: tokens @ connector.mm_input_projection_weight


def of_other_tokens(followed_features: Function) -> Function:
    """Each layer adds to a token what belongs to another one."""

    def changed(cuts: Any, names: tuple[str, str], kwargs: Any) -> Any:
        found = followed_features(cuts, names, kwargs)
        turned = {layer: rows.flip(0) for layer, rows in found[names[1]].items()}
        return found | {names[1]: turned}

    return changed


def marks_read_as_patches(capture: Function) -> Function:
    def changed(self: Any, needs: Any) -> Any:
        found = capture(self, needs)
        found.prefix = 0
        return found

    return changed


MUTANTS = (
    Mutant("windows of the tower not undone", at.QWEN_WINDOWS, windows_not_undone, FAMILIES),
    Mutant("the first patch stands for its token", at.QWEN_PACK, first_patch_of_each_token, FAMILIES),
    Mutant("patches shuffled by columns", at.SHUFFLED_MEAN, columns_before_rows, FAMILIES),
    Mutant("tiles across taken for tiles down", at.TILE_LAYOUT, down_for_across, TILES),
    Mutant("tiled pictures drawn as cropped ones", at.TILE_VIEW, lambda view: "center", PICTURES),
    Mutant("detail grid on its side", at.TILE_GRIDS, second_block_turned, ADAPTERS),
    Mutant("patches of another tile", at.CROP_OF, tiles_in_reverse, PICTURES),
    Mutant(
        "another feature layer taken", at.ADAPTER_CHECK, only_the_pixels, Pytest("tests/core/test_calls.py")
    ),
    Mutant("attention over padding taken", at.IDEFICS_CHECK, masks_not_looked_at, FAMILIES),
    Mutant("frames in reverse", at.CLIP_PACK, frames_in_reverse, PICTURES),
    Mutant("the highest of a cell for its mean", at.CLIP_PACK, highest_of_the_cell, PICTURES),
    Mutant("several images tiled as one is", at.ONEVISION_CROPS, always_tiled, ADAPTERS),
    Mutant("the norm after pooling left out", at.GEMMA_PROJECTOR, norm_left_out, PICTURES),
    Mutant("features of other tokens added in layers", at.FOLLOWED_FEATURES, of_other_tokens, LATER),
    Mutant(
        "merged rows in the order of the method between marks of lines",
        at.UNBROKEN,
        lambda unbroken: lambda self: self.special is None,
        Pytest("tests/models/test_parted.py"),
    ),
    Mutant(
        "tiles counted as one picture",
        at.PARTS,
        lambda parts: lambda self, processor, picture: 1,
        Pytest("tests/evaluation/test_tile_budgets.py"),
    ),
    Mutant("tokens in front of patches taken for patches", at.RADIO_CAPTURE, marks_read_as_patches, LATER),
    Mutant(
        "slices counted as one picture",
        at.SLICES,
        lambda parts: lambda self, processor, picture: 1,
        Pytest("tests/evaluation/test_tile_counts.py"),
    ),
    Mutant("what the model drops is chosen among", at.LEFT_OF, whole_pictures, COMPRESSED),
    Mutant("masks of what the model dropped", at.LEFT_BY_MODEL, masks_of_all, COMPRESSED),
    Mutant("joins counted in what is left", at.AMONG_ALL, joins_of_what_is_left, COMPRESSED),
    Mutant("numbered padding not looked at", at.CHECK_NUMBERS, lambda check: lambda *given: None, LATER),
)
