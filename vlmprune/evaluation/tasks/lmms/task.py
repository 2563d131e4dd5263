# SPDX-License-Identifier: Apache-2.0
"""A task of lmms-eval as a task of this package: its documents as samples, its scoring as a score in [0, 1].

So it gets what ``evaluate`` gives: images encoded once for all specs, journals, paired statistics, reports.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....errors import EvaluationError, SpecError, UnsupportedError
from ..sample import Sample
from .conversation import Conversation, from_messages, picture, until
from .loading import build

# reading text in pictures is where pruning fails first
TEXT_TASKS = ("textvqa", "docvqa", "infovqa", "ocrbench", "chartqa", "ai2d", "stvqa", "seedbench_2_plus")
_FAMILIES = 40  # more categories than this are no families
_GUESSES = 5  # frequent answers that are tried as blind guesses
_NUMBER = (int, float, np.number)


@dataclass(frozen=True)
class LmmsSample(Sample):
    """One document."""

    task: LmmsTask = field(repr=False, compare=False, kw_only=True)
    number: int = field(kw_only=True)

    def load_images(self) -> list[Image.Image]:
        conversation = self.task.conversation(self.number)
        if conversation.clips:
            where = "vlmprune.evaluation.tasks.lmms.cell"
            raise UnsupportedError(
                f"{self.id} shows a clip, and evaluate() takes images; use run_cell of {where}"
            )
        return [picture(image) for image in conversation.images]

    def messages(self) -> list[dict[str, Any]]:
        return self.task.conversation(self.number).messages


class LmmsTask:
    """Built from the name of a task, of an overlay, or of a YAML file.

    Attributes:
        lmms: the task object of lmms-eval.
        max_new_tokens: what the task asks for; for ``evaluate``.
    """

    def __init__(self, name: str) -> None:
        self.lmms = build(name)
        self.name = f"lmms:{Path(name).stem}"
        settings = self.lmms.config.generation_kwargs or {}
        self.max_new_tokens = int(settings.get("max_new_tokens") or 1024)
        self.split = self.lmms.config.test_split or self.lmms.config.validation_split
        # on the instance: a cache of the class would keep tasks alive
        self.conversation = lru_cache(maxsize=64)(self._conversation)  # holds pictures
        self.sample = cache(self._sample)

    # --- documents --------------------------------------------------------------------------------

    def _conversation(self, number: int) -> Conversation:
        return from_messages(self.lmms.doc_to_messages(self.lmms.eval_docs[number]))

    @cached_property
    def video(self) -> bool:
        """Whether documents show clips, which lmms-eval has to read itself; asked of the first one."""
        return bool(self._conversation(0).clips)

    def _plain(self, number: int) -> dict[str, Any]:
        """A document without pictures, unless scoring wants them; a copy, as scoring may change it."""
        return copy.deepcopy(self.lmms.eval_docs_no_media[number])

    @cached_property
    def fingerprint(self) -> str:
        """Of the version of lmms-eval, the configuration and all documents but their pictures."""
        digest = hashlib.sha256(metadata.version("lmms_eval").encode())
        # those arguments may name folders
        config = {key: value for key, value in vars(self.lmms.config).items() if key != "dataset_kwargs"}
        digest.update(json.dumps(config, sort_keys=True, default=_named).encode())
        for doc in self.lmms.eval_docs_no_media:
            digest.update(json.dumps(doc, sort_keys=True, default=_named).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def _categories(self) -> list[str]:
        """The family of every document."""
        docs = self.lmms.eval_docs_no_media
        for column in ("family", "category"):
            if column in docs.column_names:
                found = [str(value) for value in docs[column]]
                if len(set(found)) <= _FAMILIES:
                    return found
        return [self.name.removeprefix("lmms:")] * len(docs)

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._categories))

    @property
    def groups(self) -> Mapping[str, str]:
        reads = self.name.removeprefix("lmms:").startswith(TEXT_TASKS)
        return {
            name: "text" if reads or name.lower() in ("ocr", "text") else "general" for name in self.families
        }

    def samples(self, split: str = "test", limit: int | None = None) -> list[LmmsSample]:
        """The first ``limit`` documents; all pictures are read once, to know which are equal."""
        if split not in ("test", self.split):
            raise SpecError(
                f"split {split!r} of {self.name}; expected 'test', which is its split {self.split!r}"
            )
        whole = len(self._categories)
        if limit is not None and not 1 <= limit <= whole:
            raise SpecError(f"limit={limit} samples of {self.name}; expected 1 to {whole}, or None for all")
        return [self.sample(number) for number in range(limit or whole)]

    def _sample(self, number: int) -> LmmsSample:
        conversation, family = self._conversation(number), self._categories[number]
        stem = f"{self.name.removeprefix('lmms:')}-{number}"
        images = tuple(_key(image) for image in conversation.images)
        # questions about equal pictures are one cluster, in whatever order these are shown
        shown = sorted({*images, *map(_key, conversation.clips)})
        return LmmsSample(
            id=stem,
            cluster="+".join(shown) or stem,
            family=family,
            group=self.groups[family],
            question=conversation.question,
            answers=tuple(map(str, self._targets(number))),
            history=(),
            images=images,
            task=self,
            number=number,
        )

    def _targets(self, number: int) -> list[Any]:
        target = self.lmms.doc_to_target(self._plain(number))
        return target if isinstance(target, list) else [target]

    # --- scores -----------------------------------------------------------------------------------

    def score(self, sample: Sample, answer: str) -> float:
        """The first metric of the task that is a number in [0, 1] for one answer."""
        if not isinstance(sample, LmmsSample):
            raise EvaluationError(f"{sample.id} is no sample of {self.name}; give one of its samples()")
        return self._score(sample.number, answer)

    def _score(self, number: int, answer: str) -> float:
        found = self._results(number, answer)
        for name, aggregate in self.lmms.aggregation().items():
            value = found.get(name)
            # some metrics give a mapping, with the score of the answer in it
            value = value.get("score", value) if isinstance(value, Mapping) else value
            if value is not None and not isinstance(value, _NUMBER) and _arguments(aggregate) == 1:
                value = aggregate([found[name]])  # of this answer alone
            if isinstance(value, _NUMBER) and 0 <= float(value) <= 1:
                return float(value)
        raise EvaluationError(
            f"{self.name} has no metric that gives one answer a score in [0, 1]: {sorted(found)}"
        )

    def _results(self, number: int, answer: str) -> dict[str, Any]:
        stops = (self.lmms.config.generation_kwargs or {}).get("until")
        return self.lmms.process_results(self._plain(number), [until(answer, stops)])

    def official(self, samples: Sequence[LmmsSample], answers: Sequence[str]) -> dict[str, float]:
        """The task's own numbers over all answers; what only writes a file for a server is left out, and what
        is no single number, such as a table by language.
        """
        # metric -> what it says of each answer; the task's own rule takes these together
        found: dict[str, list[Any]] = {}
        for sample, answer in zip(samples, answers, strict=True):
            for name, value in self._results(sample.number, answer).items():
                found.setdefault(name, []).append(value)
        known = {
            name: rule
            for name, rule in self.lmms.aggregation().items()
            if name in found and _arguments(rule) == 1
        }
        made = {name: rule(found[name]) for name, rule in known.items()}
        return {name: float(value) for name, value in made.items() if isinstance(value, _NUMBER)}

    @cached_property
    def blind(self) -> Mapping[str, float]:
        """Per family, the score of the best of its five most frequent answers, given to every question."""
        # family -> numbers of its documents
        members: dict[str, list[int]] = {}
        for number, family in enumerate(self._categories):
            members.setdefault(family, []).append(number)
        return {family: self._guess(numbers) for family, numbers in members.items()}

    def _guess(self, numbers: Sequence[int]) -> float:
        common = Counter(str(target) for number in numbers for target in self._targets(number)).most_common(
            _GUESSES
        )
        # where no document has a target there is nothing to guess
        return max(
            (sum(self._score(number, guess) for number in numbers) / len(numbers) for guess, _ in common),
            default=0.0,
        )


def _arguments(function: Any) -> int:
    """Aggregations with a second argument write files."""
    return len(inspect.signature(function).parameters)


def _named(value: Any) -> str:
    """Functions by name; other values that JSON does not know, by their text."""
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def _key(visual: Any) -> str:
    """Equal for equal pictures; clips by their path."""
    if isinstance(visual, Image.Image):
        # bytes alone do not tell 2 x 3 pixels from 3 x 2
        return hashlib.sha256(repr((visual.mode, visual.size)).encode() + visual.tobytes()).hexdigest()[:16]
    if isinstance(visual, str | Path):
        return Path(visual).name
    raise UnsupportedError(
        f"a task shows a {type(visual).__name__}, which cannot be told from others; run it with lmms-eval"
    )
