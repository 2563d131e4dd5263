# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is made of: a sample, a task, and the one way in which answers are compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import SpecError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

GROUPS = ("general", "text")


@dataclass(frozen=True)
class Sample:
    """One question about one or several images. Sub-classes know how to draw them.

    Attributes:
        id: stable over versions of Python, Pillow and this package as long as the fingerprint of the task
            stays.
        cluster: samples of one cluster show the same images; intervals are over clusters.
        family: kind of question. group: "general" or "text".
        question: the last turn. history: earlier turns as (question, reference answer).
        answers: accepted answers, normalised.
        images: keys of the images in the order in which they are shown; equal keys are equal images.
    """

    id: str
    cluster: str
    family: str
    group: str
    question: str
    answers: tuple[str, ...]
    history: tuple[tuple[str, str], ...]
    images: tuple[str, ...]

    def load_images(self) -> list[Image.Image]:
        """RGB images, one per key."""
        raise NotImplementedError(f"{type(self).__name__} draws no images")

    def object_masks(self) -> list[np.ndarray]:
        """One (H, W) bool mask per image: the objects asked about, all False where none is there or known."""
        import numpy as np

        return [np.zeros((1, 1), dtype=bool) for _ in self.images]

    def messages(self) -> list[dict[str, Any]]:
        """The conversation for ``processor.apply_chat_template(..., add_generation_prompt=True)``.

        All images come in the first turn. Where there are several, a word before each says which it is, so
        that its patches can learn from the words before them in a decoder that only looks back.
        """
        first: list[dict[str, str]] = []
        # all images come before the first question, in whichever turn that is
        for i in range(len(self.images)):
            first += [{"type": "text", "text": ORDINALS[i]}] if len(self.images) > 1 else []
            first.append({"type": "image"})
        turns = []
        for question, answer in self.history:
            turns.append({"role": "user", "content": [*first, {"type": "text", "text": question}]})
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            first = []  # the images are shown once
        return [*turns, {"role": "user", "content": [*first, {"type": "text", "text": self.question}]}]


ORDINALS = ("first", "second", "third", "fourth")


class Task(Protocol):
    """A benchmark: samples by split, and a score in [0, 1] for an answer.

    Attributes:
        fingerprint: changes whenever any sample can change.
        families: kinds of questions. groups: family -> group.
        blind: family -> score of the best guess that does not look at the image.

    A task may have ``frames = True`` as well: the images of each sample are the frames of one clip.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def families(self) -> tuple[str, ...]: ...

    @property
    def groups(self) -> Mapping[str, str]: ...

    @property
    def blind(self) -> Mapping[str, float]: ...

    def samples(self, split: str = "test", limit: int | None = None) -> Sequence[Sample]: ...

    def score(self, sample: Sample, answer: str) -> float: ...


def shows_clips(task: Task) -> bool:
    """Whether the images of each sample are the frames of one clip."""
    return bool(getattr(task, "frames", False))


_PUNCTUATION = re.compile(r"[^\w\s]")  # neither a letter, a digit or "_", nor white space
# "zero" -> "0", ..., "nine" -> "9"
_NUMBERS = dict(
    zip(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        "0123456789",
        strict=True,
    )
)


def normalise(answer: str, *, compact: bool = False) -> str:
    """Lower case, no punctuation or article, digits, single spaces; ``compact``: none, for read strings."""
    words = _PUNCTUATION.sub(" ", answer.lower()).split()
    # a sign is read letter by letter, "4 7 1", or at once
    if compact:
        return "".join(words)
    # "A" alone is the first of several choices, and no article
    words = [word for word in words if word not in ("a", "an", "the")] or words
    return " ".join(_NUMBERS.get(word, word) for word in words)


def exact(sample: Sample, answer: str) -> float:
    """1.0 where the normalised answer is one of the accepted ones, else 0.0."""
    return float(normalise(answer, compact=sample.group == "text") in sample.answers)


def in_turns(
    name: str, families: Sequence[str], per_family: Mapping[str, int], split: str, limit: int | None
) -> list[tuple[str, int]]:
    """Family and number of the samples of a split, families in turn: any ``limit`` is a balanced prefix.

    Args:
        name: of the task, for messages.
        per_family: split -> samples of each family.
    """
    if split not in per_family:
        near = did_you_mean(split, per_family)
        raise SpecError(f"split {split!r} of {name}; expected one of {list(per_family)}.{near}")
    whole = per_family[split] * len(families)
    if limit is not None and not 1 <= limit <= whole:
        raise SpecError(f"limit={limit} samples of {name}/{split}; expected 1 to {whole}, or None for all")
    return [(families[i % len(families)], i // len(families)) for i in range(limit or whole)]
