# SPDX-License-Identifier: Apache-2.0
"""Specs that ask a second time, such as ``carve+fastervlm@36``, and what all of their calls cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...errors import EvaluationError, SpecError
from ...hooks.session import Session
from ...methods.carve import CARVE
from ...models import adapter_for
from ...models.loading import prompt
from ...registry import get
from ...second_look import Prompts, look_again
from ...spec import Spec, parse
from ..tasks.sample import Sample
from .batch import Batch, model_inputs, numbered
from .generation import Generation, generate


def looks_again(spec: str | Spec) -> bool:
    """Whether a spec asks the model a second time."""
    return any(get(part.name).slot == "answer" for part in parse(spec).parts)


def look_of(spec: str) -> tuple[CARVE, str]:
    """The method that looks again, and the spec of what prunes meanwhile: dense where nothing does."""
    parsed = parse(spec)
    again = [part for part in parsed.parts if get(part.name).slot == "answer"]
    others = tuple(part for part in parsed.parts if part not in again)
    method = again[0].build()
    if len(again) > 1 or not isinstance(method, CARVE):
        raise SpecError(f"{spec!r} looks again by {list(map(str, again))}; expected 'carve' once")
    return method, str(replace(parsed, parts=others)) if others else "dense"


class SecondLook:
    """Asks a model about one sample, and keeps what every call did."""

    def __init__(self, model: Any, processor: Any, session: Session, named: str) -> None:
        self.model, self.processor, self.session, self.named = model, processor, session, named
        self.made: list[Generation] = []

    def ask(self, images: Sequence[Any], text: str, count: int) -> str:
        """The greedy answer to a prompt about some pictures."""
        inputs = model_inputs(self.processor, self.model, [text], [list(images)])
        parts = numbered(adapter_for(self.model), self.processor, [images])[0]
        options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "num_beams": 1}
        found = generate(self.model, self.session, inputs, pictures=len(parts), named=self.named, **options)
        self.made.append(found)
        answer: str = self.processor.batch_decode(found.ids, skip_special_tokens=True)[0]
        return answer.strip()

    def counts(self) -> dict[str, Any]:
        """Fields of a Record: the picture as it was, and what all calls read of it and of the region."""
        every = [made.counts(range(len(made.report.dense_tokens))) for made in self.made]
        peaks = [one["peak_memory"] for one in every if one["peak_memory"] is not None]
        total = {
            name: sum(one[name] for one in every) for name in ("realised_tokens", "layer_tokens", "firings")
        }
        return {
            "dense_tokens": every[0]["dense_tokens"],
            **total,
            "peak_memory": max(peaks, default=None),
        }

    def seconds(self) -> dict[str, float]:
        """The same of all calls; the first token is that of the last answer."""
        *before, last = self.made
        return {
            "encode": 0.0,
            "choosing": sum(made.report.seconds for made in self.made),
            "first_token": sum(made.total for made in before) + last.first,
            "total": sum(made.total for made in self.made),
        }


def look(
    model: Any, processor: Any, batch: Batch, row: int, one: tuple[CARVE, Session], count: int
) -> tuple[str, SecondLook]:
    """Answer the question of a row with a second look."""
    method, session = one
    sample = batch.samples[row]
    looking = SecondLook(model, processor, session, f"sample {sample.id!r}")
    second = processor.apply_chat_template(with_region(sample), add_generation_prompt=True)
    texts = Prompts(batch.texts[row], prompt(processor, method.instruction), second)
    try:
        # attached from outside, so that the watch finds the session that the calls run under
        with session:
            found = look_again(method, model, looking.ask, batch.images[row][0], texts, count)
    except EvaluationError:
        raise  # of a call, which says more
    except Exception as error:
        raise EvaluationError(
            f"{session.spec}: the second look failed on {looking.named}: {type(error).__name__}: {error}"
        ) from error
    return found.answer, looking


def with_region(sample: Sample) -> list[dict[str, Any]]:
    """The conversation of a sample with a place for a second picture behind that of the first."""
    turns = []
    for turn in sample.messages():
        content: list[Any] = []
        for part in turn["content"]:
            content += [part, part] if part["type"] == "image" else [part]
        turns.append({**turn, "content": content})
    return turns
