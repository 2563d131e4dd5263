# SPDX-License-Identifier: Apache-2.0
"""Partial scores: in which order they are added decides what float32 makes of them."""

from __future__ import annotations

import pytest
import torch

from vlmprune.kernels import dispatch
from vlmprune.kernels.backends import BACKENDS


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_partial_scores_are_added_from_the_first_to_the_last(backend: str) -> None:
    # (1e8 - 1e8) + 1 is 1, and (1 - 1e8) + 1e8 is 0
    parts = torch.tensor([[[1e8, 0.5]], [[-1e8, 0.0]], [[1.0, 0.0]]])  # (R, B, N)
    assert dispatch.topk_select(parts, 1, backend=backend).tolist() == [[0]]
    assert dispatch.topk_select(parts.flip(0), 1, backend=backend).tolist() == [[1]]
