# SPDX-License-Identifier: Apache-2.0
"""An engine of vLLM in the process of a test, and what it answers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Job = tuple[dict[str, Any], list[int]]  # request, answer of transformers


@contextmanager
def engine(folder: Path | str, spec: str, **options: Any) -> Iterator[Any]:
    """An engine of the model in a folder, which prunes by ``spec`` what names none; options are vLLM's.

    It is put away behind, so that another can follow in this process.
    """
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    from vlmprune.serving import overrides

    alike = {
        "dtype": "float32",
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "block_size": 32,  # pruned prompts are short, and share a prefix in whole blocks only
        "limit_mm_per_prompt": {"image": 2},
    }
    made = vllm.LLM(str(folder), hf_overrides=overrides(spec), **alike | options)
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def outputs_of(
    engine: Any, requests: Sequence[dict], new: int, never: Mapping[int, float] | None
) -> list[Any]:
    """Greedy answers of ``new`` tokens. With ``never``, a bias of tokens, they do not end before."""
    import vllm

    biased = {} if never is None else {"ignore_eos": True, "logit_bias": dict(never)}
    greedy = vllm.SamplingParams(temperature=0, max_tokens=new, **biased)
    return engine.generate(list(requests), greedy, use_tqdm=False)


def ids_of(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def wrong(
    engine: Any, jobs: Sequence[Job], new: int, never: Mapping[int, float] | None = None
) -> list[tuple[Any, list[int], list[int]]]:
    """(options of the request, answer, answer of transformers) wherever the answers differ."""
    given = ids_of(outputs_of(engine, [request for request, _ in jobs], new, never))
    return [
        (request.get("mm_processor_kwargs"), mine, theirs)
        for (request, theirs), mine in zip(jobs, given, strict=True)
        if mine != theirs
    ]
