# SPDX-License-Identifier: Apache-2.0
"""What a request asks for, free of any engine: spec text to method, budget and canonical text, and refusals.

A server runs one model for many clients. An error inside the model would end it for all of them, so that
whatever a client can get wrong is refused here, where a request is read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from reprlib import repr as brief

from ..api import resolve_all
from ..core.budget import Budget
from ..core.method import Method, Need, needs_of
from ..errors import SpecError, UnsupportedError, VlmPruneError, reason
from ..spec import unbuilt
from .names import DENSE, KEY, VARIABLE

LONGEST = 500  # characters of a spec
_FILES = ("weights", "recipe")  # options that are read from a file or a folder, whatever they are called
_PATH = re.compile(r"[/\\]|\.json")
# rounds that a method computes, without an end of its own: other clients wait for them
_MOST_ROUNDS = {("gprune", "iterations"): 100, ("zooprune", "m"): 1024}
_LARGEST = 1024  # tokens of a rehearsed picture: time of some methods grows with their square
_NEAREST = "e.g. 'fastervlm@64' or 'divprune@64'"
# what can be read of an encoder that runs apart from the language model
READABLE = {
    "features",
    "encoder_features",
    "cls_attention",
    "received_attention",
    "keys",
    "wide_keys",
    "wide_attention",
    "cls_features",
    "projector",
}


@dataclass(frozen=True, eq=False)
class Request:
    """A spec that a server can run.

    Args:
        text: canonical; it stands in every cache key.
        method: what chooses. budget: of every picture; None leaves all tokens.
    """

    text: str
    method: Method
    budget: Budget | None

    def count(self, n: int) -> int:
        """Tokens that stay of a picture of ``n``; known before anything is encoded."""
        return n if self.budget is None else self.budget.count(n)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the method reads; nothing where all tokens stay."""
        return () if self.budget is None else needs_of(self.method)


# hashable: a part of the key under which ``rehearse`` is cached
@dataclass(frozen=True)
class TowerFacts:
    """What is known of a served model without its weights.

    Args:
        cls: whether its tower has [CLS].
        depth: blocks of the tower. loaded: how many of them the engine loads.
        layer: index into the hidden states that features are taken from.
        tower: whether anything inside it can be read. projector: whether methods can be given the projector.
        merges: patches of the tower behind every visual token.
        full: blocks that attend to the whole picture, where others attend inside windows; None where all do.
        placed: whether visual tokens have rows and columns.
    """

    cls: bool
    depth: int
    loaded: int
    layer: int
    tower: bool = True
    projector: bool = True
    merges: int = 1
    full: tuple[int, ...] | None = None
    placed: bool = True


def wanted(given: Mapping[str, object], server: Mapping[str, object] | None, config: object) -> Request:
    """The request that holds: its own option, else that of the server, of the config, of the environment."""
    value = given.get(KEY)
    if value is None:
        value = (server or {}).get(KEY)
    if value is None:
        value = getattr(config, KEY, None)
    if value is None:
        # an empty variable is as good as none
        value = os.environ.get(VARIABLE) or DENSE
    if not isinstance(value, str):
        # cut short, since a client chooses how long it is
        raise SpecError(f"{KEY}={brief(value)} is a {type(value).__name__}; expected a spec, {_NEAREST}")
    return read(value)


# bounded, since clients choose the texts; what raises is not kept
@lru_cache(maxsize=1024)
def read(text: str) -> Request:
    """A spec as a request; raises for whatever no server can do."""
    if len(text) > LONGEST:
        raise SpecError(f"a spec of {len(text)} characters; expected {LONGEST} at most, {_NEAREST}")
    _check_options(text)
    plans, canonical = resolve_all(text)
    if len(plans) != 1:
        raise UnsupportedError(
            f"{canonical!r} combines {len(plans)} acting methods; a server runs one, before the language "
            f"model: {_NEAREST}"
        )
    method, budget = plans[0]
    _check(canonical, method, budget)
    return Request(canonical, method, budget)


def _check_options(text: str) -> None:
    """Refuse files and endless work, before the methods are built, since to build them may open a file.

    By what was parsed: Python takes other letters for those of a name, and a comment in front of "=".
    """
    for part in unbuilt(text).parts:
        for name, value in part.args:
            if (name in _FILES and value is not None) or _PATH.search(str(value)):
                raise UnsupportedError(
                    f"{text!r} names a file or a folder, which a client may not ask a server to open; leave "
                    "it out"
                )
            most = _MOST_ROUNDS.get((part.name, name))
            if most is not None and isinstance(value, int) and value > most:
                raise UnsupportedError(
                    f"{text!r} computes {name}={value} rounds, for which all clients would wait; give "
                    f"{name}={most} at most"
                )


