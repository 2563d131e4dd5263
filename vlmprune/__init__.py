# SPDX-License-Identifier: Apache-2.0
"""vlmprune, a toolkit: prune visual tokens inside unmodified Hugging Face vision-language models.

Names are loaded on first use, so that importing the package costs nothing and needs neither transformers nor Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "prune": "api",
    "attach": "api",
    "score": "api",
    "select": "api",
    "parse": "spec",
    "Spec": "spec",
    "Budget": "spec",
    "register": "registry",
    "list_methods": "registry",
    "method_info": "registry",
    "Method": "core.base",
    "Merged": "core.base",
    "VisualTokens": "core.tokens",
    "KeepMap": "core.keepmap",
    "ScoreMap": "core.keepmap",
    "Report": "core.report",
    "VlmPruneError": "errors",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from .api import attach, prune, score, select
    from .core.base import Merged, Method
    from .core.keepmap import KeepMap, ScoreMap
    from .core.report import Report
    from .core.tokens import VisualTokens
    from .errors import VlmPruneError
    from .registry import list_methods, method_info, register
    from .spec import Budget, Spec, parse


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(sorted(_HOME))}")


def __dir__() -> list[str]:
    return __all__
