# SPDX-License-Identifier: Apache-2.0
"""From encoded pictures to the rows that an engine's language model reads; free of any engine.

Nothing is raised for what a picture holds: a server goes on. A picture whose tensors are not finite, or on
which the method fails, keeps as many tokens by the rule ``uniform``; that is counted and logged.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.method import Merged, Method, Need
from ..core.reduce import Reduced, reduce_tokens
from ..core.select import choose
from ..core.tokens import VisualTokens
from ..errors import InvariantError, reason
from ..hooks.slots.before_lm import hosts_of
from ..hooks.vision.pictures import CLS_FEATURES, Grids, Picture, Unit, stack_units
from .request import Request, TowerFacts, read

Projector = Callable[[Tensor], Tensor] | None
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class KeptRows:
    """What is left of one picture.

    Args:
        rows: (K, D), newline and other special rows included.
        slots: (K,) ascending placeholder slots that they take, on the device of the rows.
        fallback: why the picture was cut by ``uniform``; None where it was not.
    """

    rows: Tensor
    slots: Tensor
    fallback: str | None = None


def promised(picture: Picture, request: Request) -> int:
    """Rows that are left of a picture, specials included."""
    return picture.length - picture.count + request.count(picture.count)


def reduce_pictures(
    pictures: Sequence[Picture], request: Request, projector: Projector, *, in_place: bool = False
) -> list[KeptRows]:
    """What a request leaves of pictures that were encoded together; each is a sample of its own.

    Args:
        in_place: rows of merging methods stand in the slots of their tokens, for models whose positions
            depend on slots; otherwise in the order of the method.
    """
    if request.budget is None:
        return [_whole(picture) for picture in pictures]
    broken = _not_finite(pictures)
    groups: dict[tuple, list[int]] = defaultdict(list)
    kept: dict[int, KeptRows] = {}
    for number, picture in enumerate(pictures):
        # a picture that loses nothing is handed on as it is, finite or not
        if request.count(picture.count) >= picture.count:
            kept[number] = _whole(picture)
        elif broken[number]:
            kept[number] = _uniform(picture, request, "its tensors are not finite")
        else:
            # pictures of one shape are stacked, and the method is called once for all of them
            groups[(picture.count, picture.grids, picture.cls_count)].append(number)
    for numbers in groups.values():
        some = [pictures[number] for number in numbers]
        kept |= zip(numbers, _reduce_alike(some, request, projector, in_place), strict=True)
    # back in the order in which the pictures came
    return [kept[number] for number in range(len(pictures))]


def in_turns(
    specs: Sequence[str],
    sizes: Sequence[int],
    most: int,
    one_turn: Callable[[int, int, Request], Sequence[Tensor]],
) -> list[Tensor]:
    """The rows of every item of a batch, neighbours of one spec together.

    The scheduler counts the tokens that stay, the tower computes all of them: no turn has more than ``most``
    tokens before pruning, unless one item alone has.
    """
    rows: list[Tensor] = []
    # a turn gives one tensor per item, so that their number says where the next turn starts
    while (start := len(rows)) < len(specs):
        end, total = start + 1, sizes[start]
        while end < len(specs) and specs[end] == specs[start] and total + sizes[end] <= most:
            total += sizes[end]
            end += 1
        rows += one_turn(start, end, read(specs[start]))
    return rows


def with_breaks(kept: KeptRows, grids: Grids, row: Tensor) -> Tensor:
    """The rows of a picture with ``row`` (1, D) behind each of its lines of tokens but the last."""
    ((lines, cols),) = grids
    # places (k,) in the whole picture where each line is one longer
    places = kept.slots + kept.slots // cols
    ends = torch.arange(1, lines, device=places.device) * (cols + 1) - 1
    order = torch.cat([places, ends]).argsort()
    return torch.cat([kept.rows, row.to(kept.rows).expand(len(ends), -1)])[order]


def _reduce_alike(
    pictures: Sequence[Picture], request: Request, projector: Projector, in_place: bool
) -> list[KeptRows]:
    """Of pictures of one shape; where they fail together, one by one."""
    try:
        return _reduce_stacked(pictures, request, projector, in_place)
    # of whatever kind: too little memory for a large picture, or a fault of somebody else's method
    except Exception as error:
        if len(pictures) == 1:
            return [_uniform(pictures[0], request, reason(error))]
        # a picture that fails must not take its neighbours with it
        return [_reduce_alike([one], request, projector, in_place)[0] for one in pictures]


def _reduce_stacked(
    pictures: Sequence[Picture], request: Request, projector: Projector, in_place: bool
) -> list[KeptRows]:
    units = [Unit([(number, None)], one.grids, one.count) for number, one in enumerate(pictures)]
    tokens = stack_units(units, pictures, request.needs, projector)
    k = request.count(pictures[0].count)
    kept = []
    if request.method.kind() == "merge":
        with torch.no_grad():
            reduced = reduce_tokens(request.method, tokens, k)
        kept = [_placed(one, reduced, number, in_place) for number, one in enumerate(pictures)]
    else:
        with torch.no_grad():
            chosen = choose(request.method, tokens, k)
        for one, keep_idx in zip(pictures, _indices(chosen), strict=True):
            kept.append(_gathered(one, keep_idx))
    # the prompt holds so many placeholders already; other numbers of rows would end the engine
    for left, picture in zip(kept, pictures, strict=True):
        if left.rows.shape[0] != promised(picture, request):
            raise InvariantError(
                f"{request.text!r} gave {left.rows.shape[0]} rows; expected {promised(picture, request)}"
            )
    return kept


def _indices(chosen: Tensor | Merged) -> Tensor:
    if isinstance(chosen, Merged):
        raise InvariantError("a method that does not merge returned merged rows; expected indices")
    return chosen


def reduce_one(picture: Picture, request: Request, projector: Projector) -> KeptRows:
    """Of one picture, with errors raised."""
    return _reduce_stacked([picture], request, projector, False)[0]


def _whole(picture: Picture) -> KeptRows:
    return KeptRows(picture.features, torch.arange(picture.length, device=picture.features.device))


def _gathered(picture: Picture, keep_idx: Tensor, fallback: str | None = None) -> KeptRows:
    """The tokens (k,) of a picture as they are, with all special rows, in the order of their slots."""
    device = picture.features.device
    slots = picture.slots_of(keep_idx.to(device))
    if picture.special is not None:
        slots = torch.cat([slots, picture.specials.to(device)]).sort().values
    return KeptRows(picture.features[slots], slots, fallback)


def _placed(picture: Picture, left: Reduced, number: int, in_place: bool) -> KeptRows:
    """Merged rows among the special rows of a picture."""
    rows, keep_idx = left.rows[number], left.keep_idx[number]
    device = rows.device
    hosts = hosts_of(picture.slots_of(torch.arange(picture.count)).to(device), keep_idx)
    if picture.unbroken and not in_place:
        return KeptRows(rows, hosts.sort().values)
    specials = picture.specials.to(device)
    slots, order = torch.cat([hosts, specials]).sort()
    return KeptRows(torch.cat([rows, picture.features[specials].to(rows.dtype)])[order], slots)


def _not_finite(pictures: Sequence[Picture]) -> list[bool]:
    """Of every picture, whether some value of it is not finite; one wait for all of them."""
    if not pictures:
        return []
    flags = [
        torch.stack([one.isfinite().all() for one in (picture.features, *picture.captured.values())]).all()
        for picture in pictures
    ]
    return [not ok for ok in torch.stack(flags).tolist()]


def _uniform(picture: Picture, request: Request, why: str) -> KeptRows:
    log.error("vlmprune: %s: a picture was cut by 'uniform' instead, because %s", request.text, why)
    k = request.count(picture.count)
    # tokens without places are taken as one row
    grids = picture.grids or ((1, picture.count),)
    tokens = VisualTokens(grids=grids, size=(1, picture.count), like=picture.features)
    keep_idx = _indices(choose(_uniform_method(), tokens, k))[0]
    return _gathered(picture, keep_idx, why)


def _uniform_method() -> Method:
    return read("uniform@1").method


def random_picture(
    needs: Sequence[Need], facts: TowerFacts, grids: tuple[tuple[int, int], ...], frames: bool = False
) -> tuple[Picture, nn.Module]:
    """A picture of random tensors of width 8 with all that ``needs`` names, and a projector for it."""
    n, width, heads = sum(rows * cols for rows, cols in grids), 8, 2
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random) + 0.1

    def captured(need: Need) -> Tensor:
        # (1, D) of a tower with [CLS], (0, D) of others
        if need == CLS_FEATURES:
            return draw(int(facts.cls), width)
        if need.what == "cls_attention":
            # (N, heads), of the size of attention, whose rows add up to 1
            return draw(n, heads) / n
        if need.what in ("received_attention", "wide_attention"):
            return draw(n, 1) / n
        return draw(n * (facts.merges if need.what == "encoder_features" else 1), width)

    found = {need: captured(need) for need in needs if need.what not in ("features", "projector")}
    projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    made = Picture(draw(n, width), grids if facts.placed else (), found, frames=frames)
    return made, projector.requires_grad_(False).eval()
