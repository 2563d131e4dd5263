# SPDX-License-Identifier: Apache-2.0
"""Bound methods that a session replaces on one instance: encoders, mask makers, and what adds features inside the model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .pictures import Picture

MARK = "_vlmprune_pictures"  # attribute and item that pictures ride on


class Riders:
    """The pictures of an encoder's output; neither a list, which generate would repeat for beams, nor anything with tensors."""

    def __init__(self, pictures: list[Picture]) -> None:
        self.pictures = pictures

    def __deepcopy__(self, memo: dict) -> Riders:
        return self


def ride(output: Any, pictures: list[Picture]) -> None:
    """Let pictures travel with an encoder's output, also where accelerate rebuilds it item by item."""
    if isinstance(output, MutableMapping):
        output[MARK] = Riders(pictures)
    else:
        setattr(output, MARK, Riders(pictures))


def riders(output: Any) -> Riders | None:
    """What holds the pictures that travel with an encoder's output, None where there are none."""
    return getattr(output, MARK, None)


class Wrapper:
    """A bound method replaced on one instance; refuses to be copied with its model."""

    def __init__(self, session: Any, original: Any) -> None:
        functools.update_wrapper(self, original)  # generate inspects the signature
        self.session, self.original = session, original

    def __deepcopy__(self, memo: dict) -> None:
        raise UnsupportedError(
            "a model cannot be copied while pruning is attached: the copy would still use the original; detach first"
        )

    def __reduce__(self) -> None:
        raise UnsupportedError("a model cannot be pickled while pruning is attached; detach first")


class Recorded(Wrapper):
    """Wraps the forward of the multimodal model: one call record per forward, gone however the forward ends.

    Hooks would not do: torch runs none of them after a KeyboardInterrupt.
    """

    def __init__(self, session: Any, module: nn.Module) -> None:
        super().__init__(session, module.forward)
        self.module = module
        self.own = module.__dict__.get("forward")  # of accelerate, where it places the weights

    def install(self) -> None:
        self.module.__dict__["forward"] = self

    def remove(self) -> None:
        """Put back what was there; where another wrapper was put around this one since, take it out of that."""
        held = self.module.__dict__
        if held.get("forward") is self:
            del held["forward"]
            if self.own is not None:
                held["forward"] = self.own
        elif held.get("_old_forward") is self:
            held["_old_forward"] = self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        if not session.attached:
            return self.original(*args, **kwargs)
        if args:  # transformers itself passes keywords only; reading a signature would cost every decode step
            names = inspect.signature(self.original).parameters
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        try:
            call = session.begin(kwargs)
            output = self.original(**kwargs)
            session.finish(call)
            return output
        finally:
            session.close()


def forget_graphs(model: nn.Module) -> None:
    """Have torch.compile trace a model anew if a part of it was compiled: by default graphs ignore hooks that came later."""
    parts = ("_compiled_call_impl", "_compiled_call")
    compiled = any(getattr(module, part, None) is not None for module in model.modules() for part in parts)
    replaced = any(hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable") for module in model.modules())
    if compiled or replaced:
        torch.compiler.reset()


class Encode(Wrapper):
    """Wraps get_image_features or get_video_features."""

    def __init__(self, session: Any, original: Any, modality: Any) -> None:
        super().__init__(session, original)
        self.modality = modality

    @torch.compiler.disable  # hooks that record cannot be traced; transformers has loaded the compiler already
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        # Qwen3-VL encodes a clip by way of the wrapped method for images: that call is the clip's
        if not session.enabled or session.capture.is_recording:
            return self.original(*args, **kwargs)
        if session.serve is not None:
            return self._hand_over(*session.serve(self.modality))
        arguments = dict(inspect.signature(self.original).bind_partial(*args, **kwargs).arguments)
        arguments.setdefault(self.modality.pixels, next(iter(arguments.values())))  # 4.57 names pixels of clips otherwise
        session.adapter.check(arguments, self.modality)
        with session.capture.recording() as record:
            output = self.original(*args, **kwargs)
        return self._hand_over(output, session.adapter.pictures(self.modality, output, arguments, record.take()))

    def _hand_over(self, output: Any, pictures: list[Picture]) -> Any:
        if hasattr(output, "pooler_output"):
            ride(output, pictures)
        call = self.session.call
        if call is None:
            self.session.encoded()
        else:
            call.pictures[self.modality.name] = pictures
            call.report.fire("encode")
        return output


class KeepMask2D(Wrapper):
    """Wraps what makes 4-D masks for static caches: they are made inside the language model, where the cut frame is known."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs["attention_mask"] if "attention_mask" in kwargs else args[0]


class Stacked(Wrapper):
    """Wraps what adds visual features to hidden states after early layers (DeepStack): it speaks of the sequence before any cut.

    A row that a merging method made takes the features of the slot that it stands in.
    """

    def __call__(self, hidden: Tensor, visual: Tensor, embeds: Tensor) -> Tensor:
        """Hidden states (B, n, D) after the next layer, visual columns (B, L), and what is added to them (V, D)."""
        call = self.session.call
        if call is not None:
            layer, call.stacked = call.stacked, call.stacked + 1
            for start, compaction in call.compactions:
                if start > layer:
                    continue
                embeds = embeds[compaction.kept[visual].to(embeds.device)]
                visual = visual.gather(1, compaction.index) & compaction.valid
        return self.original(hidden, visual, embeds)
