# SPDX-License-Identifier: Apache-2.0
"""What is captured of a vision tower equals the tower's own eager attention, in every family that has one to
read.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from available import skip_without
from later_families import param
from torch import Tensor

from vlmprune.hooks.attention_call import AttentionCall
from vlmprune.hooks.attention_tap import AttentionTap, reads_interface
from vlmprune.hooks.vision.capture import TapReader, reader_of
from vlmprune.hooks.vision.encode import run_encoder
from vlmprune.hooks.vision.tower import FusedReader, InnerReader, attention_of, find_blocks
from vlmprune.models import adapter_for
from vlmprune.testing.families import FAMILIES as FACTS
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
        if missing(family) is None and family != "fast_vlm" and FACTS[family].reads_tower
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


def test_captured_attention_of_a_tower_of_timm_is_its_own_without_fusion() -> None:
    skip_without("fast_vlm")
    inputs = tiny_inputs("fast_vlm", images=(1, 2))
    found, capture = encoded(tiny_model("fast_vlm"), inputs, NEEDS[1:])
    assert all(isinstance(reader, FusedReader) for _, reader in capture.readers)
    twin, maps = tiny_model("fast_vlm"), []
    adapter = adapter_for(twin)
    attention = attention_of(find_blocks(adapter.capture(()).towers[0])[capture.readers[0][0]])
    attention.fused_attn = False  # then a map goes through the dropout of weights
    attention.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    with torch.no_grad():
        run_encoder(adapter, adapter.modalities[0], inputs, [])
    (one,) = maps  # (crops, H, S, S)
    torch.testing.assert_close(found["received_attention"], one.mean(dim=(1, 2)), atol=2e-6, rtol=1e-4)
    assert found["received_attention"].std(dim=1).min() > 1e-4, "every patch receives the same"


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


class Inner(torch.nn.Module):
    """vLLM's way: a module that is handed queries and keys, of the heads of one rank."""

    head_size, scale = 6, 0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        pass


class Split(torch.nn.Module):
    """An attention module around it, which calls it by position or by name, with heads apart or not."""

    num_heads = 4

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.attn, self.named = Inner(), named

    def forward(self, states: list[Tensor]) -> None:
        if self.named:
            self.attn(**dict(zip(("query", "key", "value"), states, strict=True)))
        else:
            self.attn(*(one.flatten(2) for one in states))


@pytest.mark.parametrize(("ranks", "named"), [(1, True), (1, False), (2, True), (2, False)])
def test_what_vllm_hands_to_its_inner_module_is_read(ranks: int, named: bool) -> None:
    torch.manual_seed(0)
    whole = torch.randn(3, 2, 5, 4, 6)  # q, k, v; crops; tokens; heads; width
    shares = whole.chunk(ranks, dim=3)
    apart, seen = [share.transpose(2, 3) for share in shares], []

    def gather(mine: Tensor) -> Tensor:
        (part,) = (number for number in range(3) if mine.equal(apart[0][number]))  # this rank is the first
        return torch.cat([share[part] for share in apart], dim=1)

    attention, recorder = Split(named), SimpleNamespace(attend=lambda block, call: seen.append(call))
    reader = reader_of(attention, gather if ranks > 1 else None)
    assert isinstance(reader, InnerReader)
    handles = list(reader.install(lambda: recorder, 0))
    attention(list(shares[0]))
    for handle in handles:
        handle.remove()
    attention(list(shares[0]))
    (call,) = seen
    queries, keys = whole[0].transpose(1, 2), whole[1].transpose(1, 2)
    assert call.queries.equal(queries) and call.keys.equal(keys)
    assert call.scaling == 0.5 and queries.shape == (2, 4, 5, 6)


def test_sequences_that_vllm_packs_attend_to_themselves() -> None:
    torch.manual_seed(0)
    states, seen = torch.randn(3, 1, 7, 4, 6), []
    reader = reader_of(attention := Split(True))
    recorder = SimpleNamespace(attend=lambda block, call: seen.append(call))
    reader.lengths = [4, 3]
    (handle,) = reader.install(lambda: recorder, 0)
    attention(list(states))
    handle.remove()
    assert [call.queries.shape[2] for call in seen] == [4, 3]
    assert seen[1].keys.equal(states[1].transpose(1, 2)[:, :, 4:])
    maps = (states[0, 0, 4:].transpose(0, 1) @ states[1, 0, 4:].permute(1, 2, 0) * 0.5).softmax(-1)
    torch.testing.assert_close(seen[1].received()[0], maps.mean(dim=(0, 1)))
