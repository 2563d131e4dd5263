# SPDX-License-Identifier: Apache-2.0
"""Bare ViTs of timm: what is read equals the attention map computed the slow way, with fused attention on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlmprune
from vlmprune.errors import CaptureError, SpecError, UnsupportedError

timm = pytest.importorskip("timm", exc_type=ImportError)

SIZE, PATCH, N = 56, 14, 16
TOWERS = {
    "CLIP": {"pre_norm": True, "class_token": True},
    "DINOv2": {"class_token": True, "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
    "DINOv2 with head norms": {"class_token": True, "reg_tokens": 4, "qk_norm": True},
    "SigLIP": {"class_token": False, "global_pool": "map"},
}


def tower(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=SIZE, patch_size=PATCH, embed_dim=32, depth=3, num_heads=4, num_classes=0, **TOWERS[kind]
        )
        for module in model.modules():  # peaked attention, or every patch would count the same
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.4)
    return model.eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def slow_map(model: Any, block: int) -> Tensor:
    """(B, H, S, S) attention of a block, from the input that it was given."""
    attention, seen = model.blocks[block].attn, []
    assert attention.fused_attn
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.forward_features(pixels())
    hook.remove()
    q, k, _ = attention.qkv(seen[0]).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    return (attention.q_norm(q) @ attention.k_norm(k).transpose(-1, -2) / 8**0.5).softmax(-1)


@torch.no_grad()
def slow_pooling(model: Any) -> Tensor:
    """(B, H, N) attention of the pooling query."""
    pool, hidden = model.attn_pool, model.forward_features(pixels())
    query = pool.q_norm(pool.q(pool.latent).view(1, 1, 4, 8).transpose(1, 2))
    keys = pool.k_norm(pool.kv(hidden).view(2, N, 2, 4, 8)[:, :, 0].transpose(1, 2))
    return (query @ keys.transpose(-1, -2) / 8**0.5).softmax(-1)[:, :, 0]


@pytest.mark.parametrize("layer", [None, -2, 1])
@pytest.mark.parametrize("kind", TOWERS)
def test_received_attention_is_that_of_the_slow_map(kind: str, layer: int | None) -> None:
    model, block = tower(kind), {None: 2, -2: 1, 1: 0}[layer]
    maps = vlmprune.score(model, pixels(), f"fastervlm(cls=mean{'' if layer is None else f',layer={layer}'})")
    want = slow_map(model, block).mean(dim=(1, 2))[:, model.num_prefix_tokens :]
    torch.testing.assert_close(torch.stack([one.scores for one in maps]), want, atol=1e-6, rtol=1e-4)
    assert [one.grids for one in maps] == [((4, 4),)] * 2


@pytest.mark.parametrize("kind", TOWERS)
def test_cls_attention_is_the_row_of_the_slow_map_or_that_of_the_pooling(kind: str) -> None:
    model = tower(kind)
    want = slow_pooling(model) if kind == "SigLIP" else slow_map(model, 2)[:, :, 0, model.num_prefix_tokens :]
    found = torch.stack(
        [one.scores for one in vlmprune.score(model, {"pixel_values": pixels()}, "fastervlm")]
    )
    torch.testing.assert_close(found, want.mean(dim=1), atol=1e-6, rtol=1e-4)
    keep = vlmprune.select("fastervlm", keep=5, tower=model, pixels=pixels())
    assert torch.equal(keep, vlmprune.select("fastervlm", keep=5, cls_attention=want))


@pytest.mark.parametrize("spec", ["divprune", "holov", "holov(cls=mean)", "random", "uniform"])
def test_methods_choose_patches_of_a_bare_tower(spec: str) -> None:
    model = tower("DINOv2")
    keep = vlmprune.select(spec, keep=6, tower=model, pixels=pixels())
    assert keep.shape == (2, 6) and bool((keep.diff(dim=1) > 0).all()) and int(keep.max()) < N
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_a_bare_tower_cannot_give_is_refused() -> None:
    model = tower("SigLIP")
    with pytest.raises(UnsupportedError, match="'fastervlm'"):
        vlmprune.select("zooprune", keep=3, tower=model, pixels=pixels())
    model.attn_pool = None
    with pytest.raises(UnsupportedError, match="cls='mean'"):
        vlmprune.score(model, pixels(), "fastervlm")
    with pytest.raises(SpecError, match="give a tower"):
        vlmprune.select("divprune", keep=3, tower=model, pixels=pixels(), features=torch.ones(1, 2, 3))
    with pytest.raises(CaptureError, match="expected"):
        vlmprune.score(model, pixels()[0], "fastervlm(cls=mean)")
    with pytest.raises(UnsupportedError, match="ViT of timm"):
        vlmprune.select("divprune", keep=3, tower=nn.Linear(2, 2), pixels=pixels())
