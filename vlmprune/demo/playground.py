# SPDX-License-Identifier: Apache-2.0
"""Playground: one question about one picture, answered under several specs by copies of one model.

Pruning patches the model that it runs on, so a copy answers one user at a time: whoever asks takes a copy
that is idle, or waits for one, and gives it back when all specs have answered.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from PIL import Image

from ..core.budget import Budget
from ..core.report import Report
from ..errors import SpecError, VlmPruneError
from ..evaluation.answer.evaluate import entrant
from ..evaluation.answer.generation import generate
from ..evaluation.answer.look import SecondLook
from ..evaluation.tasks.sample import Sample
from ..evaluation.tasks.shapes import shapes
from ..hooks.session import Session
from ..methods.carve import CARVE
from ..models import adapter_for
from ..models.loading import TINY, encode, load
from ..registry import attachable_methods, get, list_methods
from ..second_look import Prompts, look_again
from ..spec import Spec, parse
from ..viz.overlay import open_picture

METHODS = ("random", "divprune", "fastervlm", "fastv")  # chosen when the page opens
KEEP = 0.125
MOST_METHODS = 8
LONGEST_QUESTION = 500  # characters
LARGEST_PICTURE = 2000  # pixels of a side; larger ones are made smaller before the model sees them
# times that a side may be as long as the other: some processors refuse thinner pictures, others enlarge the
# short side to what a tower reads, and cut gigabytes of the long one off only then
THINNEST = 100
LEAST_SIDE = 400  # pixels; smaller pictures are drawn enlarged, or their patches could not be told apart
# a path stands in quotes, or is a bare word behind one of these options
_NAMES_A_FILE = re.compile(r"""['"]|\b(?:weights|recipe)\s*=""")
# kinds of questions of the benchmark that the page offers
EXAMPLES = ("text", "attribute", "count", "spatial", "needle", "position")


@dataclass(frozen=True)
class Outcome:
    """What one spec gave.

    Args:
        problem: why there is no answer; all that follows is empty then.
        right: whether the answer is right, where that is known.
        drawn: the picture with the patches that were kept.
        tokens, dense: visual tokens that were read, and that there were.
        layer_tokens: visual tokens as a mean over the decoder layers.
        first, total, choosing: seconds to the first token, to the last, and of these in choosing.
    """

    spec: str
    problem: str = ""
    answer: str = ""
    right: bool | None = None
    drawn: Image.Image | None = None
    tokens: int = 0
    dense: int = 0
    layer_tokens: float = 0.0
    first: float = 0.0
    total: float = 0.0
    choosing: float = 0.0


class Playground:
    """Answers of several specs to one question about one picture.

    Args:
        model, processor: as ``vlmprune.load`` gives them.
        name: of the model, as the page shows it.
        copies: of the model; as many users are answered at the same time.
        max_new_tokens: longest answer.
    """

    def __init__(
        self, model: Any, processor: Any, name: str = "", *, copies: int = 1, max_new_tokens: int = 32
    ) -> None:
        for what, value in (("copies", copies), ("max_new_tokens", max_new_tokens)):
            if type(value) is not int or value < 1:
                raise SpecError(f"{what}={value!r}; expected a whole number, at least 1")
        self.name, self.copies, self.max_new_tokens = name, copies, max_new_tokens
        # pairs of a model and its processor that nobody uses
        self._idle: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
        self._idle.put((model, processor))
        for _ in range(copies - 1):
            # the processor as well: a tokenizer must not be used by two threads at once
            self._idle.put((deepcopy(model), deepcopy(processor)))
        # (picture, question) -> the sample with the right answer
        self._known = {(_digest(s.load_images()[0]), s.question): s for s in example_samples()}

    @classmethod
    def load(
        cls,
        name: str = TINY,
        device: str = "cpu",
        dtype: str = "auto",
        *,
        copies: int = 1,
        max_new_tokens: int = 32,
        trust_remote_code: bool = False,
    ) -> Playground:
        """A playground with a loaded model, after one answer that nobody waits for."""
        model, processor = load(name, device, dtype, trust_remote_code)
        made = cls(model, processor, name, copies=copies, max_new_tokens=max_new_tokens)
        sample = example_samples()[0]
        for _ in range(copies):  # a copy that was given back stands behind those that still wait
            made.compare(sample.load_images()[0], sample.question, [], KEEP)
        return made

    def compare(
        self, picture: Any, question: str, methods: Sequence[str], keep: float = KEEP
    ) -> list[Outcome]:
        """One outcome for all tokens, and one for each method. What a single method cannot do is said in its
        outcome; a question that nobody could answer raises.

        Args:
            picture: PIL image or path.
            methods: names, which keep this share of the tokens, or whole specs with a budget of their own.
            keep: share of the tokens, in (0, 1].
        """
        shown, question = self._checked(picture, question, methods)
        budget = Budget(float(keep))
        sample = self._known.get((_digest(shown), question))
        with self._borrowed() as (model, processor):
            found = []
            # what was given twice answers once
            for text in ["dense", *dict.fromkeys(methods)]:
                try:
                    spec = str(spec_of(text, budget))
                    found.append(self._answer(model, processor, shown, question, spec, sample))
                except VlmPruneError as error:
                    found.append(Outcome(text, problem=_sentence(error)))
        return found

    def _checked(self, picture: Any, question: str, methods: Sequence[str]) -> tuple[Image.Image, str]:
        if picture is None:
            raise SpecError("there is no picture; upload one, or click an example")
        question = " ".join(str(question or "").split())
        if not question:
            raise SpecError("the question is empty; type one, such as 'What is in the picture?'")
        if len(question) > LONGEST_QUESTION:
            raise SpecError(
                f"the question has {len(question)} characters; expected at most {LONGEST_QUESTION}: shorten "
                "it"
            )
        if len(methods) > MOST_METHODS:
            raise SpecError(
                f"{len(methods)} methods were chosen; expected at most {MOST_METHODS} at a time: remove some"
            )
        shown = open_picture(picture, LARGEST_PICTURE)
        if max(shown.size) > THINNEST * min(shown.size):
            raise SpecError(
                f"the picture has {shown.width} x {shown.height} pixels; expected no side more than "
                f"{THINNEST} times as long as the other: cut off a part"
            )
        return shown, question

    @contextmanager
    def _borrowed(self) -> Iterator[tuple[Any, Any]]:
        """A model and its processor that nobody else uses meanwhile."""
        pair = self._idle.get()
        try:
            yield pair
        finally:
            self._idle.put(pair)

    def _answer(
        self,
        model: Any,
        processor: Any,
        picture: Image.Image,
        question: str,
        spec: str,
        sample: Sample | None,
    ) -> Outcome:
        one = entrant(model, processor, spec)
        if one.again is not None:
            return self._look_again(model, processor, picture, question, one.session, one.again, sample)
        inputs = encode(model, processor, picture, question, None if one.shrink is None else spec)
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        small = None if one.shrink is None else one.shrink([picture])
        # its tiles may be pictures to the model
        parts = adapter_for(model).parts(processor, picture) if small is None else small.parts[0]
        made = generate(model, one.session, inputs, pictures=parts, named="this question", **options)
        answer = processor.decode(made.ids[0], skip_special_tokens=True).strip()
        dense, tokens = sum(made.report.dense_tokens), sum(made.report.realised_tokens)
        drawn = _large(picture)
        # what the model saw is the smaller picture, and no patch of that was dropped
        if small is not None:
            drawn, dense = _large(small.images[0]), small.dense[0]
        elif tokens < dense:
            drawn = _kept(made.report, drawn)
        # by layer: behind a cut inside the model there are fewer
        layers = made.report.tokens_per_layer
        return Outcome(
            spec,
            answer=answer,
            right=None if sample is None else shapes().score(sample, answer) == 1,
            drawn=drawn,
            tokens=tokens,
            dense=dense,
            layer_tokens=sum(layers) / len(layers),
            first=made.first,
            total=made.total,
            choosing=made.report.seconds,
        )

    def _look_again(
        self,
        model: Any,
        processor: Any,
        picture: Image.Image,
        question: str,
        session: Session,
        method: CARVE,
        sample: Sample | None,
    ) -> Outcome:
        """A second look, drawn as the region that it shows, with all tokens and seconds of its answers."""
        looking = SecondLook(model, processor, session, "this question")
        texts = Prompts.of(processor, question, method.instruction)
        with session:
            found = look_again(method, model, looking.ask, picture, texts, self.max_new_tokens)
        counts, seconds = looking.counts(), looking.seconds()
        return Outcome(
            session.spec,
            answer=found.answer,
            right=None if sample is None else shapes().score(sample, found.answer) == 1,
            drawn=_large(found.image),
            tokens=counts["realised_tokens"],
            dense=counts["dense_tokens"],
            layer_tokens=counts["layer_tokens"],
            first=seconds["first_token"],
            total=seconds["total"],
            choosing=seconds["choosing"],
        )


def spec_of(text: str, budget: Budget) -> Spec:
    """What a user chose as a spec: a name gets the budget, where it takes one."""
    text = text.strip()
    if _NAMES_A_FILE.search(text):  # asked before it is read, since reading it opens the file
        raise SpecError(
            f"{text!r} may name a file, which a page opens for nobody; write options without quotes, weights "
            "and recipe"
        )
    if text in list_methods() and (get(text).wraps or get(text).slot == "attention"):
        text = f"{text}+fastervlm"  # alone these choose no tokens
    spec = parse(text)
    classes = [get(part.name) for part in spec.parts]
    given = any(part.budget is not None for part in spec.parts)
    if given or not any(cls.budgeted and not cls.wraps for cls in classes):
        return spec
    # inside the tower a budget is spent on each crop
    scope = "crop" if any(cls.slot == "encoder" for cls in classes) else "image"
    return spec.with_keep(Budget(budget.keep, scope))


def offered() -> list[str]:
    """Methods that the page lists: those for pictures that need neither trained weights nor an option."""
    return [
        name
        for name in attachable_methods()
        if name not in ("dense", "visionselector", "dyvte", "rcp", "dycoke_decode") and not get(name).clips
    ]


def example_samples() -> list[Sample]:
    """Questions of the benchmark about one picture each, with known answers."""
    task = shapes()
    return [task.sample("test", family, 0) for family in EXAMPLES]


def _kept(report: Report, picture: Image.Image) -> Image.Image:
    """The picture with the kept patches, where single patches of the whole, not of its tiles, were kept."""
    return report.keep[0].draw(picture) if len(report.keep) == 1 else picture


def _large(picture: Image.Image) -> Image.Image:
    """A small picture, each of its pixels several times as large."""
    times = -(-LEAST_SIDE // max(picture.size))  # rounded up
    if times <= 1:
        return picture
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)


def _digest(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _sentence(error: VlmPruneError) -> str:
    """What went wrong, without the words about which question it was."""
    cause = error.__cause__
    return str(cause if isinstance(cause, VlmPruneError) else error)
