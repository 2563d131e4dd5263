# SPDX-License-Identifier: Apache-2.0
"""Read what a method needs from a vision tower that keeps its own fast attention.

Towers of transformers hand queries and keys to an attention function, where they are taken: rotation, norms,
masks and windows are the tower's own; for other towers see :mod:`.tower`. One query row of one block is
enough for [CLS] attention, and it is computed: no eager attention, no attention map, nothing changed on the
tower. Hooks are installed once and write to a thread-local record, so that concurrent calls do not see each
other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ...core.deferred import NOW, Checks
from ...core.method import OF_HEAD, OF_TOWER, Need, What, as_needs
from ...errors import CaptureError, UnsupportedError
from ..attention_call import AttentionCall, compared_forms
from ..attention_tap import AttentionTap, reads_interface
from .tower import (
    FusedReader,
    Gather,
    InnerReader,
    Running,
    attention_in,
    find_blocks,
    find_head,
    has_cls,
    inner_of,
    prefix_length,
)

_ROWS_AT_ONCE = 128  # key rows cast to float32 at a time: bounds the extra memory in half precision
OF_CLS = ("cls_attention", "wide_attention")
OF_PROJECTOR = ("encoder_features", "tile_features")
CLS_FEATURES, FRAME_VECTORS, POOLING = Need("cls_features"), Need("frame_vectors"), Need("pooling_attention")


def block_index(layer: int | float, count: int, full: Sequence[int] | None = None) -> int:
    """The block whose output is ``hidden_states[layer]`` of an encoder with ``count`` blocks.

    A share of the depth means the first block from there on of those that attend to the whole picture, which
    ``full`` lists where others attend inside windows.
    """
    if isinstance(layer, float):
        wanted = max(round(layer * count), 1) - 1
        return min((block for block in full or range(count) if block >= wanted), default=count - 1)
    index = layer + count if layer < 0 else layer - 1
    if not 0 <= index < count:
        raise UnsupportedError(
            f"layer={layer} is not the output of a block; this vision tower has layers -{count}..-1 and "
            f"1..{count}"
        )
    return index


class TapReader:
    """Reads an attention module of transformers: queries and keys as its attention function gets them."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def install(self, running: Running, block: int) -> Iterable[Any]:
        """A tap on the attention of a block of this number, which gives the record every segment of a call,
        where the model packs several pictures.
        """

        @torch.no_grad()
        def listen(call: AttentionCall, output: Tensor) -> None:
            record = running()
            if record is None:
                return
            parts, form, known = call.segments(), call.form, compared_forms(call, record.checks)
            if form not in known:  # once is enough: the rule does not change from call to call
                first = torch.zeros(call.queries.shape[0], 1, dtype=torch.int64, device=call.queries.device)
                lengths = [part.queries.shape[2] for part in parts]
                outputs = [output] if len(parts) == 1 else output.split(lengths, dim=1)  # (B, n, H, d) each
                for part, own in zip(parts, outputs, strict=True):
                    part.check(first, None, part.attention(first), own, record.checks, known, form)
            for part in parts:
                record.attend(block, part)

        made = AttentionTap(self.attention, listen)
        made.install()
        yield made


Reader = TapReader | FusedReader | InnerReader


def reader_of(attention: nn.Module, gather: Gather | None = None) -> Reader:
    """What reads an attention module that ``attention_of`` found."""
    if reads_interface(attention):
        return TapReader(attention)
    inner = inner_of(attention)
    return FusedReader(attention) if inner is None else InnerReader(inner, gather)


