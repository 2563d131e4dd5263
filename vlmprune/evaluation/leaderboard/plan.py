# SPDX-License-Identifier: Apache-2.0
"""Plan: which specs are compared, and in which portions the questions are answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import EvaluationError, VlmPruneError
from ...models import reads_any_size
from ...models.loading import BUNDLED, TINY, read_pretrained
from ...spec import Budget, parse
from ..stats.summary import BLIND, DENSE, budget_of
from ..tasks.sample import Sample, Task
from .config import Config

METHODS = ("fastervlm", "visionzip", "divprune", "holov", "zooprune", "fastv")
BUDGETS = (48, 32, 16)  # of 144: a third, two ninths and a ninth, the shares of 192, 128 and 64 of 576
QUESTIONS, QUICK_QUESTIONS = 1000, 400
ANSWER = 16  # tokens of an answer, where neither config nor task says


def default_config(quick: bool = False) -> Config:
    """The embedded model on the embedded benchmark; ``quick`` takes one budget and fewer questions."""
    keep = BUDGETS[1:2] if quick else BUDGETS
    limit = QUICK_QUESTIONS if quick else QUESTIONS
    return Config.of({"models": [TINY], "specs": list(METHODS), "keep": list(keep), "limit": limit})


def with_baselines(specs: Iterable[Any], seeds: Sequence[int], shrinks: bool = False) -> list[str]:
    """Specs with what every comparison needs: dense and blind; at each budget what ``baselines`` says.

    ``random`` without a seed stands for all seeds. Specs without a budget get theirs when it is known what
    they read.
    """
    texts = list(map(str, specs))
    found = [DENSE, BLIND]
    # specs without a budget have none to compare at
    for budget in dict.fromkeys(filter(None, map(budget_of, texts))):
        found += baselines(budget, seeds, shrinks)
    # its seeds stand for it
    found += [text for text in texts if not _is_bare_random(text)]
    return list(dict.fromkeys(str(parse(text)) for text in found))  # as rows print them, each once


def baselines(budget: str, seeds: Sequence[int], shrinks: bool = False) -> list[str]:
    """What a method at a budget is compared with: random under all seeds, uniform, pool, a smaller picture.

    Args:
        shrinks: whether the model makes fewer tokens of a smaller picture, which is shrunk as a whole.
    """
    found = [*(f"random(seed={seed})@{budget}" for seed in seeds), f"uniform@{budget}", f"pool@{budget}"]
    return [*found, f"downsample@{budget}"] if shrinks and Budget.of(budget).scope == "image" else found


def shrinks(model: str, task: Task, trust_remote_code: bool) -> bool:
    """Whether ``downsample`` can answer a task; no weights are read for it. Clips are never shrunk."""
    if model in BUNDLED or getattr(task, "video", False):
        return False
    from transformers import AutoConfig

    config = read_pretrained(model, "config", AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    return reads_any_size(config.model_type)


def budget_read(lines: Iterable[Mapping[str, Any]]) -> str | None:
    """The budget that equals what a spec without one read, its tokens per layer; None where that is all, or
    nothing, of which no budget is.
    """
    seen = [line for line in lines if line["dense_tokens"]]
    whole = sum(line["dense_tokens"] for line in seen)
    share = round(sum(line["layer_tokens"] for line in seen) / whole, 3) if whole else 1.0
    if share >= 1 or not any(line["layer_tokens"] for line in seen):
        return None
    return str(Budget(max(share, 0.001)))  # 0 is no budget


def _is_bare_random(text: str) -> bool:
    """``random@64``, which is the mean of its seeds and no draw of its own."""
    parts = parse(text).parts
    return len(parts) == 1 and parts[0].name == "random" and not parts[0].args


@dataclass(frozen=True)
class Setting:
    """One model on one task, as plain values that travel to workers.

    ``task_code`` and ``plugins`` are digests of code that does not come with this package: of the task, and
    of methods by name. All but ``threads`` is part of what a cell is.
    """

    model: str
    weights: str
    task: str
    task_fingerprint: str
    split: str
    limit: int | None
    batch_size: int
    max_new_tokens: int
    positions: str | None
    device: str
    dtype: str
    versions: tuple[tuple[str, str], ...]
    task_code: str = ""
    plugins: tuple[tuple[str, str], ...] = ()
    trust_remote_code: bool = False
    threads: int | None = None


def load_samples(task: Task, split: str, limit: int | None) -> list[Sample]:
    """Samples of a task; whatever keeps them from being there becomes one clear error."""
    try:
        samples = list(task.samples(split, limit))
    except VlmPruneError:
        raise
    except (OSError, ImportError, ValueError, KeyError, RuntimeError) as error:
        # the first line that says anything
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise EvaluationError(
            f"the samples of task {task.name!r} (split {split!r}) cannot be loaded: {type(error).__name__}: "
            f"{reason}; fetch its data once on a machine with network access, and copy the cache here if "
            "this one has none"
        ) from error
    if not samples:
        raise EvaluationError(f"task {task.name!r} has no samples in split {split!r}")
    ids = [sample.id for sample in samples]
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise EvaluationError(
            f"task {task.name!r} has two samples {twice!r}; ids must be distinct, answers are filed under "
            "them"
        )
    return samples


def answer_length(wanted: int | None, task: Task) -> int:
    """Tokens of an answer: what the config says, else the task, else ``ANSWER``."""
    return wanted or getattr(task, "max_new_tokens", None) or ANSWER


def portions(task: Task, samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """The shards of a task; tasks with clips are cut in their own order, as lmms-eval runs them."""
    if getattr(task, "video", False):
        return [list(samples[start : start + size]) for start in range(0, len(samples), size)]
    return shards(samples, size)


def shards(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Portions of about ``size`` samples that are answered the same whatever else is asked.

    Clusters stay whole, so that each image is encoded once and in the same company, on every engine and after
    every kill. A cluster larger than ``size`` is a portion of its own, answered in several batches.
    """
    clusters: dict[str, list[Sample]] = {}
    for sample in samples:
        clusters.setdefault(sample.cluster, []).append(sample)
    found: list[list[Sample]] = []
    for cluster in clusters.values():
        # the last portion is full, and a cluster is never split
        if not found or len(found[-1]) + len(cluster) > size:
            found.append([])
        found[-1] += cluster
    return found
