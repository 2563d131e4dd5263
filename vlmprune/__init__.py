# SPDX-License-Identifier: Apache-2.0
"""vlmprune, a toolkit: prune visual tokens inside unmodified Hugging Face vision-language models.

Names are loaded on first use, so that importing the package costs nothing and needs neither transformers nor
Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Three lists of the same names, and a test that they agree: this one and the next are for type checkers,
# which run no code (`as` makes a name public there); the last one is for Python.
__all__ = [
    "Budget",
    "KeepMap",
    "Merged",
    "Method",
    "Reduced",
    "Report",
    "ScoreMap",
    "Spec",
    "VisualTokens",
    "VlmPruneError",
    "__version__",
    "attach",
    "detach",
    "encode",
    "example",
    "list_methods",
    "load",
    "method_info",
    "parse",
    "prune",
    "reduce",
    "refine",
    "register",
    "register_family",
    "score",
    "select",
]

if TYPE_CHECKING:
    from .api import attach as attach
    from .api import detach as detach
    from .api import prune as prune
    from .api import reduce as reduce
    from .api import score as score
    from .api import select as select
    from .core.keepmap import KeepMap as KeepMap
    from .core.keepmap import ScoreMap as ScoreMap
    from .core.method import Merged as Merged
    from .core.method import Method as Method
    from .core.reduce import Reduced as Reduced
    from .core.report import Report as Report
    from .core.tokens import VisualTokens as VisualTokens
    from .errors import VlmPruneError as VlmPruneError
    from .evaluation.tasks.shapes.example import example as example
    from .models import register_family as register_family
    from .models.loading import encode as encode
    from .models.loading import load as load
    from .registry import list_methods as list_methods
    from .registry import method_info as method_info
    from .registry import register as register
    from .second_look import refine as refine
    from .spec import Budget as Budget
    from .spec import Spec as Spec
    from .spec import parse as parse

_HOME = {
    "attach": "api",
    "detach": "api",
    "prune": "api",
    "reduce": "api",
    "score": "api",
    "select": "api",
    "Merged": "core.method",
    "Method": "core.method",
    "KeepMap": "core.keepmap",
    "ScoreMap": "core.keepmap",
    "Reduced": "core.reduce",
    "Report": "core.report",
    "VisualTokens": "core.tokens",
    "VlmPruneError": "errors",
    "encode": "models.loading",
    "load": "models.loading",
    "refine": "second_look",
    "list_methods": "registry",
    "method_info": "registry",
    "register": "registry",
    "register_family": "models",
    "Budget": "spec",
    "Spec": "spec",
    "parse": "spec",
    "example": "evaluation.tasks.shapes.example",
}

if not TYPE_CHECKING:  # a type checker that saw it would take any misspelt name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(import_module(f".{_HOME[name]}", __name__), name)
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(sorted(_HOME))}"
        )


def __dir__() -> list[str]:
    return __all__
