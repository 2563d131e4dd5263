# SPDX-License-Identifier: Apache-2.0
"""What is captured of a vision tower equals the tower's own eager attention, in every family that has one to
read.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from later_families import param
from torch import Tensor

from vlmprune.core.deferred import NOW
from vlmprune.hooks.attention_call import AttentionCall
from vlmprune.hooks.attention_tap import AttentionTap, reads_interface
from vlmprune.hooks.vision.encode import run_encoder
from vlmprune.hooks.vision.tower import FusedReader, TapReader, attention_of, find_blocks, reader_of
from vlmprune.models import adapter_for
from vlmprune.testing.tiny import FAMILIES, tiny_inputs, tiny_model
from vlmprune.testing.tiny_configs import missing

NEEDS = ("cls_attention", "received_attention")


def encoded(model: Any, inputs: dict[str, Tensor], needs: tuple[str, ...]) -> tuple[dict[str, Tensor], Any]:
    adapter = adapter_for(model)
    capture = adapter.capture(needs)
    with capture as record, torch.no_grad():
        run_encoder(adapter, adapter.modalities[0], inputs, [])
    return {need.what: value for need, value in record.take().items()}, capture


def eager_maps(
    model: Any, inputs: dict[str, Tensor], attention: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Every (crops, H, S, S) map that the eager function of the tower returns for one block."""
    model.set_attn_implementation("eager")
    module, maps = sys.modules[type(attention).__module__], []

    def record(own: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = original(own, *args, **kwargs)
        if own is attention:
            maps.append(weights)
        return output, weights

    original = module.eager_attention_forward
    monkeypatch.setattr(module, "eager_attention_forward", record)
    adapter = adapter_for(model)
    with torch.no_grad():
        run_encoder(adapter, adapter.modalities[0], inputs, [])
    return maps


def received_of(maps: Tensor) -> Tensor:
    """(crops, S) mean attention over heads and the queries that see a key; masked keys are padding."""
    seen = maps.gt(0).any(dim=1)  # (crops, S, S)
    real = seen.diagonal(dim1=1, dim2=2)[..., None]
    total = (maps * real[:, None]).sum(dim=(1, 2))
    return total / (maps.shape[1] * (seen & real).sum(dim=1).clamp_min(1))


@pytest.mark.parametrize(
    "family",
    [
        param("tower attention", family, one_in=3)
        for family in FAMILIES
        if missing(family) is None and family != "fast_vlm"
    ],
)
def test_captured_attention_is_that_of_an_eager_twin(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny_inputs(family, images=(1, 2))
    model = tiny_model(family)
    needs = NEEDS if adapter_for(model).cls else NEEDS[1:]
    found, capture = encoded(model, inputs, needs)
    first = capture.prefix
    assert all(isinstance(reader, TapReader) for _, reader in capture.readers)
    twin = tiny_model(family)
    blocks = find_blocks(adapter_for(twin).capture(()).towers[0])
    maps = eager_maps(twin, inputs, attention_of(blocks[capture.readers[0][0]]), monkeypatch)
    assert maps, "the block did not run"
    received = [received_of(one)[:, first:] for one in maps]  # (crops, N) each
    received = received[0] if len(received) == 1 else torch.cat([one.flatten() for one in received])[None]
    torch.testing.assert_close(found["received_attention"], received, atol=2e-6, rtol=1e-4)
    if "cls_attention" in needs:
        torch.testing.assert_close(found["cls_attention"], maps[0][:, :, 0, first:], atol=2e-6, rtol=1e-4)


class Rotated(torch.nn.Module):
    """Pixtral's way: all pictures in one sequence, a mask that keeps them apart, queries and keys rotated by
    place.
    """

    def __init__(self) -> None:
        super().__init__()
        from transformers import PixtralVisionConfig
        from transformers.models.pixtral.modeling_pixtral import PixtralAttention

        self.config = PixtralVisionConfig(hidden_size=32, num_attention_heads=4, attn_implementation="sdpa")
        self.attention = PixtralAttention(self.config)

    def forward(self, hidden: Tensor, mask: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        return self.attention(hidden, attention_mask=mask, position_embeddings=angles)[0]


def test_packed_pictures_are_kept_apart_and_rotation_is_followed() -> None:
    torch.manual_seed(0)
    layer, lengths = Rotated().eval(), (4, 6)
    hidden, angle = torch.randn(1, 10, 32) * 3, torch.randn(10, 8)
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()[None, None]
    calls: list[AttentionCall] = []
    tap = AttentionTap(layer.attention, lambda call, output: calls.append(call))
    assert reads_interface(layer.attention)
    tap.install()
    with torch.no_grad():
        layer(hidden, mask, (angle.cos(), angle.sin()))
        tap.remove()
        layer.config._attn_implementation = "eager"
        _, maps = layer.attention(
            hidden,
            attention_mask=torch.zeros(1, 1, 10, 10).masked_fill(~mask, torch.finfo().min),
            position_embeddings=(angle.cos(), angle.sin()),
        )
    apart = torch.cat([part.mean(dim=(0, 1)) for part in (maps[0, :, :4, :4], maps[0, :, 4:, 4:])])
    torch.testing.assert_close(calls[0].received(rows=3)[0], apart, atol=1e-6, rtol=1e-4)


class Split(torch.nn.Module):
    """vLLM's way: a fused projection that returns a tuple, and holds the heads of one rank of two."""

    num_heads, num_heads_per_partition, scale = 4, 2, 0.5

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.qkv_proj = torch.nn.Identity()
        self.qkv_proj.register_forward_hook(lambda module, args, output: (output, None))

    def forward(self, hidden: Tensor) -> None:
        self.qkv_proj(hidden @ self.weight)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fused_projection_that_returns_a_tuple_is_read(ranks: int) -> None:
    torch.manual_seed(0)
    whole = torch.randn(3, 4, 6, 8)  # q, k, v; heads; tokens; width
    hidden, seen = torch.randn(2, 5, 8), []
    held = 4 // ranks
    parts = [whole[:, rank * held : (rank + 1) * held] for rank in range(ranks)]
    weights = [
        torch.cat([torch.cat([head[:5, :].T @ torch.eye(5, 6) for head in one], dim=1) for one in part], 1)
        for part in parts
    ]  # (8, 3 * held * 6)
    others = [(hidden @ weight).chunk(3, dim=-1) for weight in weights]

    def gather(mine: Tensor) -> Tensor:
        number = len(seen_parts)
        seen_parts.append(mine)
        shares = [other[number].unflatten(-1, (held, -1)).transpose(1, 2) for other in others]
        assert mine.equal(shares[0])  # this rank is the first
        return torch.cat(shares, dim=1)

    seen_parts: list[Tensor] = []
    attention = Split(weights[0])
    attention.num_heads_per_partition = held
    reader = reader_of(attention, gather if ranks > 1 else None)
    assert isinstance(reader, FusedReader)
    handles = list(reader.install(lambda: NOW, seen.append))
    attention(hidden)
    for handle in handles:
        handle.remove()
    attention(hidden)
    assert len(seen) == 1
    queries, keys = (
        torch.cat([other[part].unflatten(-1, (held, -1)).transpose(1, 2) for other in others], dim=1)
        for part in (0, 1)
    )
    assert seen[0].queries.equal(queries) and seen[0].keys.equal(keys)
    assert seen[0].scaling == 0.5 and queries.shape == (2, 4, 5, 6)
