# SPDX-License-Identifier: Apache-2.0
"""Layers that were published for one model, in a model of another depth."""

from __future__ import annotations

from collections.abc import Sequence


def scaled_layers(layers: Sequence[int], published_depth: int, depth: int) -> tuple[int, ...]:
    """``layers`` of a model of ``published_depth``, or the nearest ones as deep in one of ``depth``, no two
    the same.
    """
    found: list[int] = []
    for layer in layers:
        scaled = round(layer * depth / published_depth)
        # in a shallow model two layers may fall together: the later one moves on
        found.append(max(scaled, found[-1] + 1) if found else scaled)
    return tuple(found)
