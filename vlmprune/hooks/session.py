# SPDX-License-Identifier: Apache-2.0
"""Session: what is attached to one model, and nothing else.

    model.generate                  patched: checks that were left for later are read when it returns
      inner.get_image_features      patched: records what methods need; the pictures travel on the returned
                                    object, because transformers may encode long before it calls forward
      inner.forward                 patched: opens the state of the forward, and closes it however it ends
        language_model              pre-hook: pictures are found, slots act, masks and positions are put right
                                    hook: full length again, and the cache learns what was cut
          decoder layers            hooks of the slots
          _deepstack_process        patched where there is one: features added later follow the cuts
    create_masks_for_generate       patched: static caches keep the 2-D mask, for masks over held slots

The state of a forward is thread-local and dies with it; after ``detach`` the model is exactly what it was.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..core.budget import Budget
from ..core.combine import by_slot
from ..core.method import Method, Need, Positions, SlotName, needs, needs_of
from ..core.report import Report
from ..errors import InvariantError, UnsupportedError
from .adapter import Adapter, Modality
from .entrance import leave, locate, open_views, shortened, take_pictures
from .patches import PatchedMethod, forget_graphs, patches_of
from .sequence.cache import cache_in, goes_on, is_paged, state_of
from .sequence.masks import no_positions, uses_flash
from .slots import Attachment, Handle, Slot, build_slots
from .state import ForwardState, OfThread
from .vision.capture import VisionCapture
from .vision.pictures import Picture

Plans = Sequence[tuple[Method, Budget | None]]


class Session:
    """Methods attached to one model; also the handle that users hold.

    Attributes:
        enabled: set False for a dense run without detaching. Caches that were cut keep working.
        attached: whether the hooks are on the model.
        slots: what acts, by slot.
        serve: gives pictures that were encoded earlier, see ``EncodedImages``.
    """

    def __init__(
        self,
        adapter: Adapter,
        plans: Plans,
        spec: str,
        *,
        positions: Positions | None = None,
        strict: bool = False,
        frames: bool = False,
    ) -> None:
        self.adapter, self.spec = adapter, spec
        # asked each time: the capture is made below, and every forward has a state of its own
        self.attachment = Attachment(
            adapter, spec, strict, positions, lambda: self.state, lambda: self.capture.running(), frames
        )
        self._refuse(plans, positions)
        self.enabled = True
        self.attached = False
        self.serve: Callable[[Modality], tuple[Any, list[Picture]]] | None = None
        self.slots: dict[SlotName, Slot] = build_slots(self.attachment, plans)
        self.reads_text = any(needs(slot.method, "text_embeds") for slot in self.slots.values())
        # what keeps tokens by the picture alone does not ask where the prompt ends
        self.reads_prompt = self.reads_text or not set(self.slots) <= {"encoder", "before_lm"}
        self.capture: VisionCapture = adapter.capture(self._needs())
        self._last: Report | None = None
        # for caches that it cut: they outlive it, and must not keep it and its model alive
        self._reference = weakref.ref(self)
        self.local = OfThread()
        self._installed: list[Handle] = []
        self._blocks, self._entering = 0, threading.Lock()

    def _refuse(self, plans: Plans, positions: Positions | None) -> None:
        adapter = self.adapter
        if positions is not None and positions not in adapter.positions:
            raise UnsupportedError(
                f"positions={positions!r} has no meaning for {adapter.model_type}, whose tokens have 2-D "
                f"(M-RoPE) positions that cannot be counted anew; use positions={adapter.positions[0]!r}, "
                "its default"
            )
        shards = getattr(adapter.model, "_tp_size", None) or 1
        if shards > 1 and set(by_slot(plans)) != {"before_lm"}:
            raise UnsupportedError(
                f"{self.spec!r} reads attention heads of the language model, which tensor parallel spreads "
                f"over {shards} processes: each would keep other tokens; prune before the language model, "
                "e.g. with 'fastervlm@64'"
            )

    def _needs(self) -> list[Need]:
        """What the vision tower and the projector have to be watched for."""
        found: dict[Need, None] = {}
        for name, slot in self.slots.items():
            if name in ("before_lm", "attention"):
                found |= dict.fromkeys(needs_of(slot.method))
                if slot.method.layout == "spatial":
                    found[Need("tile_features")] = None
        return list(found)

    def __deepcopy__(self, memo: dict) -> None:
        raise UnsupportedError("a model cannot be copied while pruning is attached; detach first")

    # --- what users read --------------------------------------------------------------------------

    @property
    def last(self) -> Report | None:
        """Report of the last forward that read a prompt."""
        self.settle()
        self._count_prepared()
        return self._last

    @last.setter
    def last(self, report: Report | None) -> None:
        self._last = report

    @property
    def method(self) -> Method:
        """The method that cuts, or else the one that acts."""
        return next(iter(self.slots.values())).method

    @property
    def budget(self) -> Budget | None:
        """Its budget."""
        return next(iter(self.slots.values())).budget

    @property
    def in_tower(self) -> bool:
        """Whether the vision tower computes something else for this session than for others."""
        return any(slot.in_tower for slot in self.slots.values())

    @property
    def strict(self) -> bool:
        """Whether pictures with fewer tokens than an absolute budget are refused."""
        return self.attachment.strict

    @property
    def positions(self) -> Positions:
        """Position policy of the first cut."""
        return self.attachment.policy(self.method)

    @property
    def depth(self) -> int:
        """Decoder layers of the language model."""
        return self.attachment.depth

    @property
    def state(self) -> ForwardState | None:
        """The forward that runs in this thread; none while another prompt runs aside of it."""
        state = self.local.state
        return None if state is None or state.aside else state

    def __repr__(self) -> str:
        attached = "attached" if self.attached else "detached"
        return f"<vlmprune {self.spec} on {type(self.adapter.model).__name__}, {attached}>"

    # --- attach and detach ------------------------------------------------------------------------

    def attach(self) -> Session:
        """Install all hooks; on any failure none stays."""
        model = self.adapter.model
        for modality in self.adapter.modalities:
            other = self.adapter.inner.__dict__.get(modality.encode)
            if isinstance(other, PatchedMethod):
                raise InvariantError(
                    f"{type(model).__name__} has {other.session.spec!r} attached already; detach it first"
                )
        self.local = OfThread()  # what an earlier block left behind, say where it failed, is gone
        try:
            # one by one, so that detach finds all that was put on when the next one fails
            for patch in patches_of(self):
                patch.install()
                self._installed.append(patch)
            language_model = self.adapter.language_model
            self._installed += [
                language_model.register_forward_pre_hook(self._before_lm, with_kwargs=True),
                language_model.register_forward_hook(self._after_lm),
                model.register_forward_pre_hook(self._note_logits, with_kwargs=True),
            ]
            for slot in self.slots.values():
                self._installed += slot.hooks()
            if uses_flash(language_model.config):
                self._installed += [
                    layer.register_forward_pre_hook(no_positions, with_kwargs=True)
                    for layer in language_model.layers
                ]
            # first: what it had put on when it fails comes off again
            self._installed.append(self.capture)
            self.capture.install()
        except BaseException:
            self.detach()
            raise
        self.attached = True
        forget_graphs(model)
        return self

    def detach(self) -> None:
        """Leave the model exactly as it was; harmless when called again."""
        if self.attached:
            forget_graphs(self.adapter.model)
        self.attached = False
        # last one first: what was put around something else comes off before it
        while self._installed:
            self._installed.pop().remove()

    def __enter__(self) -> Session:
        with self._entering:
            if not self.attached:
                self.attach()
            self._blocks += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # read before detach; raised below only where the block raised nothing itself
        lost = self.local.unplaced and not self.local.opened
        with self._entering:
            self._blocks = max(self._blocks - 1, 0)
            if not self._blocks:  # others of other threads, or around this one, go on
                self.detach()
        if kind is None:
            self.settle()
            if lost:
                raise self._never_placed()

    # --- one forward ------------------------------------------------------------------------------

    def settle(self) -> None:
        """Read the checks that were left for later, and raise the first that failed."""
        self.local.checks.settle()

    def _never_placed(self) -> InvariantError:
        return InvariantError(
            f"pictures were encoded while {self.spec!r} was attached, but no forward of "
            f"{type(self.adapter.inner).__name__} placed them, so nothing was pruned; embeddings that were "
            "merged by hand cannot be pruned: pass pixels, or what the encoder returned, to the model itself"
        )

    def _note_logits(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        wanted = kwargs.get("logits_to_keep", 0) if isinstance(kwargs.get("logits_to_keep"), int) else 0
        # the prompt ends before drafts of assisted decoding, and before an answer that is scored
        self.local.drafts = max(wanted - 1, 0)
        given = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        # a loss reads the logits of all columns
        self.local.wants_logits = None if kwargs.get("labels") is not None else (given, wanted)

    def begin(self, kwargs: dict[str, Any]) -> ForwardState:
        """Open the state of one forward of the multimodal model."""
        cache, local = cache_in(kwargs), self.local
        state = ForwardState(
            kwargs.get("input_ids"),
            kwargs.get("inputs_embeds"),
            Report(self.spec),
            local.checks,
            generated=local.drafts,
            active=self.enabled,
            reads_text=self.reads_text,
            counted=local.counts or kwargs.get("position_ids") is None,
            arguments=kwargs,
        )
        if local.wants_logits is not None and state.new_tokens and local.wants_logits[0] is state.given:
            state.logits = local.wants_logits[1]  # of the call around this one
        state.continues = goes_on(cache, state.new_tokens)
        # all other slots read in decode steps what the cache holds
        state.reads_held = not set(self.slots) <= {"encoder", "before_lm", "inside_lm"}
        # a draft or a question for logits is of this forward alone, also where it fails
        local.state, local.opened, local.drafts, local.wants_logits = state, True, 0, None
        if self.adapter.text_type is not None:
            # masks that the model makes of them before its language model are for the uncut sequence
            state.given_mask, state.given_types = kwargs.get("attention_mask"), kwargs.get(self.adapter.types)
        source = take_pictures(state, self.adapter, self.spec, kwargs)
        if source is not None and is_paged(cache):
            raise UnsupportedError(
                f"{self.spec!r} cannot prune pictures in continuous batching, whose cache holds pages of "
                "many requests; use generate, or vlmprune serve for many clients"
            )
        if state.pictures or not self.enabled:
            local.unplaced = 0
        elif source is None and state.input_ids is None and not state.continues and local.unplaced:
            raise self._never_placed()
        if self.reads_prompt:
            state.generated += self._decoded(state, source, cache, kwargs.get("use_cache"))
        return state

    def _decoded(self, state: ForwardState, source: Any, cache: Any, use_cache: bool | None) -> int:
        """Tokens at the end of this forward that earlier ones generated: decoding without a cache feeds them
        again.

        What was chosen for the prompt has to be chosen again, so they are no part of it. The same picture
        object tells such a step from another prompt that begins alike.
        """
        given = state.inputs_embeds if state.input_ids is None else state.input_ids
        earlier, self.local.prompt = self.local.prompt, None
        if source is None or given is None or cache is not None or use_cache is not False:
            return 0
        new = 0
        if earlier is not None and earlier[0]() is source and given.shape[1] > earlier[1].shape[1]:
            prompt = earlier[1].to(given.device)
            if given.shape[0] == prompt.shape[0] and torch.equal(given[:, : prompt.shape[1]], prompt):
                new = given.shape[1] - prompt.shape[1]
        self.local.prompt = earlier if new else (weakref.ref(source), given)
        return new

    def _before_lm(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        state = self.state
        if state is None:
            if self.enabled and self.local.unplaced:
                raise self._never_placed()
            return None
        state.entered = True
        state.embeds = kwargs["inputs_embeds"]
        state.report.sequence = (state.embeds.shape[1], state.embeds.shape[1])
        state.cache = cache_in(kwargs)
        state.cache_state = state_of(state.cache)
        if state.cache_state is not None:
            # from here to close the model builds masks, for which the cache must tell the slots that it holds
            state.cache_state.inside = True
        # made only if asked for: a call without pictures and without a cut cache is left alone
        state.open_views = lambda: open_views(state, self.adapter, kwargs)
        if state.pictures and self.enabled:
            mask = state.given_mask if self.adapter.text_type is not None else kwargs.get("attention_mask")
            locate(state, self.adapter, mask)
        if state.placements:
            self._enter_with_pictures(state)
        elif state.cache_state is not None:
            for slot in self.slots.values():
                slot.enter(state)
        if state.cache_state is None and not (state.viewed and state.views.cuts):
            return None  # nothing was cut yet: the call is left alone
        return args, shortened(state, self.adapter, kwargs)

    @torch.compiler.disable  # a prompt is read once: tracing this would cost more than it saves
    def _enter_with_pictures(self, state: ForwardState) -> None:
        for slot in self.slots.values():
            if slot.method.sliding and self.adapter.numbers_padding:
                slot.attachment.check_numbers(slot.method, state)
            slot.enter(state)

    def _after_lm(self, module: nn.Module, args: tuple, output: Any) -> Any:
        state = self.state
        if state is not None and state.viewed and (state.views.cuts or state.marks or state.notes):
            leave(state, output, self._reference)
        return output

    def finish(self, state: ForwardState) -> None:
        """Check that everything happened that had to, and keep the report."""
        if state.pictures and not state.entered:
            raise InvariantError(
                f"images were encoded but the language model of {type(self.adapter.model).__name__} was not "
                "entered: nothing was pruned"
            )
        # a hook that did not run raises nothing: a graph, or another forward, may have gone around it
        missed = set().union(*[slot.missed(state) for slot in self.slots.values()])
        if missed:
            raise InvariantError(
                f"{self.spec!r} acts at decoder layers {sorted(missed)}, but these ran without its hooks; "
                "was a part of the model compiled, or its forward replaced, after attaching? Detach, and "
                "attach again"
            )
        # a decode step, or a turn of text only, belongs to the report of the prompt
        if state.continues and not state.pictures and (report := self.local.report or self._last) is not None:
            if not torch.compiler.is_compiling():  # a graph would have the number of the step as an input
                report.decode_steps += state.new_tokens == 1
                self.local.prepared = 0
            return
        if self.local.prepared:
            self._count_prepared()
        if not state.pictures:
            state.report.note = "no images in this call" if self.enabled else "disabled"
        else:
            state.report.note = "; ".join([*filter(None, [self.adapter.note]), *self.attachment.notes])
        self._last = self.local.report = state.report

    def prepared(self, new: int) -> None:
        """generate prepares a forward of ``new`` tokens on a static cache, which may run in a graph."""
        self.local.prepared += new == 1

    def _count_prepared(self) -> None:
        """Count the decode steps that ran in graphs, which count nothing themselves."""
        if (report := self.local.report or self._last) is not None:
            report.decode_steps += self.local.prepared
        self.local.prepared = 0

    def close(self) -> None:
        """Forget the forward of this thread; a cut cache speaks of tokens seen again."""
        state, self.local.state = self.local.state, None
        if state is not None and state.cache_state is not None:
            state.cache_state.inside = False
