# SPDX-License-Identifier: Apache-2.0
"""Read what a method needs from a vision tower that keeps its own fast attention.

One query row of one block is enough for [CLS] attention, so that block's projections are watched (see :mod:`.tower`) and the row
is recomputed: no eager attention, no attention map, nothing changed on the tower. Hooks are installed once and
write to a thread-local record, so that concurrent calls do not see each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, UnsupportedError
from .attention_tap import AttentionCall
from .tower import FusedReader, TapReader, attention_of, find_blocks, has_cls, prefix_length, reader_of

_ROWS_AT_ONCE = 128  # key rows cast to float32 at a time: bounds the extra memory in half precision
ATTENTION_NEEDS = ("cls_attention", "received_attention", "keys")
PROJECTOR_NEEDS = ("encoder_features", "tile_features")


def block_index(layer: int, count: int) -> int:
    """The block whose output is ``hidden_states[layer]`` of an encoder with ``count`` blocks."""
    index = layer + count if layer < 0 else layer - 1
    if not 0 <= index < count:
        raise UnsupportedError(
            f"layer={layer} is not the output of a block; this vision tower has layers -{count}..-1 and 1..{count}"
        )
    return index


class VisionCapture:
    """Watches one vision tower, or several of the same shape.

    Args:
        tower: the vision module, or several; see :mod:`.tower` for the forms of attention that can be read.
        needs: any of cls_attention, received_attention, keys, cls_features; with a projector also encoder_features (what
            it is given) and tile_features (what it returns).
        layers: indices into ``hidden_states`` that the model takes its features from (for cls_features).
        layer: index of the layer whose attention is read; default the first of ``layers``.
        projector: the module between tower and language model.
    """

    def __init__(
        self,
        tower: nn.Module | Sequence[nn.Module],
        needs: Sequence[str],
        layers: Sequence[int],
        layer: int | None = None,
        projector: nn.Module | None = None,
    ) -> None:
        self.needs = tuple(needs)
        self.projector = projector
        self.towers = [tower] if isinstance(tower, nn.Module) else list(tower)
        self.cls, self.prefix = has_cls(self.towers[0]), prefix_length(self.towers[0])
        self._local = threading.local()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # towers without blocks that can be read still serve methods that need nothing of them
        self.blocks = [find_blocks(one) for one in self.towers] if set(self.needs) & {*ATTENTION_NEEDS, "cls_features"} else []
        if "cls_attention" in self.needs and not self.cls:
            raise UnsupportedError(
                f"{type(self.towers[0]).__name__} has no [CLS] token: use cls='mean', e.g. fastervlm(cls='mean')"
            )
        self.layers = [block_index(index, len(self.blocks[0])) for index in layers] if self.blocks else []
        self.layer = 0
        if self.blocks:
            self.layer = self.layers[0] if layer is None else block_index(layer, len(self.blocks[0]))
        self.readers: list[TapReader | FusedReader] = []
        if set(self.needs) & set(ATTENTION_NEEDS):
            self.readers = [reader_of(attention_of(blocks[self.layer])) for blocks in self.blocks]

    @property
    def key(self) -> tuple[Any, ...]:
        """Captures of one tower with the same key record the same."""
        return (frozenset(self.needs), self.layer, *self.layers)

    def install(self) -> None:
        """Register the hooks."""
        if self._handles:
            raise CaptureError("this capture is installed already")
        for reader in self.readers:
            self._handles += reader.install(lambda: self.is_recording, self._on_attention)
        if "cls_features" in self.needs and self.cls:
            for blocks in self.blocks:
                for index in sorted(set(self.layers)):
                    self._handles.append(blocks[index].register_forward_hook(self._on_block(index)))
        if set(self.needs) & set(PROJECTOR_NEEDS) and self.projector is not None:
            self._handles.append(self.projector.register_forward_hook(self._on_projector))

    def remove(self) -> None:
        """Remove the hooks; harmless when there are none."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Record what the tower computes in this thread inside the block."""
        outer = getattr(self._local, "record", None)
        self._local.record = Record(self)
        try:
            yield self._local.record
        finally:
            self._local.record = outer

    def __enter__(self) -> Record:
        self.install()
        self._scope = self.recording()
        return self._scope.__enter__()

    def __exit__(self, *error: object) -> None:
        self.remove()
        self._scope.__exit__(*error)

    @property
    def is_recording(self) -> bool:
        """Whether this thread is inside a ``recording`` block."""
        return self._record() is not None

    def _record(self) -> Record | None:
        return getattr(self._local, "record", None)

    def _on_attention(self, call: AttentionCall) -> None:
        if (record := self._record()) is not None:
            record.attend(call)

    def _on_projector(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if (record := self._record()) is not None:
            given = {"encoder_features": args[0], "tile_features": output}
            record.found |= {name: value for name, value in given.items() if name in self.needs}

    def _on_block(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            if (record := self._record()) is not None:
                if record.grad and not torch.is_grad_enabled() and next(module.parameters()).requires_grad:
                    raise UnsupportedError(
                        "reentrant gradient checkpointing of the vision tower hides the gradient of its [CLS] rows; "
                        "use gradient_checkpointing_enable({'use_reentrant': False})"
                    )
                hidden = output[0] if isinstance(output, tuple) else output
                record.rows[index] = hidden[:, :1]

        return hook


class Record:
    """What one run of the tower gave; T counts crops (images, tiles, frames), S tokens with [CLS], N patches."""

    def __init__(self, capture: VisionCapture) -> None:
        self.capture = capture
        self.grad = torch.is_grad_enabled()
        self.rows: dict[int, Tensor] = {}
        self.found: dict[str, Tensor] = {}
        self._parts: dict[str, list[Tensor]] = {}  # one entry per run of the block, or per segment of a packed sequence

    def attend(self, call: AttentionCall) -> None:
        """Take what is needed of an attention call over all S tokens of T crops."""
        first, needs = self.capture.prefix, self.capture.needs
        if "cls_attention" in needs:
            self._parts.setdefault("cls_attention", []).append(first_row(call)[..., first:])
        if "received_attention" in needs:
            self._parts.setdefault("received_attention", []).append(call.received()[:, first:])
        if "keys" in needs:
            self._parts.setdefault("keys", []).append(call.keys.float().mean(1)[:, first:])

    def take(self) -> dict[str, Tensor]:
        """The captured tensors, one entry per need; raises when the tower did not run."""
        found = dict(self.found)
        for name, parts in self._parts.items():  # segments of one packed sequence follow each other
            found[name] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if "cls_features" in self.capture.needs and self.capture.cls and len(self.rows) == len(set(self.capture.layers)):
            found["cls_features"] = torch.cat([self.rows[index] for index in self.capture.layers], dim=-1)  # (T, 1, C)
        expected = [
            n for n in self.capture.needs if n in ATTENTION_NEEDS + PROJECTOR_NEEDS or (n == "cls_features" and self.capture.cls)
        ]
        if missing := [name for name in expected if name not in found]:
            raise CaptureError(
                f"the vision tower ran without giving {missing}; expected its block {self.capture.layer} to run once per call"
            )
        return found


def first_row(call: AttentionCall) -> Tensor:
    """(T, H, S) attention of the first token, which is [CLS] where a tower has one, in float32."""
    if call.mask is None and call.queries.shape[1] == call.keys.shape[1]:
        heads, keys = call.queries.shape[1], call.keys.transpose(1, 2).flatten(2)
        return row_attention(call.queries[:, :, 0].flatten(1), keys, heads, call.scaling)
    rows = torch.zeros(call.queries.shape[0], 1, dtype=torch.int64, device=call.queries.device)
    return call.attention(rows)[:, :, 0]


def row_attention(query: Tensor, keys: Tensor, heads: int, scale: float) -> Tensor:
    """Softmaxed attention (T, H, S) of one query per crop, in float32.

    query (T, C) and keys (T, S, C) are plain projections. The query is spread into a (C, H) block-diagonal matrix, so that
    the keys are read once, as they lie in memory, without a per-head copy.
    """
    crops, width = query.shape
    head_of = torch.arange(width, device=query.device) // (width // heads)
    spread = query.new_zeros(crops, width, heads, dtype=torch.float32)
    spread[:, torch.arange(width, device=query.device), head_of] = query.float() * scale
    rows = keys.shape[1] if keys.dtype == torch.float32 else _ROWS_AT_ONCE
    logits = torch.cat([chunk.float() @ spread for chunk in keys.split(rows, dim=1)], dim=1)  # (T, S, H)
    return logits.softmax(dim=1).transpose(1, 2)
