# SPDX-License-Identifier: Apache-2.0
"""Methods that a session replaces on one instance of a model."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from ..core.deferred import MANY
from ..errors import InvariantError, UnsupportedError
from .attention_tap import walk
from .vision.pictures import Picture, with_joins

if TYPE_CHECKING:
    from .adapter import Modality
    from .session import Session

# generate looks these up on the model; the second exists on a few families of transformers 4.57
MASK_MAKERS = ("create_masks_for_generate", "_prepare_4d_causal_attention_mask_with_cache_position")
ATTACHED = "_vlmprune_pictures"  # attribute and item of an encoder's output that holds its pictures


@dataclass(eq=False, repr=False)
class PictureHolder:
    """The pictures of an encoder's output; no list or tensor, which generate would repeat for beams."""

    pictures: list[Picture]

    def __deepcopy__(self, memo: dict) -> PictureHolder:
        return self


class PatchedMethod:
    """A bound method replaced on one instance; refuses to be copied with its model."""

    __call__: Callable[..., Any]  # of every child

    def __init__(self, session: Session, module: nn.Module, name: str, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)  # generate inspects the signature
        self.session, self.module, self.name, self.original = session, module, name, original

    def install(self) -> None:
        if self.name in self.module.__dict__:
            raise InvariantError(
                f"{type(self.module).__name__}.{self.name} is replaced on the instance already; undo that "
                "before attaching"
            )
        self.module.__dict__[self.name] = self

    def remove(self) -> None:
        if self.module.__dict__.get(self.name) is self:
            del self.module.__dict__[self.name]

    def __deepcopy__(self, memo: dict) -> None:
        raise UnsupportedError(
            "a model cannot be copied while pruning is attached: the copy would still use the original; "
            "detach first"
        )

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError("a model cannot be pickled while pruning is attached; detach first")


class RecordedForward(PatchedMethod):
    """Around the forward of the multimodal model: one state per forward, gone however the forward ends.

    Hooks would not do: torch runs none of them after a KeyboardInterrupt.
    """

    def __init__(self, session: Session, module: nn.Module) -> None:
        super().__init__(session, module, "forward", module.forward)
        self.earlier = module.__dict__.get("forward")  # of accelerate, where it places the weights

    def install(self) -> None:
        self.module.__dict__["forward"] = self

    def remove(self) -> None:
        """Put back what was there, also from inside what accelerate put around it since."""
        held = self.module.__dict__
        if held.get("forward") is self:
            del held["forward"]
            if self.earlier is not None:
                held["forward"] = self.earlier
        elif held.get("_old_forward") is self:
            held["_old_forward"] = self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        if not session.attached:
            return self.original(*args, **kwargs)
        if args:  # transformers itself passes keywords only; reading a signature would cost every decode step
            names = inspect.signature(self.original).parameters
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        checks, first = session.local.checks, None
        if not torch.compiler.is_compiling():  # a graph would have the number as an input
            first = len(checks.waiting)
            if first > MANY:  # a loop that never asks for them
                checks.settle()
                first = 0
        try:
            state = session.begin(kwargs)
            output = self.original(**kwargs)
            session.finish(state)
            return output
        except BaseException:
            if first is not None:
                del checks.waiting[first:]  # of what failed otherwise
            raise
        finally:
            session.close()


class Generate(PatchedMethod):
    """Around generate, which counts positions itself unless it is given some.

    When it returns the host has waited anyway, so that deferred checks are read.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        local, session = self.session.local, self.session
        if session.reads_prompt:
            self._refuse_drafts(kwargs)
        outer, local.counts = local.counts, kwargs.get("position_ids") is None
        try:
            answer = self.original(*args, **kwargs)
        finally:
            local.counts = outer
        session.settle()
        return answer

    def _refuse_drafts(self, kwargs: Mapping[str, Any]) -> None:
        """Assisted decoding says by the logits that it asks for where a prompt ends and its drafts begin."""
        model = self.session.adapter.model
        # as generate asks it; a generate of another kind makes no drafts
        supports = getattr(model, "_supports_logits_to_keep", None)
        if supports is None or supports():
            return
        config = kwargs.get("generation_config") or model.generation_config
        name = "prompt_lookup_num_tokens"
        looked_up = kwargs.get(name) or getattr(config, name, None)
        if looked_up or kwargs.get("assistant_model") is not None:
            raise UnsupportedError(
                f"{type(model).__name__} takes no logits_to_keep, so that drafts of assisted decoding cannot "
                f"be told from the prompt, whose end {self.session.spec!r} reads; generate without drafts, "
                "or use a method that reads pictures alone, e.g. 'divprune@64'"
            )


# sizes of pictures and grids, which adapters read as numbers
_SIZES = (
    "image_sizes",
    "image_grid_thw",
    "video_grid_thw",
    "image_grid_hw",
    "batch_num_images",
    "spatial_shapes",
)


def on_host(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an encoder with sizes on the CPU: the device is asked once, before the tower starts."""
    sizes = {name: arguments[name] for name in _SIZES if isinstance(arguments.get(name), Tensor)}
    away = [name for name, value in sizes.items() if value.device.type != "cpu"]
    alike = {(sizes[name].device, sizes[name].dtype) for name in away}
    if len(away) > 1 and len(alike) == 1:  # several of them travel together
        parts = [sizes[name].flatten() for name in away]
        read = torch.cat(parts).cpu().split([len(part) for part in parts])
        sizes |= {name: one.view_as(sizes[name]) for name, one in zip(away, read, strict=True)}
    return {**arguments, **{name: value.cpu() for name, value in sizes.items()}}


