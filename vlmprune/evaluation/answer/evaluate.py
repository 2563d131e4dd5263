# SPDX-License-Identifier: Apache-2.0
"""Evaluate: many specs on the same questions. Every image is encoded once; each spec then scores, cuts and
answers, in batches.

What follows the encoder is the path of ``with vlmprune.prune(model, spec): model.generate(...)``: the same
session, hooks, masks and greedy decoding. Only ``get_image_features`` is answered from a cache of encoded
images, which a test compares with encoding anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...api import prune
from ...core.keepmap import KeepMap
from ...errors import EvaluationError, UnsupportedError
from ...hooks.session import Session
from ...hooks.vision.encode import EncodedImages
from ...methods.carve import CARVE
from ...models import adapter_for
from ...models.shrink import Shrink, shrink_for, shrinks
from ...spec import Spec, parse
from ..tasks.sample import Sample, Task, shows_clips
from .batch import Batch, EncodeOnce
from .generation import generate
from .look import look, look_of, looks_again
from .record import Record


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    specs: Sequence[str | Spec],
    task: Task,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    positions: str | None = None,
    strict: bool = False,
    share: bool = True,
) -> Iterator[Record]:
    """Answer every sample under every spec, greedily: batch after batch, and in each batch spec after spec.

    Samples with equally many images are answered together, fewest first, since padding costs time; else they
    keep their order.

    Args:
        model, processor: as loaded, the model in eval mode; it is left as it was, also when the iterator is
            dropped half-way.
        samples: of ``task``; questions about the same images are encoded once where they stand within two
            batches of each other.
        specs: what to compare, ``"dense"`` among them if wanted; distinct.
        task: gives ``score(sample, answer)``.
        positions, strict: as in :func:`vlmprune.prune`.
        share: encode each image once for all specs. Where a model family does not allow it, records say
            ``encoding="each"``.

    Raises:
        EvaluationError: a generation that failed, hooks that did not fire, a score that is no score.
    """
    # as a row prints them, so that one spec in two spellings is found
    texts = [str(parse(spec)) for spec in specs]
    twice = [text for number, text in enumerate(texts) if text in texts[:number]]
    if not texts or twice:
        raise EvaluationError(
            f"specs={list(map(str, specs))}; expected at least one, each once"
            + f", not {twice}" * bool(twice)
        )
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EvaluationError(f"{name}={value!r}; expected an int >= 1")
    if model.training:
        raise EvaluationError(
            "the model is in training mode, where dropout changes answers; call model.eval()"
        )
    if not getattr(processor, "chat_template", None):
        raise EvaluationError(
            f"{type(processor).__name__} has no chat template to ask questions with; set its chat_template"
        )
    # all of them before the first question: what this model cannot do is said at once
    frames = shows_clips(task)
    entrants = [
        entrant(model, processor, text, positions=positions, strict=strict, frames=frames) for text in texts
    ]
    return _run(model, processor, samples, entrants, task, batch_size, max_new_tokens, share)


@dataclass(frozen=True)
class Entrant:
    """A spec that answers.

    Args:
        session: what is attached.
        shrink: how its pictures are shrunk, where that is what it does.
        again: how it looks at a picture again, where it does.
    """

    session: Session
    shrink: Shrink | None = None
    again: CARVE | None = None


def entrant(
    model: Any,
    processor: Any,
    spec: str,
    *,
    positions: str | None = None,
    strict: bool = False,
    frames: bool = False,
) -> Entrant:
    """A spec on a model, refused where the two do not fit; attaches nothing."""
    if looks_again(spec):
        method, rest = look_of(spec)
        if frames:
            raise UnsupportedError(
                f"{spec!r} looks again at one picture, and a clip is many; ask about clips with {rest!r}"
            )
        method.looks_at(adapter_for(model).depth)  # raises where the model has no such layers
        session = prune(model, rest, positions=positions, strict=strict)
        session.spec = spec
        return Entrant(session, again=method)
    if not shrinks(spec):
        return Entrant(prune(model, spec, positions=positions, strict=strict, frames=frames))
    session = prune(model, "dense", positions=positions)
    session.spec = spec  # all tokens of a smaller picture: reports and messages are about that
    return Entrant(session, shrink_for(adapter_for(model), processor, spec, strict))


def _run(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    entrants: Sequence[Entrant],
    task: Task,
    size: int,
    words: int,
    share: bool,
) -> Iterator[Record]:
    # a method inside the tower needs pictures that went through it there
    whole = [one.session for one in entrants if one.shrink is None and one.again is None]
    sharing = [session for session in whole if share and not session.in_tower]
    # twice as many as a batch has: questions about one image may fall into two
    once = EncodeOnce(EncodedImages(sharing), processor, 2 * size) if sharing else None
    remaining = iter(sorted(samples, key=lambda sample: len(sample.images)))
    while rows := list(islice(remaining, size)):
        batch = Batch.make(rows, processor, model, shows_clips(task))
        images, encoding, spent = None, "each", 0.0
        if once is not None:
            started = time.perf_counter()
            try:
                images, encoding = once.take(batch), "shared"
            except UnsupportedError:
                once = None  # this family returns more than features: every record says so
            spent = time.perf_counter() - started
        for one in entrants:
            session = one.session
            if one.again is not None:
                yield from _look(model, processor, batch, session, one.again, task, words)
            elif session in sharing and once is not None:
                # nothing to serve where no sample of the batch has an image
                served = once.encoded.serving(session, images) if images else nullcontext()
                yield from _answer(model, processor, batch, session, task, words, served, encoding, spent)
            else:
                own = batch if one.shrink is None else batch.shrunk(one.shrink, processor, model)
                yield from _answer(model, processor, own, session, task, words, nullcontext(), "each", 0.0)


def _answer(
    model: Any,
    processor: Any,
    batch: Batch,
    session: Session,
    task: Task,
    words: int,
    served: AbstractContextManager[None],
    encoding: str,
    spent: float,
) -> list[Record]:
    """One spec on one batch; the model is free again when this returns."""
    # counted over the batch: the hooks must have seen as many
    pictures = sum(map(len, batch.pictures))
    options = {"max_new_tokens": words, "do_sample": False, "num_beams": 1}
    made = generate(
        model, session, batch.inputs, pictures=pictures, named=batch.named, served=served, **options
    )
    batch.check(made.report.dense_tokens, session.spec)
    answers = processor.batch_decode(made.ids, skip_special_tokens=True)
    rows = len(batch.samples)
    found = []
    for row, answer in enumerate(answers):
        shown = batch.pictures[row]
        # in the report, pictures are numbered over the batch; tiles lie on no image as a whole
        whole = len(shown) == len(batch.samples[row].images)
        maps = tuple(made.report.keep[p] for p in shown) if whole else ()
        told = {
            # of a shrunk picture, the dense tokens are those at its own size
            **made.counts(shown) | batch.whole(row),
            "encoding": encoding if shown else "none",
            "seconds": {"encode": spent / rows, **made.seconds(rows)},
            "batch": rows,
        }
        found.append(_record(batch, row, session, task, answer, maps, told))
    return found


def _look(
    model: Any,
    processor: Any,
    batch: Batch,
    session: Session,
    again: CARVE,
    task: Task,
    words: int,
) -> Iterator[Record]:
    """One spec that looks again, question by question; those without exactly one picture are asked once."""
    for row, sample in enumerate(batch.samples):
        if len(sample.images) != 1:
            alone = Batch.make([sample], processor, model)
            yield from _answer(model, processor, alone, session, task, words, nullcontext(), "each", 0.0)
            continue
        answer, looking = look(model, processor, batch, row, (again, session), words)
        maps = tuple(looking.made[0].report.keep)
        told = {**looking.counts(), "encoding": "each", "seconds": looking.seconds(), "batch": 1}
        yield _record(batch, row, session, task, answer, maps, told)


def _record(
    batch: Batch,
    row: int,
    session: Session,
    task: Task,
    answer: str,
    maps: tuple[KeepMap, ...],
    told: Mapping[str, Any],
) -> Record:
    """A row of a batch with its score; ``told`` are the fields that say what it cost."""
    sample = batch.samples[row]
    score = task.score(sample, answer.strip())
    # NaN fails the comparison
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise EvaluationError(
            f"{sample.id}: the task gave the score {score!r} to {answer!r}; expected 0 to 1"
        )
    return Record(
        spec=session.spec,
        id=sample.id,
        cluster=sample.cluster,
        family=sample.family,
        group=sample.group,
        answer=answer.strip(),
        score=float(score),
        on_object=batch.asked[row].share(maps),
        positions=session.positions,
        keep=maps,
        **told,
    )
