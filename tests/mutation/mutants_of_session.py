# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the session, in what it captures, and in the cache of encoded images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mutant_targets as at
import torch
from mutant import Checks, Mutant, Pytest

Function = Callable[..., Any]
LLAVA = Checks("fastervlm@9", "llava")
GOLDEN = Pytest("tests/golden")


def record_kept(close: Function) -> Function:
    def changed(self: Any, *args: Any) -> None:
        call = self.call
        try:
            close(self, *args)
        finally:
            self._local.call = call

    return changed


def first_hook_kept(detach: Function) -> Function:
    def changed(self: Any) -> None:
        del self._handles[:1]
        detach(self)

    return changed


def wrappers_kept(detach: Function) -> Function:
    def changed(self: Any) -> None:
        self._wrapped.clear()
        detach(self)

    return changed


def nothing(original: Function) -> Function:
    return lambda *args, **options: None


def one_record_for_all(init: Function) -> Function:
    def changed(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self._local = SimpleNamespace()

    return changed


def made_at_once(keep_mask: Function) -> Function:
    return lambda self, *args, **options: self.original(*args, **options)


def second_query(attend: Function) -> Function:
    def changed(self: Any, reader: Any, queries: Any, keys: Any) -> None:
        attend(self, reader, torch.cat([queries[:, 1:2], queries[:, 1:]], dim=1), keys)

    return changed


def shifted_columns(row_attention: Function) -> Function:
    """The columns of the patches begin with that of [CLS]."""
    return lambda *args: row_attention(*args).roll(1, -1)


def layer_before(block_index: Function) -> Function:
    return lambda layer, count: block_index(layer - 1 if layer < 0 else layer, count)


def whole_map(attend: Function) -> Function:
    def changed(self: Any, reader: Any, queries: Any, keys: Any) -> None:
        queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1)
        attend(self, reader, queries, keys)

    return changed


def images_reversed(serving: Function) -> Function:
    def changed(self: Any, session: Any, shelved: Any) -> AbstractContextManager[None]:
        return serving(self, session, shelved[::-1])

    return changed


def what_another_saw(serving: Function) -> Function:
    """Whatever a session captures, it is given the pictures of the first kind of capture."""

    def changed(self: Any, session: Any, shelved: Any) -> AbstractContextManager[None]:
        first = [replace(one, seen=dict.fromkeys(one.seen, next(iter(one.seen.values())))) for one in shelved]
        return serving(self, session, first)

    return changed


def layers_reversed(take: Function) -> Function:
    def changed(self: Any) -> Any:
        found = take(self)
        parts = len(self.capture.layers)
        if "cls_features" in found and parts > 1:
            found["cls_features"] = torch.cat(found["cls_features"].chunk(parts, dim=-1)[::-1], dim=-1)
        return found

    return changed


def as_declared(policy: Function) -> Function:
    """Positions that are asked for are not taken."""

    def changed(self: Any, method: Any) -> str:
        asked, self.override = self.override, None
        try:
            return policy(self, method)
        finally:
            self.override = asked

    return changed


def positions_told(no_positions: Function) -> Function:
    return lambda module, args, kwargs: (args, kwargs)


SHELF = Pytest("tests/core/test_shelf.py")
MUTANTS = (
    Mutant("state outlives the call", at.CLOSE, record_kept, LLAVA),
    Mutant("hook left behind", at.DETACH, first_hook_kept, LLAVA),
    Mutant("wrapper left behind", at.DETACH, wrappers_kept, LLAVA),
    Mutant("capture left behind", at.CAPTURE_REMOVE, nothing, LLAVA),
    Mutant("one thread's record for all", at.SESSION, one_record_for_all, LLAVA),
    Mutant("2-D mask lost on static caches", at.KEEP_MASK, made_at_once, LLAVA),
    Mutant("wrong query row", at.ATTEND, second_query, GOLDEN),
    Mutant("[CLS] column not removed", at.ROW_ATTENTION, shifted_columns, GOLDEN),
    Mutant("off-by-one layer", at.BLOCK_INDEX, layer_before, GOLDEN),
    Mutant("attention map held", at.ATTEND, whole_map, LLAVA),
    Mutant("drafts read as prompt", at.DRAFTS, nothing, Checks("fastv(layer=2)@9", "llava")),
    Mutant("positions asked for not taken", at.POLICY, as_declared, LLAVA),
    Mutant(
        "gaps told to FlashAttention", at.NO_POSITIONS, positions_told, Pytest("tests/core/test_flash.py")
    ),
    Mutant("images served in reverse", at.SERVING, images_reversed, SHELF),
    Mutant("pictures of another capture served", at.SERVING, what_another_saw, SHELF),
    Mutant(
        "[CLS] rows of layers in reverse",
        at.RECORD_TAKE,
        layers_reversed,
        Pytest("tests/core/test_pictures.py"),
    ),
)
