# SPDX-License-Identifier: Apache-2.0
"""One model, one spec, one task, run by lmms-eval itself; its sample rows come back as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from ....errors import EvaluationError
from ...answer.record import Record
from .arguments import Arguments
from .task import LmmsTask


class Cell(NamedTuple):
    """Records in the order of the documents, and the task's own numbers."""

    records: list[Record]
    metrics: dict[str, float]


def run_cell(
    model: Any,
    processor: Any,
    spec: str,
    task: LmmsTask,
    *,
    offset: int = 0,
    limit: int | None = None,
    **arguments: Any,
) -> Cell:
    """Run ``limit`` documents from ``offset`` on, as ``lmms-eval --model vlmprune`` does.

    Args:
        model, processor: as loaded; left as they were.
        spec: as in ``fastervlm@64``.
        arguments: fields of ``Arguments``, such as ``batch_size`` or ``max_new_tokens``.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from .model import VlmPrune

    # as lmms-eval has it, without the "lmms:" of ours
    name = task.lmms.config.task
    found = simple_evaluate(
        model=VlmPrune(model, processor, Arguments(prune=spec, **arguments)),
        tasks=[task.lmms],
        offset=offset,
        limit=limit,
        # without a manager of ours it would read two thousand task files anew
        task_manager=TaskManager("ERROR", include_defaults=False),
        bootstrap_iters=0,
        process_docs_parallel=1,
        log_samples=True,
        # lmms-eval would set the seeds of the whole process
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    rows = found["samples"][name]
    expected = min(limit or len(task.lmms.eval_docs), len(task.lmms.eval_docs) - offset)
    if len(rows) != expected:
        raise EvaluationError(f"lmms-eval gave {len(rows)} sample rows of {task.name}; expected {expected}")
    official = task.lmms.aggregation()
    # "accuracy,none" -> "accuracy", of keys that are metrics of the task
    metrics = {
        key.split(",")[0]: value
        for key, value in found["results"][name].items()
        if key.split(",")[0] in official
    }
    return Cell(
        records(rows, task), {key: float(value) for key, value in metrics.items() if isinstance(value, Real)}
    )


def records(rows: Sequence[Mapping[str, Any]], task: LmmsTask) -> list[Record]:
    """From sample rows of the plug-in, as lmms-eval returns them or writes them with --log_samples."""
    return [_record(row, task) for row in sorted(rows, key=lambda row: row["doc_id"])]


def _record(row: Mapping[str, Any], task: LmmsTask) -> Record:
    number, answer, seen = row["doc_id"], row.get("resps", row["filtered_resps"]), row["token_counts"][0]
    # of requests and repeats, of which there is one; a log has the text alone
    while isinstance(answer, list):
        answer = answer[0]
    if not seen or "realised_tokens" not in seen:
        raise EvaluationError(
            f"{task.name} document {number} has no counts of tokens; expected a row that the plug-in "
            "answered, without a response cache"
        )
    sample = task.sample(number)
    # fields that are called the same in a sample row and in a record
    same = (
        "spec",
        "dense_tokens",
        "realised_tokens",
        "layer_tokens",
        "firings",
        "positions",
        "batch",
        "peak_memory",
    )
    return Record(
        id=sample.id,
        cluster=sample.cluster,
        family=sample.family,
        group=sample.group,
        answer=answer.strip(),
        score=task.score(sample, answer),
        on_object=None,
        encoding="each" if seen["pictures"] else "none",
        seconds={"encode": 0.0, **seen["seconds"]},
        **{name: seen[name] for name in same},
    )
