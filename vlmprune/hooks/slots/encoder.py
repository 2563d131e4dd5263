# SPDX-License-Identifier: Apache-2.0
"""The encoder slot: shortens inside the vision tower, so that its later blocks read fewer patches.

Behind each block that the method names, patches leave or are averaged. Later blocks run on what is left; a
bias on their logits hides the filling of shorter crops and lets a row that stands for s patches weigh as s
(ToMe's proportional attention: + log s). Behind the projector every patch gets its place back, zeros where it
left, so that the model's own geometry (tiles, newlines) sees what it expects. Which ones are there travels
through that geometry as one more captured channel, ``present``, and is what stays of the prompt.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.budget import Budget
from ...core.deferred import Checks
from ...core.encoder import EncoderBlock, Shortened
from ...core.method import Method, Need, needs
from ...core.select import top_k
from ...errors import CaptureError, InvariantError, UnsupportedError
from ..attention_call import AttentionCall, compared_forms
from ..attention_tap import AttentionTap, reads_interface
from ..state import ForwardState
from ..vision.capture import Record, block_index, first_row
from ..vision.pictures import Picture
from ..vision.tower import attention_in, attention_of, find_blocks, has_cls, prefix_length
from . import Attachment, Handle, all_or_none
from .cutting import Cut, cut_sequence, listed

PRESENT = Need("present")
# the row that each row (T, n) is averaged into, the rows (T, m) that stay in order, and which (T, n) are left
Step = tuple[Tensor | None, Tensor | None, Tensor]


@dataclass(eq=False)
class Shortening:
    """One run of the tower: T crops, n rows left of N patches.

    Args:
        record: of the encoder call that it belongs to.
        total: N.
        index: (T, n) patch of every row, -1 for filling.
        sizes: (T, n) patches that a row stands for, 0 for filling.
        notes: (T, n) of the method.
        biased: whether later blocks need a bias on their logits.
        seconds: spent on choosing.
        steps: what became of the rows behind every block that was asked.
    """

    record: Record
    total: int
    index: Tensor
    sizes: Tensor
    notes: Tensor | None = None
    biased: bool = False
    seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def begin(cls, record: Record, hidden: Tensor) -> Shortening:
        """Before anything left, for patches (T, N, C)."""
        crops, total = hidden.shape[:2]
        index = torch.arange(total, device=hidden.device).expand(crops, -1)
        return cls(record, total, index, torch.ones(crops, total, device=hidden.device))

    @property
    def alive(self) -> Tensor:
        """(T, n) bool, rows that are patches."""
        return self.index >= 0

    def bias(self, prefix: int) -> Tensor | None:
        """(T, 1, 1, prefix + n) on the logits of the next block: log of the sizes, -inf on filling."""
        if not self.biased:
            return None
        front = self.sizes.new_zeros(self.sizes.shape[0], prefix)
        return torch.cat([front, self.sizes.log()], dim=1)[:, None, None]

    def shorten(self, patches: Tensor, answer: Shortened) -> Tensor:
        """Patches (T, n, C) without what left, every crop filled up to the longest."""
        self.notes = answer.notes
        if answer.keep is None:
            return patches
        keep = answer.keep & self.alive
        if answer.into is not None:
            patches = self._averaged(patches, answer.into)
        # asks the device once, unless the method knows it
        lengths = keep.sum(dim=1).tolist() if answer.count is None else [answer.count]
        width = max(lengths)
        if width == keep.shape[1]:
            self.steps.append((answer.into, None, keep))
            return patches
        # those that stay, in order
        order = (~keep).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
        self.steps.append((answer.into, order, keep))
        self.index, self.sizes = self.index.gather(1, order), self.sizes.gather(1, order)
        if min(lengths) < width:
            filling = torch.arange(width, device=order.device) >= keep.sum(dim=1, keepdim=True)
            self.index = self.index.masked_fill(filling, -1)
            self.sizes = self.sizes.masked_fill(filling, 0.0)
            self.biased = True
        if self.notes is not None:
            self.notes = self.notes.gather(1, order)
        self.biased = self.biased or answer.into is not None
        return patches.gather(1, order[..., None].expand(-1, -1, patches.shape[2]))

    def _averaged(self, patches: Tensor, into: Tensor) -> Tensor:
        # a row that stands for several patches counts as often
        weights = self.sizes[..., None]
        summed = torch.zeros_like(patches, dtype=torch.float32)
        summed.scatter_add_(1, into[..., None].expand_as(patches), patches.float() * weights)
        self.sizes = torch.zeros_like(self.sizes).scatter_add(1, into, self.sizes)
        return (summed / self.sizes[..., None].clamp_min(1)).to(patches.dtype)

    def hosts(self, start: int, stop: int) -> Tensor:
        """(crops, N) the patch in whose place each patch of some crops is left, -1 where it was dropped."""
        some = slice(start, stop)
        part = torch.arange(self.total, device=self.index.device).expand(self.index[some].shape[0], -1)
        for into, order, keep in self.steps:
            if into is not None:
                part = _numbers_at(into[some], part)
            left = torch.arange(keep.shape[1], device=keep.device).expand(keep[some].shape)
            part = _numbers_at(left.masked_fill(~keep[some], -1), part)
            if order is not None:
                place = torch.full(keep[some].shape, -1, device=keep.device)
                numbers = torch.arange(order.shape[1], device=keep.device).expand(len(place), -1)
                part = _numbers_at(place.scatter(1, order[some], numbers), part)
        return _numbers_at(self.index[some], part)

    def restore(self, rows: Tensor) -> Tensor:
        """Rows (T, n, D) at their places among all N patches, zeros elsewhere."""
        at = self.index.masked_fill(~self.alive, self.total)
        # the last place takes the filling
        full = rows.new_zeros(rows.shape[0], self.total + 1, rows.shape[2])
        return full.scatter(1, at[..., None].expand_as(rows), rows)[:, : self.total]


_DOES = "shortens inside the vision tower"


class EncoderSlot:
    """Shortens the sequence of a vision tower behind some of its blocks."""

    in_tower: ClassVar[bool] = True

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        self.attachment, self.method, self.budget = attachment, method, budget
        self._local = threading.local()
        self.projector = self._readable_projector()
        adapter = attachment.adapter
        blocks = list(find_blocks(adapter.vision_tower))
        self.blocks = blocks[: block_index(adapter.layers[0], len(blocks)) + 1]  # later ones feed nothing
        self.prefix = prefix_length(adapter.vision_tower, has_cls(adapter.vision_tower))
        self.asked = frozenset(method.shortens_at(len(self.blocks)))
        self.reads_attention = needs(method, "cls_attention") or needs(method, "received_attention")
        if needs(method, "cls_attention") and not self.prefix:
            raise UnsupportedError(
                f"{type(adapter.vision_tower).__name__} has no [CLS] token, whose attention "
                f"{method.name} reads; use a method that needs none, e.g. 'tome@64/crop'"
            )

    def _readable_projector(self) -> nn.Module:
        """The projector, where tower and projector let patches leave."""
        adapter, name = self.attachment.adapter, self.method.name
        projector = adapter.projector
        if not adapter.shortens or len(adapter.layers) != 1 or not isinstance(projector, nn.Module):
            raise UnsupportedError(
                f"{name} {_DOES}, which needs one tower of plain blocks, read at one layer, and a projector "
                f"of single patches; {adapter.model_type} is built otherwise. Prune behind it, e.g. with "
                "'divprune@64'"
            )
        attention = attention_of(find_blocks(adapter.vision_tower)[0])
        if attention is None or not reads_interface(attention):
            raise UnsupportedError(
                f"{name} needs the attention of {type(adapter.vision_tower).__name__}, which attends by "
                "itself; prune behind the tower, e.g. with 'divprune@64'"
            )
        return projector

    def hooks(self) -> list[Handle]:
        if self.budget is None:
            return []
        handles: list[Handle] = []
        with all_or_none(handles):
            # every block, asked or not: its logits need the bias of what was averaged or filled up before it
            for number, block in enumerate(self.blocks):
                tap = AttentionTap(attention_in(block), self._listen, self._bias)
                handles.append(tap)
                tap.install()
                handles.append(block.register_forward_hook(self._behind(number)))
            handles.append(self.projector.register_forward_hook(self._behind_projector))
        return handles

    def missed(self, state: ForwardState) -> set[int]:
        return set()

    # --- in the tower -----------------------------------------------------------------------------

    def _run(self) -> Shortening | None:
        """The run of this thread's encoder call, None outside of one or before its first block ended."""
        run, record = getattr(self._local, "run", None), self.attachment.record()
        return run if run is not None and run.record is record else None

    @torch.no_grad()
    def _listen(self, call: AttentionCall, output: Tensor) -> None:
        record = self.attachment.record()
        if record is None:
            return
        self._local.call = call
        known = compared_forms(call, record.checks)
        if self.reads_attention and call.form not in known:
            first = torch.zeros(call.queries.shape[0], 1, dtype=torch.int64, device=call.queries.device)
            call.check(first, None, call.attention(first), output, record.checks, known)

    def _bias(self, call: AttentionCall) -> Tensor | None:
        run = self._run()
        return None if run is None else run.bias(self.prefix)

    def _refuse_pooled(self, record: Record) -> None:
        adapter = self.attachment.adapter
        if record.modality in adapter.pools:
            raise UnsupportedError(
                f"{adapter.model_type} averages the patches of a {record.modality} in front of its "
                f"projector, where {self.method.name} left some out; prune behind the tower, e.g. with "
                "'divprune@64'"
            )

    def _behind(self, number: int) -> Callable[..., Any]:
        tower = self.attachment.adapter.vision_tower

        def hook(module: nn.Module, args: object, output: Any) -> Any:
            record = self.attachment.record()
            if record is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output  # (T, p + n, C)
            # a new call of the encoder: what an earlier one left in this thread is of other pictures
            if number == 0:
                self._refuse_pooled(record)
                self.attachment.refuse_checkpointing(tower, self.method, _DOES)
                self._local.run = Shortening.begin(record, hidden[:, self.prefix :])
            if number not in self.asked:
                return None
            started = time.perf_counter()
            run, call = self._local.run, self._local.call
            self._local.call = None
            patches = hidden[:, self.prefix :]
            left = len(self.blocks) - 1 - number
            answer = self.method.shorten(self._block(run, call, patches, left), self._target(run.total))
            self._check(answer, run)
            shorter = run.shorten(patches, answer)
            run.seconds += time.perf_counter() - started
            # no patch left here: the output of the block goes on as it is
            if shorter is patches:
                return None
            hidden = torch.cat([hidden[:, : self.prefix], shorter], dim=1)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _target(self, total: int) -> int:
        return total if self.budget is None else min(self.budget.count(total), total)

    @torch.no_grad()
    def _block(self, run: Shortening, call: AttentionCall, patches: Tensor, left: int) -> EncoderBlock:
        """What the method reads; rows of attention only where it needs them."""
        first = self.prefix
        return EncoderBlock(
            left,
            patches.detach(),
            call.keys.detach(),
            call.values.detach(),
            run.sizes,
            run.alive,
            first_row(call)[..., first:] if needs(self.method, "cls_attention") else None,
            call.received()[:, first:] if needs(self.method, "received_attention") else None,
            run.notes,
        )

    def _check(self, answer: Shortened, run: Shortening) -> None:
        for name in ("keep", "into", "notes"):
            value = getattr(answer, name)
            if value is not None and value.shape != run.index.shape:
                raise InvariantError(
                    f"{self.method.name}: shorten returned {name} of shape {tuple(value.shape)}; expected "
                    f"{tuple(run.index.shape)}, one per row"
                )

    def _behind_projector(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        run, self._local.call = self._run(), None  # its keys and values would live on with the thread
        if run is None:
            return None
        front = output.shape[1] - run.index.shape[1]  # [CLS], where the model reads it
        present = run.restore(run.alive[..., None].float())  # (T, N, 1)
        k = self._target(run.total)
        run.record.checks.require(
            (present.sum(dim=1) == k).all(),
            lambda: InvariantError(
                f"{self.method.name} left {present.sum(dim=1)[:, 0].int().tolist()} patches of {run.total}; "
                f"expected {k} in every crop"
            ),
        )
        run.record.found[PRESENT] = present
        if any(into is not None for into, _, _ in run.steps):
            run.record.hosts = run.hosts
        # the last that is done in the tower: a later call must not find this run
        self._local.run = None
        self._local.seconds = getattr(self._local, "seconds", 0.0) + run.seconds
        return torch.cat([output[:, :front], run.restore(output[:, front:])], dim=1)

    # --- before the language model ----------------------------------------------------------------

    def enter(self, state: ForwardState) -> None:
        """Drop from the prompt what left the tower."""
        if not state.placements or self.budget is None:
            return
        state.report.seconds += self._local.__dict__.pop("seconds", 0.0)
        pictures, _ = listed(state)
        cuts = [self._cut(picture, self.budget, state.checks) for picture in pictures]
        policy = self.attachment.policy(self.method)
        cut_sequence(state, cuts, policy, self.attachment.spec)

    def _cut(self, picture: Picture, budget: Budget, checks: Checks) -> Cut | None:
        if PRESENT not in picture.captured:
            raise CaptureError(
                f"a picture was encoded without {self.method.name}; encode it while "
                f"{self.attachment.spec!r} is attached"
            )
        present = picture.captured[PRESENT][:, 0]
        if budget.scope != "crop" and len(picture.grids) > 1:
            raise UnsupportedError(
                f"{self.method.name} spends its budget in every tile of a picture: write "
                f"'@{budget.keep}/crop' instead of '@{budget}'"
            )
        checks.require(
            ((present == 0) | (present == 1)).all(),
            lambda: UnsupportedError(
                f"{self.attachment.adapter.model_type} averages patches of this picture behind its "
                f"projector, where {self.method.name} left some out; use fewer tiles, or prune behind the "
                "tower"
            ),
        )
        if len(picture.grids) == 1:  # one crop: how many of it are left is known, and was checked
            keep_idx = top_k(present[None], self._target(picture.count))[0]
        else:
            keep_idx = present.nonzero()[:, 0]
        if keep_idx.shape[0] == picture.count:
            return None
        return replace(Cut.of(picture, keep_idx), joins=picture.joins)


def _numbers_at(values: Tensor, at: Tensor) -> Tensor:
    """(crops, N) ``values`` (crops, n) at the rows ``at`` (crops, N), -1 where these are -1."""
    return values.gather(1, at.clamp_min(0)).masked_fill(at < 0, -1)
