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

from vlmprune.core.deferred import DeferredChecks
from vlmprune.hooks.state import OfThread

Function = Callable[..., Any]
LLAVA = Checks("fastervlm@9", "llava")
GOLDEN = Pytest("tests/golden")


def record_kept(close: Function) -> Function:
    def changed(self: Any) -> None:
        state = self.state
        close(self)
        self.local.state = state

    return changed


def is_patch(handle: Any) -> bool:
    return hasattr(handle, "original")


def first_hook_kept(detach: Function) -> Function:
    def changed(self: Any) -> None:
        hooks = [handle for handle in self._installed if not is_patch(handle)]
        self._installed = [handle for handle in self._installed if handle not in hooks[:1]]
        detach(self)

    return changed


def patches_kept(detach: Function) -> Function:
    def changed(self: Any) -> None:
        self._installed = [handle for handle in self._installed if not is_patch(handle)]
        detach(self)

    return changed


def nothing(original: Function) -> Function:
    return lambda *args, **options: None


def one_record_for_all(attach: Function) -> Function:
    def changed(self: Any) -> Any:
        attached, own = attach(self), vars(OfThread)
        shared = {name: value for name, value in own.items() if not name.startswith("_")}
        self.local = SimpleNamespace(**shared, checks=DeferredChecks())
        return attached

    return changed


def made_at_once(keep_mask: Function) -> Function:
    return lambda self, *args, **options: self.original(*args, **options)


def second_query(attend: Function) -> Function:
    def changed(self: Any, index: int, call: Any) -> None:
        queries = torch.cat([call.queries[:, :, 1:2], call.queries[:, :, 1:]], dim=2)
        attend(self, index, replace(call, queries=queries))

    return changed


def shifted_columns(row_attention: Function) -> Function:
    """The columns of the patches begin with that of [CLS]."""
    return lambda *args: row_attention(*args).roll(1, -1)


def layer_before(block_index: Function) -> Function:
    return lambda layer, count: block_index(layer - 1 if layer < 0 else layer, count)


def whole_map(attend: Function) -> Function:
    def changed(self: Any, index: int, call: Any) -> None:
        call.queries @ call.keys.transpose(2, 3)
        attend(self, index, call)

    return changed


def images_reversed(serving: Function) -> Function:
    def changed(self: Any, session: Any, images: Any) -> AbstractContextManager[None]:
        return serving(self, session, images[::-1])

    return changed


def what_another_saw(serving: Function) -> Function:
    """Whatever a session captures, it is given the pictures of the first kind of capture."""

    def changed(self: Any, session: Any, images: Any) -> AbstractContextManager[None]:
        first = [replace(one, seen=dict.fromkeys(one.seen, next(iter(one.seen.values())))) for one in images]
        return serving(self, session, first)

    return changed


def layers_reversed(take: Function) -> Function:
    def changed(self: Any) -> Any:
        parts = len(self.capture.layers)
        return {
            need: torch.cat(value.chunk(parts, dim=-1)[::-1], dim=-1)
            if need.what == "cls_features"
            else value
            for need, value in take(self).items()
        }

    return changed


def as_declared(policy: Function) -> Function:
    """Positions that are asked for are not taken."""
    return lambda self, method: policy(replace(self, override=None), method)


def positions_told(no_positions: Function) -> Function:
    return lambda module, args, kwargs: (args, kwargs)


ENCODED = Pytest("tests/core/test_encode.py")
MUTANTS = (
    Mutant("state outlives the call", at.CLOSE, record_kept, LLAVA),
    Mutant("hook left behind", at.DETACH, first_hook_kept, LLAVA),
    Mutant("patched method left behind", at.DETACH, patches_kept, LLAVA),
    Mutant("capture left behind", at.CAPTURE_REMOVE, nothing, LLAVA),
    Mutant("one thread's record for all", at.ATTACH, one_record_for_all, Pytest("tests/test_threads.py")),
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
    Mutant("images served in reverse", at.SERVING, images_reversed, ENCODED),
    Mutant("pictures of another capture served", at.SERVING, what_another_saw, ENCODED),
    Mutant(
        "[CLS] rows of layers in reverse",
        at.RECORD_TAKE,
        layers_reversed,
        Pytest("tests/core/test_pictures.py"),
    ),
)
