# SPDX-License-Identifier: Apache-2.0
"""Attention rows and quadratic forms against float64, and what a selection makes of partial scores."""

from __future__ import annotations

import pytest
import torch

from vlmprune.kernels import dispatch
from vlmprune.kernels.backends import BACKENDS

PLAIN = [name for name in BACKENDS if name != "triton"]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [9, 1500])
def test_rows_are_softmaxed_over_all_keys_and_cut(backend, with_lse, heads, shared, dtype, slots):
    q, k = drawn(2, heads, 16, dtype=dtype), drawn(2, shared, slots, 16, seed=1, dtype=dtype)
    logits = torch.stack(
        [(k[:, h // (heads // shared)].double() @ q[:, h].double()[..., None])[..., 0] for h in range(heads)],
        1,
    )
    logits *= 0.25
    lse = logits.logsumexp(-1).float() if with_lse else None
    v0, nv = 2, slots - 4
    parts = dispatch.attn_row_scores(q, k, lse, v0, nv, 0.25, backend=backend)
    assert parts.dtype == torch.float32 and parts.shape[1:] == (2, nv)
    torch.testing.assert_close(
        parts.sum(0).double(), logits.softmax(-1).mean(1)[:, v0 : v0 + nv], rtol=2e-5, atol=1e-8
    )
    assert dispatch.topk_select(parts, 3, backend=backend).shape == (2, 3)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quadratic_forms(backend, dtype):
    g, m = drawn(2, 5, 12, dtype=dtype), drawn(12, 12, seed=1, dtype=dtype)
    found = dispatch.zoo_sensitivity(g, m, backend=backend)
    assert found.dtype == dtype
    expected = torch.einsum("bnh,hj,bnj->bn", g.double(), m.double(), g.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
