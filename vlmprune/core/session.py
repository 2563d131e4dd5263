# SPDX-License-Identifier: Apache-2.0
"""Session: the hooks of one attached method, and nothing else.

    model.generate
      inner.get_image_features      wrapped: records what the method needs; pictures ride on the returned object, because
                                    transformers may encode long before it calls forward
      inner.forward                 wrapped: opens the call record, and closes it however the forward ends, Ctrl-C included
        language_model              entrance: cut, masks, positions; exit: full length again, cache bookkeeping
          _deepstack_process    wrapped where there is one: features that are added after a layer follow the cuts
    model.create_masks_for_generate wrapped: static caches keep the 2-D mask, so that masks are made in the cut frame

Call state is thread-local and dies with the call; after ``detach`` the model is exactly what it was.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate

from ..errors import CaptureError, InvariantError, UnsupportedError
from ..spec import Budget
from .base import Method, by_stage
from .cache import cache_in, state_of
from .call import Call
from .entrance import Entrance
from .frames import uses_flash
from .inside import InsideHost
from .pictures import Picture
from .report import Report
from .reweight import ReweightHost
from .wrappers import Encode, KeepMask2D, Recorded, Stacked, Wrapper, forget_graphs, riders

# generate looks these up on the model; the second exists on a few families of transformers 4.57
MASK_MAKERS = ("create_masks_for_generate", "_prepare_4d_causal_attention_mask_with_cache_position")


class Session:
    """One method attached to one model; also the handle that users hold.

    Attributes:
        enabled: set False for a dense run without detaching. Caches that were cut keep working.
        last: Report of the last call that read a prompt.
    """

    def __init__(
        self,
        adapter: Any,
        plans: Sequence[tuple[Method, Budget | None]],
        spec: str,
        *,
        positions: str | None = None,
        strict: bool = False,
    ) -> None:
        slots = by_stage(plans)
        if positions is not None and positions not in adapter.positions:
            raise UnsupportedError(
                f"positions={positions!r} has no meaning for {adapter.model_type}, whose tokens have places in a picture and not "
                f"in a sequence; use positions={adapter.positions[0]!r}, its default"
            )
        shards = getattr(adapter.model, "_tp_size", None) or 1
        if shards > 1 and set(slots) - {"before_lm"}:
            raise UnsupportedError(
                f"{spec!r} reads attention heads of the language model, which tensor parallel spreads over {shards} processes: "
                "each would keep other tokens; prune before the language model, e.g. with 'fastervlm@64'"
            )
        self.adapter, self.spec, self.strict, self.override = adapter, spec, strict, positions
        self.method, self.budget = next(slots[stage] for stage in ("before_lm", "inside_lm", "attention") if stage in slots)
        self.enabled = True
        self.attached = False
        self.last: Report | None = None
        self.serve: Callable[[Any], tuple[Any, list[Picture]]] | None = None  # pictures encoded earlier, set by a shelf
        self.reference = weakref.ref(self)
        self.depth = adapter.language_model.config.num_hidden_layers
        self.before = slots.get("before_lm")
        self.inside = InsideHost(self, *slots["inside_lm"]) if "inside_lm" in slots else None
        self.reweight = (
            ReweightHost(self, slots["attention"][0].prepare(adapter.language_model)) if "attention" in slots else None
        )
        self.capture = self._capture()
        self._entrance = Entrance(self)
        self._local = threading.local()
        self._handles: list[Any] = []
        self._wrapped: list[tuple[nn.Module, str]] = []
        self._forward: Recorded | None = None

    def _capture(self) -> Any:
        if self.before is None:
            return self.adapter.capture((), None)
        method = self.before[0]
        needs = [*method.needs, *(("tile_features",) if method.layout == "spatial" else ())]
        return self.adapter.capture(needs, getattr(method, "layer", None))

    def __deepcopy__(self, memo: dict) -> None:
        raise UnsupportedError("a model cannot be copied while pruning is attached; detach first")

    @property
    def positions(self) -> str:
        """Position policy of the first cut."""
        return self.policy(self.method)

    def policy(self, method: Method) -> str:
        """Position policy of a method in this session; a family that knows one only imposes it."""
        allowed = self.adapter.positions
        return self.override or (method.positions if method.positions in allowed else allowed[0])

    @property
    def call(self) -> Call | None:
        """The call record of this thread."""
        return getattr(self._local, "call", None)

    # attach and detach ----------------------------------------------------------------------------------------------

    def attach(self) -> Session:
        """Install all hooks; on any failure none stays."""
        inner, model = self.adapter.inner, self.adapter.model
        for modality in self.adapter.modalities:
            other = inner.__dict__.get(modality.encode)
            if isinstance(other, Wrapper):
                raise InvariantError(f"{type(model).__name__} has {other.session.spec!r} attached already; detach it first")
        try:
            for modality in self.adapter.modalities:
                self._wrap(inner, modality.encode, Encode(self, getattr(inner, modality.encode), modality))
            for name in MASK_MAKERS:
                if name == MASK_MAKERS[0] or hasattr(model, name):
                    self._wrap(model, name, KeepMask2D(self, getattr(model, name, create_masks_for_generate)))
            language_model = self.adapter.language_model
            if self.adapter.deepstack is not None:
                name = self.adapter.deepstack
                self._wrap(language_model, name, Stacked(self, getattr(language_model, name)))
            self._forward = Recorded(self, inner)
            self._forward.install()
            self._handles = [
                language_model.register_forward_pre_hook(self._enter, with_kwargs=True),
                language_model.register_forward_hook(self._leave),
            ]
            if self.inside is not None:
                self._handles += [model.register_forward_pre_hook(self._drafts, with_kwargs=True), *self.inside.hooks()]
            if self.reweight is not None:
                self._handles += self.reweight.hooks()
            if uses_flash(language_model.config):
                self._handles += [
                    layer.register_forward_pre_hook(_no_positions, with_kwargs=True) for layer in language_model.layers
                ]
            self.capture.install()
        except BaseException:
            self.detach()
            raise
        self.attached = True
        forget_graphs(model)
        return self

    def _wrap(self, module: nn.Module, name: str, wrapper: Wrapper) -> None:
        if name in module.__dict__:
            raise InvariantError(
                f"{type(module).__name__}.{name} is replaced on the instance already; undo that before attaching"
            )
        module.__dict__[name] = wrapper
        self._wrapped.append((module, name))

    def detach(self) -> None:
        """Leave the model exactly as it was; harmless when called again."""
        if self.attached:
            forget_graphs(self.adapter.model)
        self.attached = False
        if self._forward is not None:
            self._forward.remove()
            self._forward = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.capture.remove()
        while self._wrapped:
            module, name = self._wrapped.pop()
            del module.__dict__[name]

    def __enter__(self) -> Session:
        return self if self.attached else self.attach()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        never_opened = getattr(self._local, "unplaced", 0) and not getattr(self._local, "opened", False)
        self.detach()
        if kind is None and never_opened:
            raise self._never_placed()

    def _never_placed(self) -> InvariantError:
        inner = type(self.adapter.inner).__name__
        return InvariantError(
            f"pictures were encoded while {self.spec!r} was attached, but no forward of {inner} placed them, so nothing was pruned; "
            f"embeddings that were merged by hand cannot be pruned: pass pixels, or what the encoder returned, to the model itself"
        )

    def __repr__(self) -> str:
        return f"<vlmprune {self.spec} on {type(self.adapter.model).__name__}, {'attached' if self.attached else 'detached'}>"

    def encoded(self) -> None:
        """Pictures were encoded outside of a forward, as generate does it; the next forward has to place them."""
        self._local.unplaced = getattr(self._local, "unplaced", 0) + 1

    # hooks ----------------------------------------------------------------------------------------------------------

    def _drafts(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # assisted decoding appends drafts to the prompt and asks for their logits: the prompt ends before them
        wanted = kwargs.get("logits_to_keep", 0)
        self._local.tail = wanted - 1 if isinstance(wanted, int) and wanted > 1 else 0

    def begin(self, kwargs: dict[str, Any]) -> Call:
        """Open the record of one forward of the multimodal model."""
        cache = cache_in(kwargs)
        continues = cache is not None and int(cache.get_seq_length()) > 0
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = embeds if ids is None else ids  # the model itself refuses a call without either
        tail = self._local.__dict__.pop("tail", 0)
        call = Call(ids, embeds, Report(self.spec), continues, tail, fed=0 if given is None else given.shape[1])
        self._local.call, self._local.opened = call, True
        if self.adapter.text_type is not None:
            # what the model makes of them before its language model is for the uncut sequence: the entrance replaces it
            call.mask, call.types = kwargs.get("attention_mask"), kwargs.get("token_type_ids")
        source: Any = None  # what the pictures came from: the same object at every step of decoding without a cache
        for modality in self.adapter.modalities:
            pixels = kwargs.get(modality.pixels)
            if self.enabled and pixels is not None:
                self.adapter.check(kwargs, modality)  # some families skip empty pixels and leave the placeholders as they are
                source = pixels if source is None else source
            encoded = (kwargs.get("mm_encoder_outputs") or {}).get(modality.name)
            if encoded is None or not self.enabled:
                continue
            found = riders(encoded)
            if found is None:
                raise CaptureError(
                    f"the {modality.name} features of this call were not encoded while {self.spec!r} was attached "
                    "(or were rebuilt since, as chunked prefill does); attach before encoding and leave prefill_chunk_size unset"
                )
            source = found if source is None else source
            call.pictures[modality.name] = found.pictures
            call.report.fire("encode")
        if call.pictures or not self.enabled:
            self._local.unplaced = 0
        elif source is None and ids is None and not continues and getattr(self._local, "unplaced", 0):
            raise self._never_placed()
        if self.inside is not None or self.reweight is not None:
            call.tail += self._decoded(source, given, cache, kwargs.get("use_cache"))
        return call

    def _decoded(self, source: Any, given: Any, cache: Any, use_cache: bool | None) -> int:
        """Tokens at the end of this forward that were generated by earlier ones: decoding without a cache feeds them again.

        What was chosen for the prompt has to be chosen again, so they are no part of it.
        """
        earlier, self._local.prompt = getattr(self._local, "prompt", None), None
        if source is None or given is None or cache is not None or use_cache is not False:
            return 0
        new = 0
        if earlier is not None and earlier[0]() is source and given.shape[1] > earlier[1].shape[1]:
            prompt = earlier[1].to(given.device)
            if given.shape[0] == prompt.shape[0] and torch.equal(given[:, : prompt.shape[1]], prompt):
                new = given.shape[1] - prompt.shape[1]
        self._local.prompt = earlier if new else (weakref.ref(source), given)
        return new

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        call = self.call
        if call is None:
            if self.enabled and getattr(self._local, "unplaced", 0):
                raise self._never_placed()
            return None
        changed = self._entrance.enter(call, kwargs)
        if self.inside is not None and call.placed:
            self.inside.begin(call, kwargs["inputs_embeds"] if changed is None else changed["inputs_embeds"])
        return None if changed is None else (args, changed)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return output if self.call is None else self._entrance.leave(self.call, output)

    def finish(self, call: Call) -> None:
        """Check that everything happened that had to, and keep the report."""
        if call.pictures and not call.entered:
            raise InvariantError(
                f"images were encoded but the language model of {type(self.adapter.model).__name__} was not entered: "
                "nothing was pruned"
            )
        if call.placed:
            due = set() if call.units is None else set(self.inside.layers) - call.units.done
            due |= set() if self.reweight is None else set(self.reweight.layers) - set(call.marks)
            if due:
                raise InvariantError(
                    f"{self.spec!r} acts at decoder layers {sorted(due)}, but these ran without its hooks; was a part of the model "
                    "compiled, or its forward replaced, after attaching? Detach, and attach again"
                )
        if call.continues and not call.pictures and self.last is not None:
            self.last.decode_steps += call.fed == 1
            return
        report = call.report
        if not call.pictures:
            report.note = "no images in this call" if self.enabled else "disabled"
        self.last = report

    def close(self) -> None:
        """Forget the call of this thread; the cache speaks of tokens seen again."""
        call, self._local.call = self.call, None
        state = None if call is None else state_of(call.cache)
        if state is not None:
            state.inside = False


def _no_positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    # FlashAttention takes gaps in position_ids for packed sequences; rotary angles were computed from them already
    return args, {**kwargs, "position_ids": None}
