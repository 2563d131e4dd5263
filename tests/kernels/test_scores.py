# SPDX-License-Identifier: Apache-2.0
"""Quadratic forms against float64."""

from __future__ import annotations

import pytest
import torch

from vlmprune.kernels import dispatch
from vlmprune.kernels.backends import BACKENDS

PLAIN = [name for name in BACKENDS if name != "triton"]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quadratic_forms(backend, dtype):
    g, m = drawn(2, 5, 12, dtype=dtype), drawn(12, 12, seed=1, dtype=dtype)
    found = dispatch.zoo_sensitivity(g, m, backend=backend)
    assert found.dtype == dtype
    expected = torch.einsum("bnh,hj,bnj->bn", g.double(), m.double(), g.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