def _check(text: str, method: Method, budget: Budget | None) -> None:
    if method.slot != "before_lm":
        raise UnsupportedError(
            f"{text!r} acts in the slot {method.slot!r}; an engine holds one paged KV cache of equal length "
            f"for all layers, so that only methods before the language model run there, {_NEAREST}"
        )
    if method.later(budget):
        raise UnsupportedError(
            f"{text!r} goes on inside the language model, which no engine does; {_NEAREST}"
        )
    if budget is None and method.counts != "budget":
        raise UnsupportedError(
            f"{text!r} counts by itself, but an engine must know the number of tokens before it looks at the "
            f"picture; give a budget, as in '{method.name}@64', where the method takes one; {_NEAREST}"
        )
    if budget is not None and budget.scope != "image":
        raise UnsupportedError(
            f"{text!r} spends its budget per {budget.scope}; an engine encodes and caches every picture "
            f"alone: write '@{budget.keep}'"
        )
    if method.layout != "packed":
        raise UnsupportedError(f"{text!r} lays tiles out anew; leave anyres=... out")
    unread = sorted({need.what for need in needs_of(method)} - READABLE)
    if unread or method.query_aware:
        raise UnsupportedError(
            f"{text!r} reads the question ({', '.join(unread) or 'query-aware'}), but an engine encodes a "
            f"picture once for all questions; {_NEAREST}"
        )


def check_tower(request: Request, facts: TowerFacts) -> None:
    """Refuse what this model cannot give."""
    whats = {need.what for need in request.needs}
    text = request.text
    inside = whats - {"features", "projector"}
    if inside and not facts.tower:
        raise UnsupportedError(
            f"{text!r} reads {sorted(inside)}, which cannot be read of this vision tower here; use a "
            "method that reads features only, e.g. 'divprune@64'"
        )
    if whats & {"cls_attention", "wide_attention"} and not facts.cls:
        raise UnsupportedError(
            f"{text!r} reads [CLS], which this vision tower has not; use cls=mean, e.g. "
            "'fastervlm(cls=mean)@64', or 'divprune@64'"
        )
    if "cls_features" in whats and facts.cls and facts.merges > 1:
        raise UnsupportedError(
            f"{text!r} hands on [CLS], but the projector of this model reads {facts.merges} patches at once; "
            "use cls=mean, e.g. 'visionzip(cls=mean)@64'"
        )
    if "projector" in whats and not facts.projector:
        raise UnsupportedError(f"{text!r} reads the projector, which cannot be read here; use 'divprune@64'")
    _check_layers(request, facts)


def _check_layers(request: Request, facts: TowerFacts) -> None:
    from ..core.method import OF_TOWER
    from ..hooks.vision.capture import block_index

    for need in request.needs:
        if need.what not in OF_TOWER:
            continue
        block = block_index(facts.layer if need.layer is None else need.layer, facts.depth, facts.full)
        if block >= facts.loaded:
            raise UnsupportedError(
                f"{request.text!r} reads layer {need.layer}; the engine loads the first {facts.loaded} of "
                f"{facts.depth} blocks, so that layers 1..{facts.loaded} can be read; leave layer=... out"
            )
        if need.what == "received_attention" and facts.full is not None and block not in facts.full:
            raise UnsupportedError(
                f"{request.text!r} reads block {block}, which attends inside windows, whose scores cannot be "
                f"compared; use one of layer={[full - facts.depth for full in facts.full]}"
            )


@lru_cache(maxsize=1024)
def rehearse(text: str, facts: TowerFacts, grids: tuple[tuple[int, int], ...], frames: bool = False) -> None:
    """Run the choice once on random tensors: what it would raise in the engine it raises here.

    A large picture is rehearsed on a smaller one of its shape, since other requests wait meanwhile.

    Args:
        grids: blocks of the picture; of tokens without rows and columns, their number in one row.
        frames: whether they are frames of a clip.
    """
    request = read(text)
    if request.budget is None:
        return
    check_tower(request, facts)
    n = sum(rows * cols for rows, cols in grids)
    try:
        request.method.check_unit(n)
    # what it says to do instead, such as budgets per crop, is for models outside a server
    except VlmPruneError as error:
        raise UnsupportedError(
            f"{text!r} cannot choose from a picture of {n} tokens here; send a smaller one, or use "
            "'divprune@64'"
        ) from error
    # here, since that module imports this one
    from .reduce import promised, random_picture, reduce_one

    request, grids = _smaller(request, grids)
    picture, projector = random_picture(request.needs, facts, grids, frames)
    try:
        kept = reduce_one(picture, request, projector)
    # says already what to do instead
    except VlmPruneError:
        raise
    except Exception as error:  # of a method of somebody else: the engine must not meet it
        raise UnsupportedError(
            f"{text!r} failed on random tensors of grid {grids}: {reason(error)}"
        ) from error
    if kept.rows.shape[0] != promised(picture, request):
        raise UnsupportedError(
            f"{text!r} gives {kept.rows.shape[0]} rows where its budget says {promised(picture, request)}; "
            f"use another method, {_NEAREST}"
        )


def _smaller(
    request: Request, grids: tuple[tuple[int, int], ...]
) -> tuple[Request, tuple[tuple[int, int], ...]]:
    """The same request about the same blocks, with fewer rows and columns where they are many."""
    n = sum(rows * cols for rows, cols in grids)
    if n <= _LARGEST or request.budget is None:
        return request, grids
    shrink = math.sqrt(_LARGEST / n)
    small = tuple((max(1, int(rows * shrink)), max(1, int(cols * shrink))) for rows, cols in grids)
    left = sum(rows * cols for rows, cols in small)
    # fewer than there are, or nothing would be chosen; those that are few stay as they are
    k = request.count(n)
    keep = k if k < left else math.ceil(k / n * left)
    return replace(request, budget=Budget(keep)), small
