# SPDX-License-Identifier: Apache-2.0
"""The trained small models of the package, checked against their lists of hashes before they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import VlmPruneError

ASSETS = Path(__file__).parents[1] / "assets"
FOLDER = ASSETS / "tiny"
# by the name that is asked for; the benchmarks that they were trained on are "shapes", "scenes" and "clips"
BUNDLED = {"tiny": FOLDER, "natural": ASSETS / "natural", "video": ASSETS / "video"}
SUMS = "SHA256SUMS"


def load_tiny(device: str = "cpu", dtype: Any = None, folder: Path = FOLDER) -> tuple[Any, Any]:
    """``(model, processor)`` in eval mode: LLaVA classes of transformers, trained on what this package draws.

    Args:
        device: where the model goes. dtype: of the parameters, float32 by default. folder: of the files, one
            of ``BUNDLED``.
    """
    verify(folder)
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    with no_bars():  # it is read in a moment
        model: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype or torch.float32, use_safetensors=True
        )
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def verify(folder: Path = FOLDER) -> dict[str, str]:
    """Compare every file with its recorded SHA-256, and return the hashes by name."""
    sums = folder / SUMS
    if not sums.is_file():
        raise VlmPruneError(
            f"the model in {folder} lacks {SUMS}; expected the files of the package: install it again"
        )
    # two spaces, as sha256sum writes them
    lines = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8").splitlines() if line]
    expected = {name: digest for digest, name in lines}
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise VlmPruneError(
                f"the model in {folder} lacks {name!r}; expected all of {SUMS}; install the package again"
            )
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != digest:
            raise VlmPruneError(
                f"{path} is damaged: its SHA-256 is {found[:16]}..., expected {digest[:16]}...; install the "
                "package again"
            )
    return expected


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars of transformers, one for every model that is loaded."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