class Encode(PatchedMethod):
    """Around get_image_features or get_video_features: records what methods need."""

    def __init__(self, session: Session, module: nn.Module, modality: Modality) -> None:
        super().__init__(session, module, modality.encode, getattr(module, modality.encode))
        self.modality = modality

    # hooks that record cannot be traced; transformers has loaded the compiler already
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        # Qwen3-VL encodes a clip by way of the patched method for images: that call is the clip's
        if not session.enabled or session.capture.running() is not None:
            return self.original(*args, **kwargs)
        if session.serve is not None:
            return self._hand_over(*session.serve(self.modality))
        arguments = kwargs
        if args or self.modality.pixels not in kwargs:  # a signature takes long to read
            arguments = dict(inspect.signature(self.original).bind_partial(*args, **kwargs).arguments)
            # transformers 4.57 names pixels of clips otherwise
            arguments.setdefault(self.modality.pixels, next(iter(arguments.values())))
        arguments = on_host(arguments)
        session.adapter.check(arguments, self.modality)
        checks = session.local.checks
        with session.capture.recording(checks) as record:
            record.modality = self.modality.name
            output = self.original(*args, **kwargs)
        pictures = session.adapter.pictures(self.modality, output, arguments, record.take(), checks)
        if record.hosts is not None:
            counts = session.adapter.crops(self.modality, arguments, len(pictures))
            pictures = with_joins(pictures, counts, record.hosts)
        return self._hand_over(output, pictures)

    def _hand_over(self, output: Any, pictures: list[Picture]) -> Any:
        if hasattr(output, "pooler_output"):
            holder = PictureHolder(pictures)
            if isinstance(output, MutableMapping):  # accelerate rebuilds outputs item by item
                output[ATTACHED] = holder
            else:
                setattr(output, ATTACHED, holder)
        state = self.session.state
        if state is None:  # as generate does: the next forward must place them
            self.session.local.unplaced += 1
        else:
            state.pictures[self.modality.name] = pictures
            state.report.fire("encode")
        return output


class KeepMask2D(PatchedMethod):
    """Around what makes 4-D masks for static caches: they are made later, over held slots."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fed = kwargs.get("inputs_embeds")  # (B, n, 0)
        self.session.prepared(0 if fed is None else fed.shape[1])
        return kwargs["attention_mask"] if "attention_mask" in kwargs else args[0]


class Stacked(PatchedMethod):
    """Around what adds visual features to hidden states after early layers (DeepStack), in terms of the uncut
    sequence.

    A row that a merging method made takes the features of the slot that it stands in.
    """

    def __call__(self, hidden: Tensor, visual: Tensor, embeds: Tensor) -> Tensor:
        """Hidden states (B, n, D), visual columns (B, L), and what is added to them (V, D)."""
        state = self.session.state
        if state is not None:
            layer, state.stacked = state.stacked, state.stacked + 1
            for start, compaction in state.views.cuts if state.viewed else ():
                if start > layer:
                    continue
                embeds = embeds[compaction.kept[visual].to(embeds.device)]
                visual = compaction.follow(visual)
        return self.original(hidden, visual, embeds)


def patches_of(session: Session) -> list[PatchedMethod]:
    """What a session replaces on its model."""
    adapter, model = session.adapter, session.adapter.model
    found: list[PatchedMethod] = [Encode(session, adapter.inner, modality) for modality in adapter.modalities]
    for name in MASK_MAKERS:
        if name == MASK_MAKERS[0] or hasattr(model, name):
            found.append(KeepMask2D(session, model, name, getattr(model, name, create_masks_for_generate)))
    if adapter.deepstack is not None:
        name, language_model = adapter.deepstack, adapter.language_model
        found.append(Stacked(session, language_model, name, getattr(language_model, name)))
    found.append(Generate(session, model, "generate", model.generate))
    return [*found, RecordedForward(session, adapter.inner)]


def traced_anything() -> bool:
    """Whether torch.compile traced any function since it was reset; True where this torch does not say."""
    tracing = sys.modules.get("torch._dynamo.convert_frame")  # imported by the first one
    return tracing is not None and bool(getattr(getattr(tracing, "input_codes", None), "seen", True))


def forget_graphs(model: nn.Module) -> None:
    """Have torch.compile trace a compiled model anew: its graphs ignore hooks that came later."""
    if not traced_anything():  # looking at all modules costs as much as the rest of an attachment
        return
    for module in walk(model):
        held = vars(module)  # asking the module itself for what it has not takes ten times as long
        compiled = held.get("_compiled_call_impl") is not None or held.get("_compiled_call") is not None
        if compiled or ("forward" in held and hasattr(held["forward"], "_torchdynamo_orig_callable")):
            torch.compiler.reset()
            return
