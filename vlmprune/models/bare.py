# SPDX-License-Identifier: Apache-2.0
"""Bare vision towers: what a method needs of a ViT of timm, without any language model behind it.

CLIP, DINOv2 (registers are no patches) and SigLIP, whose attention pooling stands in for [CLS]. Fused
attention stays on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import OF_TOWER, Method, needs, needs_of
from ..errors import CaptureError, SpecError, UnsupportedError
from ..hooks.vision.capture import VisionCapture, row_attention
from .base import check_pixels

_GIVEN = {*OF_TOWER, "features"}


def is_tower(model: Any) -> bool:
    """Whether this is a ViT of timm."""
    parts = ("forward_features", "patch_embed", "blocks", "num_prefix_tokens")
    return isinstance(model, nn.Module) and all(hasattr(model, part) for part in parts)


def tower_tensors(tower: Any, inputs: Any, method: Method) -> tuple[dict[str, Any], tuple[int, int]]:
    """The tensors that ``method`` needs, as ``vlmprune.select`` takes them, and the (rows, cols) of patches.

    Args:
        tower: a ViT of timm.
        inputs: pixels (B, 3, H, W), or a mapping with ``pixel_values``.
        method: attention is read at its ``layer``, by default in the last block.
    """
    if not is_tower(tower):
        raise UnsupportedError(
            f"expected a ViT of timm, such as timm.create_model('vit_base_patch16_224'), got {type(tower)}"
        )
    wanted = needs_of(method)
    missing = sorted({need.what for need in wanted} - _GIVEN)
    if missing:
        raise UnsupportedError(
            f"{method.name} needs {missing}, which a bare tower lacks; use e.g. 'fastervlm', or a whole model"
        )
    pixels = inputs.get("pixel_values") if isinstance(inputs, Mapping) else inputs
    if pixels is None:
        raise SpecError("no pixels were given; expected a tensor (images, channels, height, width)")
    check_pixels("pixels", pixels, 4, "(images, channels, height, width)")
    pooled = needs(method, "cls_attention") and pooling_of(tower) is not None and not _has_cls(tower)
    watched = [need for need in wanted if not (pooled and need.what == "cls_attention")]
    capture = VisionCapture(tower, watched, [-1])
    _check_attention(capture)
    with torch.no_grad(), capture as record:
        hidden = tower.forward_features(pixels)  # (B, prefix + N, C)
    found: dict[str, Any] = {"of_layers": {}}
    for need, value in record.take().items():
        found.setdefault(need.what, value)
        if need.layer is not None:
            found["of_layers"][need] = value
    first = tower.num_prefix_tokens
    if pooled:
        found["cls_attention"] = pooling_attention(tower, hidden)
    found["features"] = hidden[:, first:]
    rows, cols = (
        side // patch for side, patch in zip(pixels.shape[-2:], tower.patch_embed.patch_size, strict=True)
    )
    if rows * cols != found["features"].shape[1]:
        count = found["features"].shape[1]
        raise CaptureError(
            f"{count} patches do not form {rows} rows of {cols}; give pixels of the size that the tower takes"
        )
    return found, (rows, cols)


def _has_cls(tower: Any) -> bool:
    return getattr(tower, "cls_token", None) is not None


def _check_attention(capture: VisionCapture) -> None:
    for _, reader in capture.readers:  # others turn queries and keys, add biases, or attend in windows
        attention = getattr(reader, "attention", reader)  # a reader of another host has none
        if type(attention).__name__ != "Attention":
            raise UnsupportedError(
                f"attention of a {type(attention).__name__} cannot be read; use a ViT with plain "
                "attention, or a method that needs none, e.g. 'divprune'"
            )


def pooling_of(tower: Any) -> nn.Module | None:
    """The attention pooling of a tower, None where it pools otherwise."""
    pool = getattr(tower, "attn_pool", None)
    return pool if hasattr(pool, "latent") and hasattr(pool, "kv") else None


@torch.no_grad()
def pooling_attention(tower: Any, hidden: Tensor) -> Tensor:
    """(B, H, N) softmaxed attention of the pooling query to the patches of ``hidden`` (B, prefix + N, C)."""
    pool, first = tower.attn_pool, tower.num_prefix_tokens
    drop = first if tower.pool_include_prefix else 0  # pooled as well, but no patches
    tokens = hidden[:, first - drop :]
    if pool.pos_embed is not None:
        tokens = tokens + pool.pos_embed.to(tokens.dtype)
    heads = pool.num_heads
    query = pool.q_norm(pool.q(pool.latent[:, :1]).unflatten(-1, (heads, -1)))  # (1, 1, H, d)
    # keys are the first half, values the second
    keys = pool.k_norm(pool.kv(tokens).chunk(2, dim=-1)[0].unflatten(-1, (heads, -1)))
    rows = row_attention(query[:, 0].flatten(1).expand(len(tokens), -1), keys.flatten(2), heads, pool.scale)
    return rows[..., drop:]
