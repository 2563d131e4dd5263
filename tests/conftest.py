# SPDX-License-Identifier: Apache-2.0
"""Command line options of the test suite."""

from __future__ import annotations

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="run the golden vectors under DIR/<method>/index.json instead of tests/golden/data; "
        "write --golden-dir=DIR where no test path is given, or pytest takes DIR for one",
    )
