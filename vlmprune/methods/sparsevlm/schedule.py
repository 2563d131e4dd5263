# SPDX-License-Identifier: Apache-2.0
"""Which layers are cut, and how many patches leave them: published numbers and straight lines between."""

from __future__ import annotations

from itertools import pairwise

from ...errors import SpecError

PATCHES, DEPTH, LAYERS = 576, 32, (2, 6, 15)
# keep -> patches that leave the three layers, of 576; 36 is what layers 0 and 1 of 32 alone come to
_RECYCLED = {
    36: (0, 0, 0),
    64: (66, 30, 17),
    96: (238, 48, 26),
    128: (303, 110, 36),
    192: (300, 200, 110),
    576: (576, 576, 576),
}
_PLAIN = {
    36: (0, 0, 0),
    64: (66, 34, 20),
    96: (246, 54, 28),
    128: (238, 108, 60),
    192: (300, 200, 118),
    576: (576, 576, 576),
}


def published_rows(keep: float, recycled: bool) -> tuple[float, ...]:
    """Patches of 576 that leave the three layers for a mean of ``keep``."""
    table = _RECYCLED if recycled else _PLAIN
    points = list(table)
    if keep <= points[0]:
        raise SpecError(
            f"keep asks for {keep / PATCHES:.3f} of the tokens on average, but {points[0] / PATCHES} is what "
            "the layers before the first cut read; keep more"
        )
    low, high = next((a, b) for a, b in pairwise(points) if keep <= b)
    share = (keep - low) / (high - low)
    return tuple(a + share * (b - a) for a, b in zip(table[low], table[high], strict=True))
