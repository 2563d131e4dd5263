# SPDX-License-Identifier: Apache-2.0
"""The synthetic benchmark as documents of lmms-eval: how they are written, asked and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..sample import Sample, exact
from ..shapes import shapes

NAME = "shapes"
_PICTURES = ("image_0", "image_1")  # columns; single ones, which lmms-eval leaves out while it builds prompts


def write(path: Path, limit: int | None = None, split: str = "test") -> int:
    """Draw samples into a parquet file; returns how many."""
    from datasets import Dataset, Features, Image, List, Value

    text = Value("string")
    features = Features(
        {name: text for name in ("id", "cluster", "family", "group", "question")}
        | {"answers": List(text), "history": List(List(text)), "images": List(text)}
        | {name: Image() for name in _PICTURES}
    )
    samples = shapes().samples(split, limit)
    Dataset.from_list([_document(sample) for sample in samples], features=features).to_parquet(path)
    return len(samples)


def _document(sample: Sample) -> dict[str, Any]:
    # None in the second column for questions about one picture
    pictures = dict.fromkeys(_PICTURES) | dict(zip(_PICTURES, sample.load_images(), strict=False))
    plain = {name: getattr(sample, name) for name in ("id", "cluster", "family", "group", "question")}
    lists = {name: list(getattr(sample, name)) for name in ("answers", "images")}
    return plain | lists | {"history": [list(turn) for turn in sample.history]} | pictures


def _sample(doc: Mapping[str, Any]) -> Sample:
    return Sample(
        **{name: doc[name] for name in ("id", "cluster", "family", "group", "question")},
        answers=tuple(doc["answers"]),
        history=tuple((question, answer) for question, answer in doc["history"]),
        images=tuple(doc["images"]),
    )


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    return [doc[name].convert("RGB") for name in _PICTURES[: len(doc["images"])]]


def doc_to_messages(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    """The conversation that the benchmark itself shows to a model."""
    messages, pictures = _sample(doc).messages(), iter(doc_to_visual(doc))
    # lmms-eval wants each picture in its part of the message
    for message in messages:
        message["content"] = [
            part | {"url": next(pictures)} if part["type"] == "image" else part for part in message["content"]
        ]
    return messages


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """All turns in one, for models without a chat."""
    return " ".join([*(part for turn in doc["history"] for part in turn), doc["question"]])


def doc_to_target(doc: Mapping[str, Any]) -> str:
    return doc["answers"][0]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    score = exact(_sample(doc), results[0])
    return {"accuracy": score, f"accuracy_{doc['group']}": score}
