# SPDX-License-Identifier: Apache-2.0
"""What ``lmms_eval.models`` calls on every import of lmms-eval: names only, nothing that can fail."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """The models that this package adds to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    home = f"{__package__}.model"
    return [
        ModelManifest(
            "vlmprune", simple_class_path=f"{home}.VlmPruneSimple", chat_class_path=f"{home}.VlmPrune"
        )
    ]
