# SPDX-License-Identifier: Apache-2.0
"""Questions to train on: the synthetic ones of the package, or a JSON-lines file with your own pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SpecError, UnsupportedError, did_you_mean
from ..evaluation.tasks.sample import Sample
from ..models.base import Adapter
from ..models.loading import prompt
from ..viz.overlay import open_picture

SHAPES = "shapes"
NO_LOSS = -100  # label of what is not part of an answer
_READ = {"input_ids", "attention_mask", "pixel_values"}  # what a batch is made of


@dataclass(frozen=True, eq=False)
class Exercise:
    """A question about one picture, with its answer.

    Args:
        picture: gives the picture (PIL, RGB).
    """

    question: str
    answer: str
    picture: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Data:
    """Questions to train on and, apart from them, questions to look at before and after.

    Args:
        source: "shapes", or the path of a file.
        fingerprint: of what they are.
    """

    source: str
    fingerprint: str
    train: Sequence[Exercise]
    dev: Sequence[Exercise]


def read_data(source: str, count: int, dev: int) -> Data:
    """``count`` questions to train on and ``dev`` others, which may be none.

    Args:
        source: "shapes", or a file of lines ``{"image": PATH, "question": TEXT, "answer": TEXT}``; paths are
            relative to the file.
    """
    if source == SHAPES:
        return _shapes(count, dev)
    path = Path(source)
    if path.is_dir() or not path.is_file():
        near = did_you_mean(source, [SHAPES])
        raise SpecError(
            f"data {source!r} is {'a folder' if path.is_dir() else 'not there'}; expected {SHAPES!r} or a "
            f'file with a line {{"image": PATH, "question": TEXT, "answer": TEXT}} for each question.{near}'
        )
    asked = [_line(path, number, line) for number, line in _lines(path)]
    if len(asked) < count + dev:
        raise SpecError(
            f"{source!r} has {len(asked)} questions; expected {count} to train on and {dev} others; lower "
            "--samples or --dev"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    # the last ones are set apart, so that no question is in both, whatever count is
    return Data(source, digest, asked[: len(asked) - dev][:count], asked[len(asked) - dev :])


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers in the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"data {str(path)!r} cannot be read ({error}); expected JSON lines") from error
    # not splitlines: JSON may hold other ends of a line, such as U+2028, within a text
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _line(path: Path, number: int, line: str) -> Exercise:
    try:
        found = json.loads(line)
        image, question, answer = (found[name] for name in ("image", "question", "answer"))
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"line {number} of {str(path)!r} cannot be used ({error}); expected an image, a question and an "
            "answer"
        ) from error
    if not all(isinstance(text, str) and text for text in (image, question, answer)):
        raise SpecError(f"line {number} of {str(path)!r} has an empty field; expected three texts")
    if not (path.parent / image).is_file():
        raise SpecError(f"line {number} of {str(path)!r} names the picture {image!r}, which is not there")

    def picture() -> Any:
        try:
            return open_picture(path.parent / image)
        except SpecError as error:
            raise SpecError(f"line {number} of {str(path)!r}: {error}") from error

    return Exercise(question, answer, picture)


def _shapes(count: int, dev: int) -> Data:
    from ..evaluation.tasks.shapes import shapes
    from ..evaluation.tasks.shapes.dataset import PER_FAMILY

    task = shapes()

    def some(split: str, wanted: int) -> list[Exercise]:
        whole = PER_FAMILY[split] * len(task.families)
        drawn = 0
        found: list[Exercise] = []
        while len(found) < wanted and drawn < whole:
            # drawing takes time, and most have one picture; a longer list begins with the shorter one
            drawn = min(whole, max(drawn, wanted) * 4 // 3 + len(task.families))
            samples = task.samples(split, drawn)
            found = [_exercise(one) for one in samples if len(one.images) == 1 and not one.history]
        if len(found) < wanted:
            raise SpecError(f"{wanted} questions of {SHAPES}/{split}; it has {len(found)} with one picture")
        return found[:wanted]

    return Data(SHAPES, task.fingerprint, some("train", count), some("dev", dev))


def _exercise(sample: Sample) -> Exercise:
    return Exercise(sample.question, sample.answers[0], lambda: sample.load_images()[0])


def batch_of(model: Any, processor: Any, asked: Sequence[Exercise]) -> tuple[dict[str, Any], Tensor]:
    """Inputs of a model for questions with their answers behind them, padded on the right; (B, L) labels."""
    tokenizer = processor.tokenizer
    texts = [prompt(processor, one.question) for one in asked]
    rows, pixels = [], []
    for text, one in zip(texts, asked, strict=True):
        made = processor(images=one.picture(), text=text, return_tensors="pt")
        # the end of a sequence is learned as a part of the answer
        answer = tokenizer(one.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if other := sorted({*made} - _READ):
            raise UnsupportedError(
                f"{type(processor).__name__} gives {', '.join(other)} beside pixels and text, which the "
                "training does not hand on; train with a LLaVA family"
            )
        rows.append((made["input_ids"][0], torch.tensor(answer)))
        pixels.append(made["pixel_values"])
    length = max(len(first) + len(answer) for first, answer in rows)
    # its id does not matter, since the mask hides it
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(rows), length), filler)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, NO_LOSS)
    for row, (first, answer) in enumerate(rows):
        end = len(first) + len(answer)
        ids[row, :end], mask[row, :end] = torch.cat([first, answer]), 1
        # labels stand at their tokens; whoever reads them shifts by one
        labels[row, len(first) : end] = answer
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat(pixels)}
    device = model.device
    moved = {name: value.to(device) for name, value in inputs.items()}
    moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
    return moved, labels.to(device)


def check_masks(adapter: Adapter, method: str) -> None:
    """Raise where a decoder needs more than a plain causal mask over its sequence."""
    if adapter.text_type is not None or adapter.deepstack is not None:
        raise UnsupportedError(
            f"training of {method} needs a decoder with a plain causal mask, and {adapter.model_type} makes "
            "its masks by token types or adds features later; train with a LLaVA family"
        )


def visual_of(adapter: Adapter, input_ids: Tensor, keep: int) -> tuple[Tensor, int]:
    """(B, L) bool, columns of the pictures of ids (B, L), and how many each row has: more than ``keep``."""
    visual = input_ids == adapter.token_id(adapter.modalities[0])
    counts = visual.sum(dim=1).tolist()
    if min(counts) != max(counts) or counts[0] <= keep:
        raise UnsupportedError(
            f"pictures of {counts} visual tokens; training needs pictures of one size with more than the "
            f"{keep} that stay"
        )
    return visual, counts[0]


def rows_that_answer(labels: Tensor) -> Tensor:
    """(B, L) bool, columns that predict a token of the answer, labels (B, L)."""
    # one to the left of each label; the last column predicts nothing
    return F.pad(labels[:, 1:] != NO_LOSS, (0, 1))


def question_columns(visual: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
    """(B, L) bool, text behind the picture and before the answer; ``valid`` (B, L): no padding."""
    # counted from the right: no visual token is here or further on
    behind = visual.flip(1).cumsum(1).flip(1) == 0
    # the answer and all behind it
    answer = (labels != NO_LOSS).cumsum(dim=1) > 0
    return behind & valid & ~answer


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """() mean cross entropy of the answers, logits (B, L, V) and labels (B, L)."""
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_LOSS
    )
