# SPDX-License-Identifier: Apache-2.0
"""Command line options of the test suite, no network, and torchvision where its compiled part cannot be
loaded."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# read when transformers is imported: no test asks the hub, where what it finds may change
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="run the golden vectors under DIR/<method>/index.json instead of tests/golden/data; "
        "write --golden-dir=DIR where no test path is given, or pytest takes DIR for one",
    )


def _import_torchvision() -> None:
    """The wheels of torchvision are built for CUDA. Beside a CPU torch only its Python part loads, and that
    minds, though no test needs the two operators that it misses; declared, they may stay without a kernel."""
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _import_torchvision.kept = operators  # a library takes its operators along when it is collected
        import_module("torchvision")


if find_spec("torchvision") is not None:
    _import_torchvision()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With transformers before 5, leave out what speaks of newer ones, by name and with the reason."""
    if int(version("transformers").split(".")[0]) >= 5:
        return
    import older

    for item in items:
        why = older.reason(item.path.as_posix(), item.name)
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: no collection of garbage has to look at it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What stays frozen when Python ends looks like a leak to libraries that count their objects."""
    gc.unfreeze()