class VisionCapture:
    """Watches one vision tower, or several of the same shape.

    Args:
        tower: the vision module, or several; see :mod:`.tower` for the forms of attention that can be read.
        needs: of the tower and, with a projector, of what that is given and returns.
        layers: indices into ``hidden_states`` that the model takes its features from.
        projector: the module between tower and language model.
        depth: blocks of the tower, where a host loads only the first of them.
        gather: brings the heads of all ranks together, where a host shares them out.

    Attributes:
        blocks_of: the block whose attention each need of the tower reads.
    """

    def __init__(
        self,
        tower: nn.Module | Sequence[nn.Module],
        needs: Sequence[Need | What],
        layers: Sequence[int],
        projector: nn.Module | None = None,
        *,
        depth: int | None = None,
        gather: Gather | None = None,
    ) -> None:
        self.needs = as_needs(needs)
        self.projector = projector
        self.towers = [tower] if isinstance(tower, nn.Module) else list(tower)
        self.cls = has_cls(self.towers[0])
        self.prefix = prefix_length(self.towers[0], self.cls)
        self._local = _OfThread()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        of_tower = [need for need in self.needs if need.what in OF_TOWER]
        # towers without blocks that can be read still serve methods that need nothing of them
        reads = bool(of_tower) or CLS_FEATURES in self.needs
        self.blocks = [find_blocks(one) for one in self.towers] if reads else []
        if any(need.what in OF_CLS for need in of_tower) and not self.cls:
            raise UnsupportedError(
                f"{type(self.towers[0]).__name__} has no [CLS] token: use cls='mean' where a method has it, "
                "as in fastervlm(cls='mean')"
            )
        full = getattr(self.towers[0], "fullatt_block_indexes", None)  # Qwen2.5-VL: the others have windows
        loaded = len(self.blocks[0]) if self.blocks else 0
        # a host may have loaded the first blocks only, and layers are counted from the end of all of them
        count = depth or loaded
        self.layers = [block_index(index, count) for index in layers] if self.blocks else []
        self.blocks_of: dict[Need, int] = {
            need: self.layers[0] if need.layer is None else block_index(need.layer, count, full)
            for need in of_tower
        }
        if missing := [str(need) for need, block in self.blocks_of.items() if block >= loaded]:
            raise UnsupportedError(
                f"{missing} are of a block that was not loaded: this tower has the first {loaded} of its "
                f"{count} blocks; leave layer=... out, or choose an earlier one"
            )
        # of several towers none has such a head
        self.head = find_head(self.towers[0]) if any(need.what in OF_HEAD for need in self.needs) else None
        self.readers: list[tuple[int, Reader]] = [
            (index, reader_of(attention_in(blocks[index]), gather))
            for index in sorted(set(self.blocks_of.values()))
            for blocks in self.blocks
        ]

    @property
    def key(self) -> tuple[object, ...]:
        """Captures of one tower with the same key record the same."""
        return (frozenset(self.needs), *self.layers)

    def install(self) -> None:
        """Register the hooks."""
        if self._handles:
            raise CaptureError("this capture is installed already")
        for index, reader in self.readers:
            self._handles += reader.install(self.running, index)
        if CLS_FEATURES in self.needs and self.cls:
            for blocks in self.blocks:
                for index in sorted(set(self.layers)):
                    self._handles.append(blocks[index].register_forward_hook(self._on_block(index)))
        if self.head is not None and POOLING in self.needs:
            attention = self.head.get_submodule("attention")
            self._handles.append(attention.register_forward_hook(self._on_head_attention))
        if self.head is not None and FRAME_VECTORS in self.needs:
            self._handles.append(self.head.register_forward_hook(self._on_head))
        if any(need.what in OF_PROJECTOR for need in self.needs) and self.projector is not None:
            self._handles.append(self.projector.register_forward_hook(self._on_projector))

    def remove(self) -> None:
        """Remove the hooks; harmless when there are none."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def recording(self, checks: Checks = NOW) -> Iterator[Record]:
        """Record what the tower computes in this thread inside the block."""
        outer, record = self._local.record, Record(self, checks)
        self._local.record = record
        try:
            yield record
        finally:
            self._local.record = outer

    def __enter__(self) -> Record:
        self.install()
        self._scope = self.recording()
        return self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        self._scope.__exit__(kind, error, trace)

    def running(self) -> Record | None:
        """The record of this thread, None outside of a ``recording`` block."""
        return self._local.record

    def _on_projector(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if (record := self.running()) is not None:
            # what goes in and what comes out, by one hook
            given = {"encoder_features": args[0], "tile_features": output}
            record.found |= {need: given[need.what] for need in self.needs if need.what in given}

    def _on_head_attention(self, module: nn.Module, args: object, output: tuple[Tensor, Tensor]) -> None:
        if (record := self.running()) is not None:
            record.found[POOLING] = output[1][:, 0].detach().float()  # (T, 1, n), mean over heads

    def _on_head(self, module: nn.Module, args: object, output: Tensor) -> None:
        if (record := self.running()) is not None:
            record.found[FRAME_VECTORS] = output[:, None].detach()  # (T, 1, C)

    def _on_block(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            if (record := self.running()) is not None:
                if record.grad and not torch.is_grad_enabled() and next(module.parameters()).requires_grad:
                    raise UnsupportedError(
                        "reentrant gradient checkpointing of the vision tower hides the gradient of its "
                        "[CLS] rows; use gradient_checkpointing_enable({'use_reentrant': False})"
                    )
                hidden = output[0] if isinstance(output, tuple) else output
                # by block: a model may take its features from several
                record.rows[index] = hidden[:, :1]

        return hook


class _OfThread(threading.local):
    record: Record | None = None


@dataclass(eq=False)
class Record:
    """What one run of the tower gave, for T crops of S tokens: N patches and what is before them."""

    capture: VisionCapture
    checks: Checks
    modality: str = "image"
    grad: bool = field(default_factory=torch.is_grad_enabled)
    rows: dict[int, Tensor] = field(default_factory=dict)
    found: dict[Need, Tensor] = field(default_factory=dict)
    # where patches were averaged in the tower: of crops start..stop, the patch that each is part of
    hosts: Callable[[int, int], Tensor] | None = None
    # one entry per run of the block, or per segment of a packed sequence
    _parts: dict[Need, list[Tensor]] = field(default_factory=dict)

    def attend(self, index: int, call: AttentionCall) -> None:
        """Take what is needed of an attention call of block ``index`` over all S tokens of T crops."""
        first = self.capture.prefix
        for need, block in self.capture.blocks_of.items():
            if block != index:
                continue
            if need.what == "cls_attention":
                value = first_row(call)[..., first:]
            elif need.what == "received_attention":
                value = call.received()[:, first:]
            elif need.what == "wide_attention":
                value = wide_row(call)[:, first:]
            elif need.what == "wide_keys":
                value = call.keys.transpose(1, 2).flatten(2)[:, first:]
            else:
                value = call.keys.float().mean(1)[:, first:]
            self._parts.setdefault(need, []).append(value)

    def take(self) -> dict[Need, Tensor]:
        """The captured tensors, one entry per need; raises when the tower did not run."""
        capture, found = self.capture, dict(self.found)
        for need, parts in self._parts.items():  # segments of one packed sequence follow each other
            found[need] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if CLS_FEATURES in capture.needs and capture.cls and len(self.rows) == len(set(capture.layers)):
            rows = [self.rows[index] for index in capture.layers]
            found[CLS_FEATURES] = rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)  # (T, 1, C)
        expected = [need for need in capture.needs if need.what in (*OF_TOWER, *OF_PROJECTOR, *OF_HEAD)]
        if CLS_FEATURES in capture.needs and capture.cls:
            expected.append(CLS_FEATURES)
        if missing := [str(need) for need in expected if need not in found]:
            raise CaptureError(
                f"the vision tower ran without giving {missing}; expected its blocks "
                f"{sorted(set(capture.blocks_of.values()))} to run once per call"
            )
        # in the order of the needs: of two layers, the first one that is named counts as the quantity itself
        return {need: found[need] for need in capture.needs if need in found} | found


def first_row(call: AttentionCall) -> Tensor:
    """(T, H, S) attention of the first token, which is [CLS] where a tower has one, in float32."""
    if call.mask is None and call.queries.shape[1] == call.keys.shape[1]:
        heads, keys = call.queries.shape[1], call.keys.transpose(1, 2).flatten(2)
        return row_attention(call.queries[:, :, 0].flatten(1), keys, heads, call.scaling)
    rows = torch.zeros(call.queries.shape[0], 1, dtype=torch.int64, device=call.queries.device)
    return call.attention(rows)[:, :, 0]


def wide_row(call: AttentionCall) -> Tensor:
    """(T, S) attention of the first token where its H heads of width d are read as one of width H * d."""
    heads, width = call.queries.shape[1], call.queries.shape[1] * call.queries.shape[3]
    if call.mask is not None or call.keys.shape[1] != heads:
        raise UnsupportedError(
            f"{type(call.module).__name__} masks keys or shares them between heads, so that its heads cannot "
            "be read as one; use a method that reads them one by one, e.g. 'fastervlm@64'"
        )
    query, keys = call.queries[:, :, 0].flatten(1), call.keys.transpose(1, 2).flatten(2)
    return row_attention(query, keys, 1, width**-0.5)[:, 0]


def row_attention(query: Tensor, keys: Tensor, heads: int, scale: float) -> Tensor:
    """Softmaxed attention (T, H, S) of one query per crop, in float32.

    query (T, C) and keys (T, S, C) are plain projections. On the CPU the keys are read as they lie in memory,
    crop by crop, without a copy per head.
    """
    crops, width = query.shape
    each = query.float().view(crops, heads, 1, -1)  # (T, H, 1, d)
    if query.device.type != "cpu":  # a few launches are worth more there than one copy of the keys
        wide = keys.float().view(crops, -1, heads, width // heads).permute(0, 2, 3, 1)  # (T, H, d, S)
        each = each.flatten(0, 1)
        logits = torch.baddbmm(each[..., :1], each, wide.flatten(0, 1), beta=0, alpha=scale)
        return logits.softmax(dim=-1).view(crops, heads, -1)
    rows = keys.shape[1] if keys.dtype == torch.float32 else _ROWS_AT_ONCE
    crop_logits = []  # (H, S) each
    for own, of_crop in zip(each * scale, keys, strict=True):
        parts = [
            torch.bmm(own, part.float().view(-1, heads, width // heads).permute(1, 2, 0))  # (H, 1, n)
            for part in of_crop.split(rows)
        ]
        crop_logits.append(torch.cat(parts, dim=-1)[:, 0])
    return torch.stack(crop_logits).softmax(dim=-1)
