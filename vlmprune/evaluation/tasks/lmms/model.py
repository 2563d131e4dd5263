# SPDX-License-Identifier: Apache-2.0
"""The model that lmms-eval runs as ``--model vlmprune``: real generate calls under a pruning session,
watched.

A generation that fails ends the run. lmms-eval's own wrappers answer "" instead, and such a run gets a score.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from ....api import prune
from ....errors import EvaluationError, UnsupportedError
from ....models import adapter_for
from ....models.loading import load
from ...answer.batch import model_inputs, numbered
from ...answer.generation import generate
from .arguments import Arguments
from .conversation import Conversation, frames, from_messages, from_visuals, picture, until

MOST_TOKENS = 1024  # what lmms-eval generates for tasks that do not say
# settings that ``generate`` gets as the task has them
_PASSED = ("top_p", "top_k", "repetition_penalty", "length_penalty", "min_new_tokens")
# settings that are read at all; each other one is warned of, once
_READ = {"max_new_tokens", "until", "do_sample", "temperature", "num_beams", *_PASSED}


@dataclass
class Counts(TokenCounts):
    """Token counts of lmms-eval and what pruning did; lmms-eval writes them into every sample row."""

    pruning: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.pruning}


@dataclass(frozen=True)
class Question:
    """One request: what to ask, how to generate, and its name for messages."""

    conversation: Conversation
    settings: dict[str, Any]
    named: str


class VlmPrune(lmms):
    """Any model of a family with an adapter, under one spec."""

    is_simple = False

    def __init__(self, model: Any, processor: Any, arguments: Arguments) -> None:
        super().__init__()
        self.model, self.processor, self.arguments = model, processor, arguments
        self.device = model.device
        self.session = prune(model, arguments.prune, positions=arguments.positions, strict=arguments.strict)
        self._mean = getattr(processor.image_processor, "image_mean", None) if arguments.image_pad else None
        if arguments.image_pad and self._mean is None:
            raise UnsupportedError(
                f"image_pad=true: {type(processor.image_processor).__name__} has no image_mean to pad with"
            )
        if not getattr(processor, "chat_template", None):
            raise UnsupportedError(
                f"{type(processor).__name__} of {arguments.pretrained!r} has no chat template; give one: "
                "chat_template=FILE"
            )
        self._warned: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> VlmPrune:
        """What lmms-eval calls; its own reading of the text would cut specs at their commas."""
        arguments = Arguments.read(arg_string, additional_config)
        model, processor = load(
            arguments.pretrained, _device(arguments.device), arguments.dtype, arguments.trust_remote_code
        )
        if arguments.attn_implementation:
            model.set_attn_implementation(arguments.attn_implementation)
        if arguments.chat_template:
            processor.chat_template = Path(arguments.chat_template).read_text(encoding="utf-8")
        return cls(model, processor, arguments)

    def clean(self) -> None:
        """Keep the model: lmms-eval would delete it after one evaluation."""

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        raise UnsupportedError(
            f"{_task(requests)} compares likelihoods; pruning is evaluated on generated answers here"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[Any]:
        raise UnsupportedError(f"{_task(requests)} has several rounds; single questions work here")

    @torch.inference_mode()
    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in order; questions are answered together where task and settings are equal."""
        answers: list[GenerationResult] = []
        with tqdm(total=len(requests), desc=str(self.session.spec), disable=self.rank != 0) as bar:
            for batch in _batches(requests, self.arguments.batch_size, self._settings):
                answers += self._answer([self._question(request) for request in batch])
                bar.update(len(batch))
        # for the table that lmms-eval prints of speed
        seconds = sum(answer.token_counts.pruning["seconds"]["total"] for answer in answers)
        tokens = sum(answer.token_counts.output_tokens for answer in answers)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
        )
        return answers

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _question(self, request: Instance) -> Question:
        _, to_messages, settings, number, task, split = request.args
        shown = from_messages(to_messages(self.task_dict[task][split][number]))  # the document, as messages
        return Question(shown, dict(settings), f"{task} {number}")

    def _answer(self, batch: Sequence[Question]) -> list[GenerationResult]:
        texts = [
            self.processor.apply_chat_template(q.conversation.messages, add_generation_prompt=True)
            for q in batch
        ]
        # by row: pictures of each question
        images = [[picture(image, self._mean) for image in q.conversation.images] for q in batch]
        clips = [frames(clip, self.arguments.max_frames) for q in batch for clip in q.conversation.clips]
        if clips and all(modality.name != "video" for modality in self.session.adapter.modalities):
            raise UnsupportedError(
                f"{batch[0].named} shows a clip; {type(self.model).__name__} takes images only"
            )
        inputs = model_inputs(self.processor, self.model, texts, images, clips)
        numbers = numbered(adapter_for(self.model), self.processor, images)
        stills = numbers[-1].stop
        named = batch[0].named if len(batch) == 1 else f"{batch[0].named} to {batch[-1].named}"
        options = self._options(batch[0].settings)
        made = generate(
            self.model, self.session, inputs, pictures=stills + len(clips), named=named, **options
        )
        said = self.processor.batch_decode(made.ids, skip_special_tokens=True)
        # the hooks count all images of the batch, then all clips
        clip, answers = stills, []
        for row, question in enumerate(batch):
            # numbers of the pictures that this row shows
            seen = [*numbers[row], *range(clip, clip := clip + len(question.conversation.clips))]
            pruning = {
                "spec": self.session.spec,
                "positions": self.session.positions,
                "pictures": len(images[row]) + len(question.conversation.clips),
                **made.counts(seen),
                "seconds": made.seconds(len(batch)),
                "batch": len(batch),
            }
            counts = Counts(
                int(inputs["attention_mask"][row].sum()), self._length(made.ids[row]), pruning=pruning
            )
            # special tokens are gone already, stop strings of the task are not
            answers.append(GenerationResult(until(said[row], question.settings.get("until")), counts))
        return answers

    def _options(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Of ``generate``, from the settings of a task."""
        for name in sorted(settings.keys() - _READ - self._warned):
            logger.warning(
                f"the task sets {name}={settings[name]!r} for generation, which vlmprune does not use"
            )
            self._warned.add(name)
        words = int(settings.get("max_new_tokens") or MOST_TOKENS)
        words = min(words, self.arguments.max_new_tokens or words)  # a cap, where one was given
        options: dict[str, Any] = {"max_new_tokens": words, "num_beams": int(settings.get("num_beams") or 1)}
        warmth = float(settings.get("temperature") or 0)
        # greedy is a temperature of 0 or none; the task's ``do_sample`` does not decide
        options["do_sample"] = warmth > 0
        if warmth > 0:
            options["temperature"] = warmth
        passed = {name: settings[name] for name in _PASSED if settings.get(name) is not None}
        if warmth <= 0:  # transformers warns of settings of sampling where nothing is sampled
            passed = {name: value for name, value in passed.items() if name not in ("top_p", "top_k")}
        return options | passed

    def _length(self, ids: torch.Tensor) -> int:
        """Generated tokens up to the end of the text, which is counted."""
        ends = self.model.generation_config.eos_token_id
        stops = (
            torch.isin(ids, torch.tensor(ends, device=ids.device)).nonzero()
            if ends is not None
            else ids.new_empty(0)
        )
        return int(stops[0]) + 1 if len(stops) else len(ids)  # the end-of-text id is counted


class VlmPruneSimple(VlmPrune):
    """The same under ``--force_simple``: all pictures come before the text."""

    is_simple = True

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[1]

    def _question(self, request: Instance) -> Question:
        text, settings, to_visual, number, task, split = request.args
        visuals = to_visual(self.task_dict[task][split][number]) if to_visual else None
        return Question(from_visuals(visuals, text), dict(settings), f"{task} {number}")


def _batches(
    requests: Sequence[Instance], size: int, settings: Callable[[Instance], dict[str, Any]]
) -> Iterator[Sequence[Instance]]:
    """Requests in order, at most ``size`` of one task with equal settings."""
    # groupby joins neighbours only: the order of the requests stays
    for _, same in groupby(requests, lambda request: (request.task_name, settings(request))):
        alike = list(same)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _device(given: str | None) -> str:
    if given not in (None, "cuda"):
        return given
    if given is None and not torch.cuda.is_available():
        return "cpu"
    # one GPU for each process of a launcher
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def _task(requests: Sequence[Instance]) -> str:
    if not requests:
        raise EvaluationError("lmms-eval asked nothing; expected at least one request")
    return f"the task {requests[0].task_name!r}"
