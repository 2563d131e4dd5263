# SPDX-License-Identifier: Apache-2.0
"""Functions of the files in ``assets/lmms_tasks``, where upstream's need a network, a key or much memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any


def mean_score(results: Sequence[Mapping[str, Any]]) -> float:
    """Mean of the scores of single answers."""
    return sum(result["score"] for result in results) / len(results)


def seed_images(dataset: Any) -> Any:
    """The image questions of SEED-Bench."""
    return dataset.filter(
        lambda kinds: [kind == "image" for kind in kinds], input_columns="data_type", batched=True
    )


def mmbench_en(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """English MMBench."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator, mmbench_process_results

    return _mmbench(mmbench_evaluator, mmbench_process_results(doc, results))


def mmbench_cn(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Chinese MMBench."""
    from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator, mmbench_process_results

    return _mmbench(mmbench_evaluator, mmbench_process_results(doc, results))


def _mmbench(evaluator: Any, processed: Mapping[str, Any]) -> dict[str, Any]:
    import pandas

    row = processed["gpt_eval_score"]
    # static_only: an answer that names no option is wrong, no other model is asked
    hit = evaluator.eval_sub_data(pandas.DataFrame([row]), {row["index"]: row["answer"]}, static_only=True)
    scored = {**row, "score": float(hit)}
    return {"accuracy": scored, "circular": scored}


def mmbench_circular(results: Sequence[Mapping[str, Any]]) -> float:
    """The official number: a question counts where it is answered under every rotation of its options."""
    rotations: dict[int, list[float]] = {}
    for result in results:
        # rotations of a question have its index plus a multiple of a million
        rotations.setdefault(int(result["index"]) % 1_000_000, []).append(result["score"])
    return sum(map(min, rotations.values())) / len(rotations)


def pope(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """POPE with what was answered."""
    from lmms_eval.tasks.pope.utils import pope_process_results

    # one row for both metrics; the share of yes shows a model that always agrees
    row = pope_process_results(doc, results)["pope_accuracy"]
    return {"accuracy": row, "f1": row, "yes_ratio": float(row["prediction"] == "yes")}


@cache
def _gqa_pictures() -> tuple[Any, dict[str, int]]:
    from datasets import load_dataset

    pictures = load_dataset("lmms-lab-encoder/GQA", "testdev_balanced_images", split="testdev")
    return pictures, {name: row for row, name in enumerate(pictures["id"])}


def gqa_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The picture of a question, read from disk."""
    pictures, rows = _gqa_pictures()
    return [pictures[rows[doc["imageId"]]]["image"].convert("RGB")]
