# SPDX-License-Identifier: Apache-2.0
"""What FlashAttention would be handed: it takes gaps in position ids for the borders of packed sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlmprune
from vlmprune.testing.tiny import tiny_inputs, tiny_model

NAME = "flash_in_name_only"


@pytest.mark.parametrize("spec", ["fastervlm@9", "fastv(layer=2)@9"])
@torch.no_grad()
def test_flash_attention_is_told_no_positions(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []

    def attend(*args: Any, **options: Any) -> Any:
        handed.append(options.get("position_ids"))
        return sdpa_attention_forward(*args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, attend)
    # masks are made for implementations that are known to all models only
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    model, inputs = tiny_model(), tiny_inputs(images=(1, 0))
    with vlmprune.prune(model, spec, positions="original"):
        want = model(**inputs).logits
    model.model.language_model.config._attn_implementation = NAME
    model(**inputs)
    assert len(handed) == 4 and all(positions is not None for positions in handed), (
        "the plain model tells them"
    )
    handed.clear()
    with vlmprune.prune(model, spec, positions="original"):
        got = model(**inputs).logits
    assert handed == [None] * 4 and torch.equal(got, want)
