# SPDX-License-Identifier: Apache-2.0
"""What a method needs, read from the modules of vLLM, and the loop over the pictures of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather

from ...core.method import Need
from ...core.tokens import patches_first
from ...errors import UnsupportedError
from ...hooks.vision.capture import VisionCapture
from ...hooks.vision.pictures import Picture
from ...hooks.vision.tower import InnerReader, attention_of, find_blocks
from ..reduce import KeptRows, reduce_pictures
from ..request import Request
from ..tally import TALLY

Encoded = Any  # what a family's encoder returns


class WatchedTower:
    """A vision tower with its projector.

    Args:
        layer: index into the hidden states that features are taken from.
        depth: blocks of the tower, of which vLLM loads the first ones.
    """

    def __init__(self, tower: nn.Module, projector: nn.Module, layer: int, depth: int) -> None:
        self.tower, self.projector, self.layer, self.depth = tower, projector, layer, depth
        # all blocks are split over ranks alike, so that one is asked
        attention = attention_of(find_blocks(tower)[0])
        shared = getattr(attention, "tp_size", 1) > 1
        self.gather = (lambda heads: tensor_model_parallel_all_gather(heads, dim=1)) if shared else None

    def run(
        self, needs: Sequence[Need], encode: Callable[[], Encoded], lengths: list[int] | None = None
    ) -> tuple[Encoded, Mapping[Need, Tensor]]:
        """What ``encode`` returns, and what was captured: (T, n, channels) of T crops, [CLS] rows apart.

        Args:
            lengths: of the sequences of patches that the tower packs into one.
        """
        capture = VisionCapture(
            self.tower, needs, [self.layer], self.projector, depth=self.depth, gather=self.gather
        )
        for _, reader in capture.readers:
            if isinstance(reader, InnerReader):
                reader.lengths = lengths
        with capture as record:
            output = encode()
        return output, {need: patches_first(need.what, value) for need, value in record.take().items()}


def refuse_compiled(config: Any) -> None:
    """Refuse encoders that run without their Python code, where nothing can be read or shortened, and those
    with adapters, whose rows vLLM counts by the tokens that stay.
    """
    compilation = config.compilation_config
    for name in ("cudagraph_mm_encoder", "compile_mm_encoder"):
        if getattr(compilation, name, False):
            raise UnsupportedError(
                f"{name} runs the vision encoder without its Python code, so that nothing can be read of it; "
                f"start without {name}"
            )
    if getattr(config.lora_config, "enable_tower_connector_lora", False):
        raise UnsupportedError(
            "enable_tower_connector_lora puts adapters into the vision encoder, and vLLM counts their rows "
            "by the tokens that stay, not by those that are encoded; start without it, adapters of the "
            "language model work"
        )


def most_tokens(config: Any) -> int:
    """Tokens that the scheduler lets the encoder make in a step."""
    return config.scheduler_config.max_num_encoder_input_tokens


def cut(
    pictures: Sequence[Picture], request: Request, projector: Any, *, in_place: bool = False
) -> list[KeptRows]:
    """What a request leaves of pictures, counted."""
    kept = reduce_pictures(pictures, request, projector, in_place=in_place)
    for picture, one in zip(pictures, kept, strict=True):
        # newlines and the like always stay and are not counted
        specials = picture.length - picture.count
        TALLY.add(request.text, picture.count, one.rows.shape[0] - specials, one.fallback is not None)
    # every rank cuts the same pictures
    if any(one.fallback is not None for one in kept) and get_tensor_model_parallel_rank() == 0:
        TALLY.publish()
    return kept


def _plain(request: Request, picture: Picture, kept: KeptRows) -> Tensor:
    return kept.rows


def tile_by_tile(
    encode: Callable[[Request, slice], Sequence[Picture]],
    tiles: Sequence[int],
    rows_of: Callable[[Request, Picture, KeptRows], Tensor] = _plain,
    *,
    in_place: bool = False,
) -> Callable[[int, int, Request], list[Tensor]]:
    """A turn over some items, each of so many ``tiles`` with a budget of their own.

    Args:
        encode: a picture for each of the tiles in a slice of those of all items.
        rows_of: what the language model is given for a tile.
    """

    def one_turn(start: int, end: int, request: Request) -> list[Tensor]:
        # pixels are laid out by tile, turns are counted by item
        first = sum(tiles[:start])
        pictures = encode(request, slice(first, first + sum(tiles[start:end])))
        # every tile was cut alone; those of an item are joined again
        kept = zip(pictures, cut(pictures, request, None, in_place=in_place), strict=True)
        return [
            torch.cat([rows_of(request, *next(kept)) for _ in range(count)]) for count in tiles[start:end]
        ]

    return one_turn


def plain_projector(projector: Any) -> nn.Sequential:
    """[linear, activation, linear] of torch with the weights of vLLM's parallel layers, whole on every rank.

    Methods look into it, or differentiate it. Taken right after loading: vLLM may pack weights anew later.
    """
    first, second = projector.linear_1, projector.linear_2
    bias = first.bias
    # the first layer is split by its outputs, the second by its inputs; its bias is whole
    return nn.Sequential(
        _linear(_whole(first.weight, first, 0), None if bias is None else _whole(bias, first, 0)),
        projector.act,
        _linear(_whole(second.weight, second, 1), second.bias),
    )


def _whole(weight: Tensor, layer: Any, dim: int) -> Tensor:
    weight = weight.detach().clone()
    shared = getattr(layer, "tp_size", 1) > 1
    return tensor_model_parallel_all_gather(weight.contiguous(), dim=dim) if shared else weight


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    # no weights are drawn here: vLLM's take their place
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made.eval()
