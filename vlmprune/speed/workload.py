# SPDX-License-Identifier: Apache-2.0
"""Workload: one model and one batch of prompts, and the calls on them that are timed and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..errors import EvaluationError, SpecError, UnsupportedError
from ..example_picture import picture
from ..hooks.vision.encode import run_encoder
from ..models import Adapter, adapter_for
from ..models.loading import check_device, load, prompt
from .reading import Reading, reading_of_shape
from .shapes import SHAPES, build, inputs_of

SCALE_ON_CPU = 4
TEXT = 60  # text tokens of a shape's prompt


@dataclass(frozen=True, eq=False)
class Workload:
    """Equal prompts, one picture each, without padding.

    Args:
        name: how rows call the model; says when it is scaled.
        inputs: of the model, on its device.
        note: what must be known about the numbers.
        reading: makes the inputs of a picture; None where no processor did.
    """

    name: str
    model: Any
    inputs: Mapping[str, Tensor]
    adapter: Adapter
    note: str = ""
    reading: Reading | None = None

    def smaller(self, spec: str) -> Workload:
        """The same prompts about pictures that a spec of the picture slot shrinks."""
        if self.reading is None:
            raise UnsupportedError(
                f"{spec!r} shrinks a picture, and {self.name} is given pixels without one; take "
                "--model qwen2.5-vl-7b, or a checkpoint that reads pictures of any size"
            )
        reading = self.reading.smaller(self.adapter, spec)
        return replace(self, inputs=reading(), reading=reading)

    @property
    def batch(self) -> int:
        return self.inputs["input_ids"].shape[0]

    @property
    def device(self) -> torch.device:
        return self.inputs["input_ids"].device

    @property
    def text_tokens(self) -> int:
        """Text tokens of one prompt."""
        image = self.adapter.token_id(self.adapter.modalities[0])
        # of the first row: prompts are equal and have no padding
        return int((self.inputs["input_ids"][0] != image).sum())

    def encode(self) -> Any:
        """Vision tower and projector."""
        # no captures: nothing of the tower is recorded for a method, as in the dense model
        return run_encoder(self.adapter, self.adapter.modalities[0], self.inputs, [])[0]

    def first_token(self) -> Tensor:
        """Pixels in, first token out: its logits (B, V); the token is on the host when this returns."""
        # logits of one row only, as generate asks for them
        logits = self.model(**self.inputs, logits_to_keep=1, use_cache=True).logits[:, -1]
        logits.argmax(dim=-1).tolist()  # waits for the device
        return logits

    def answer(self, tokens: int) -> None:
        """Pixels in, ``tokens`` greedy tokens out."""
        # the least as well as the most: an early end of the text would make answers of unequal length
        ids = self.model.generate(
            **self.inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1
        )
        made = ids.shape[1] - self.inputs["input_ids"].shape[1]
        if made != tokens:
            raise EvaluationError(
                f"{self.name} made {made} of {tokens} tokens; lengths must be equal to compare times"
            )

    def flops(self, call: Any) -> int:
        """Operations of the matrix products and convolutions of a call; a multiply-add counts as two."""
        # fused attention is not counted on every device; the plain one is, and does the same products
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            call()
        return counter.get_total_flops()


def check_of_shapes(names: Iterable[str], text: int | None, scale: int | None) -> None:
    """Raise where an option of shapes is given for a model that is none and would not follow it."""
    given = [
        f"--{option} {value}" for option, value in (("text", text), ("scale", scale)) if value is not None
    ]
    others = [name for name in names if name not in SHAPES]
    if given and others:
        raise SpecError(
            f"{' and '.join(given)} for {others[0]!r}: only shapes have these, models are asked a fixed "
            f"question at their own size; leave it out, or take --model {' or '.join(SHAPES)}"
        )


def make_workload(
    name: str,
    *,
    batch: int = 1,
    text: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    scale: int | None = None,
    trust_remote_code: bool = False,
) -> Workload:
    """A workload from the name of a shape (see ``shapes.SHAPES``), ``"tiny"``, a folder or an HF id.

    Args:
        text: text tokens of a shape's prompt, ``TEXT`` by default; real checkpoints are asked a fixed
            question, and take none.
        scale: divides width and depth of a shape; default 1 on CUDA, ``SCALE_ON_CPU`` elsewhere.
    """
    check_of_shapes([name], text, scale)
    check_device(device)
    text = TEXT if text is None else text
    if batch < 1 or text < 2:
        raise SpecError(
            f"batch={batch}, text={text}; expected a batch of at least 1 and at least 2 text tokens"
        )
    if name not in SHAPES:
        model, processor = load(name, device, dtype, trust_remote_code)
        words = prompt(processor, "What is in the picture?")

        def make(images: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Tensor]:
            made = processor(images=list(images), text=[words] * batch, return_tensors="pt", **options)
            return dict(made.to(model.device, model.dtype))

        reading = Reading(processor, [picture()] * batch, make)
        return Workload(name, model, reading(), adapter_for(model), reading=reading)
    cuda = device.startswith("cuda")
    scale = scale or (1 if cuda else SCALE_ON_CPU)
    # a torch.dtype
    number = getattr(torch, ("bfloat16" if cuda else "float32") if dtype == "auto" else dtype)
    model = build(name, device, number, scale)
    label = name if scale == 1 else f"{name} at 1/{scale} scale"
    note = f"{label}: random weights in the shape of {SHAPES[name].like}" + (
        f", width and depth of tower and decoder divided by {scale}; token counts, head size and vocabulary "
        "are real. Its times say nothing about the real model, its ratios roughly."
        if scale > 1
        else "."
    )
    shown = reading_of_shape(name, model, batch, text)
    inputs = inputs_of(name, model, batch, text) if shown is None else shown()
    return Workload(label, model, inputs, adapter_for(model), note, shown)
