# SPDX-License-Identifier: Apache-2.0
"""One engine per file, and prompts for the trained small model with the answers that transformers gives."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from served import Twin

SITE = Path(__file__).parent / "site"
# in this process, on one thread, with small pages: an engine that a test can look into
ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(SITE),
}

if find_spec("vllm") is not None:
    os.environ.update(ENGINE)
    torch.set_num_threads(1)  # torch has read the variable before; two threads crawl on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = find_spec("vllm") is None
    for item in items:
        if missing and item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed, see CONTRIBUTING.md"))


@pytest.fixture(scope="session")
def twin() -> Twin:
    return Twin()
