# SPDX-License-Identifier: Apache-2.0
"""What every family can do, as it was measured and shipped; ``vlmprune.testing.capabilities`` measures it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

ASSET = "capabilities.json"


def table() -> dict[str, Any]:
    """The whole of it, families by name. Imports neither torch nor transformers."""
    return json.loads((files("vlmprune") / "assets" / ASSET).read_text(encoding="utf-8"))
