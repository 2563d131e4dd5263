# SPDX-License-Identifier: Apache-2.0
"""Method: the one interface that all pruning methods share.

A method is a frozen dataclass whose fields are its options. It says what it ``needs``, and overrides exactly one of

* ``score(tokens) -> (B, N)``: higher is kept (ranking methods),
* ``select(tokens, k) -> keep_idx (B, k)``: for methods that choose a set,
* ``merge(tokens, k) -> Merged``: for methods that also change features.

It never sorts, gathers, masks, counts budgets or sees a model: the core does that, once, for all methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import SpecError, UnsupportedError, did_you_mean
from .tokens import VisualTokens

NEEDS = (
    "text_attention",
    "cls_attention",
    "received_attention",
    "features",
    "encoder_features",
    "keys",
    "cls_features",
    "projector",
)
STAGES = ("before_lm", "inside_lm", "attention")


@dataclass(frozen=True, eq=False)
class Merged:
    """What a merging method returns.

    Args:
        features: (B, K, D) rows for the language model, in the order it shall read them.
        slots: (B, K) int64, the token whose place each row takes; -1 for a row without a place of its own ([CLS]).
        context: (K,) bool, rows that stand for many tokens and are listed after the others where tiles are interleaved.
    """

    features: Tensor
    slots: Tensor
    context: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """One cut inside the language model.

    Args:
        layer: the cut is made at the input of this decoder layer (0-based).
        keep: tokens of the unit that go on.
        source: the layer whose attention rows rank the tokens: ``layer - 1`` or ``layer`` itself.
    """

    layer: int
    keep: int
    source: int


@dataclass(frozen=True)
class Method:
    """Base of all methods; subclasses are frozen dataclasses registered with ``@vlmprune.register(name)``."""

    name: ClassVar[str] = ""  # set by register
    stage: ClassVar[str] = "before_lm"
    query_aware: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    nested: ClassVar[bool] = True  # more budget never removes a token
    budgeted: ClassVar[bool] = True  # takes a keep budget
    positions: ClassVar[str] = "compact"  # position ids of the kept sequence: "compact" or "original"
    wraps: ClassVar[bool] = False  # takes another method as its field `inner`
    paper: ClassVar[str] = ""
    licence: ClassVar[str] = ""  # of the code that was read for facts, if any
    needs: ClassVar[tuple[str, ...]] = ()  # what to capture; a property where it depends on options
    layout: ClassVar[str] = "packed"  # "spatial": choose per raw tile, interleave, drop newlines (tiled images only)

    def __init_subclass__(cls) -> None:
        if not cls.__dict__.get("name"):
            cls.name = cls.__name__.lower()  # for messages, until register gives it a name for specs

    def score(self, tokens: VisualTokens) -> Tensor:
        """(B, N) float scores; higher is kept."""
        raise NotImplementedError

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        """(B, k) distinct token indices, any order."""
        raise NotImplementedError

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        """Rows that replace the tokens."""
        raise NotImplementedError

    def stages(self, depth: int, budget: Any, count: int) -> tuple[Stage, ...]:
        """Cuts inside a language model of ``depth`` layers for a unit of ``count`` tokens; for methods of stage inside_lm."""
        raise NotImplementedError

    def raters(self, text: Tensor, visual: Tensor) -> Tensor | None:
        """(T,) bool, which of the embeddings (T, D) after the picture (N, D) query it; None: the last token of the prompt."""
        return None

    def acts_on(self, depth: int) -> Sequence[int]:
        """Decoder layers that a method of stage attention edits."""
        raise NotImplementedError

    def prepare(self, language_model: Any) -> Method:
        """This method with what it needs to know of a backbone; asked once, when a method of stage attention is attached."""
        return self

    def mark(self, hidden: Tensor, language_model: Any) -> Tensor:
        """(B, n) bool, tokens of a prompt that enter a layer (B, n, D) and that the edit treats apart."""
        raise NotImplementedError

    def reweight(self, attention: Tensor, marked: Tensor, visual: Tensor) -> Tensor:
        """Edited attention (B, H, R, S) for marked and visual slots (B, S)."""
        raise NotImplementedError

    def check_unit(self, count: int) -> None:
        """Raise when this method cannot act on a unit of ``count`` tokens; asked even where everything is kept."""

    def check_model(self, config: Any) -> None:
        """Raise when this method is not meant for the model with this ``config``; asked before anything is attached to it."""

    @classmethod
    def kind(cls) -> str:
        """Which of ``score``, ``select``, ``merge`` this method overrides."""
        kinds = [verb for verb in ("score", "select", "merge") if getattr(cls, verb) is not getattr(Method, verb)]
        if not kinds:
            raise SpecError(f"method {cls.__name__} overrides none of score, select, merge; override exactly one")
        # a merging or set method may also score, for notebooks: the strongest verb decides how tokens are cut
        return kinds[-1]


# what a wrapper does as its inner method does
_AS_INNER = ("stage", "needs", "layout", "positions", "query_aware", "nested", "budgeted")
_VERBS_OF_INNER = ("kind", "stages", "raters", "check_unit")


def act_as(wrapper: Method, inner: Method, but: tuple[str, ...] = ()) -> None:
    """Let a wrapper declare what its inner method does: when it acts, on what, on which budget, and with which verb."""
    layer = ("layer",) if hasattr(inner, "layer") else ()  # of the tower, which is captured
    for name in {*_AS_INNER, *_VERBS_OF_INNER, *layer} - {*but}:
        object.__setattr__(wrapper, name, getattr(inner, name))


def by_stage(plans: Sequence[tuple[Method, Any]]) -> dict[str, tuple[Method, Any]]:
    """One method with its budget per slot."""
    slots: dict[str, tuple[Method, Any]] = {}
    for method, budget in plans:
        if method.stage in slots:
            raise UnsupportedError(
                f"{slots[method.stage][0].name} and {method.name} both act at stage {method.stage!r}; "
                "combine methods of different stages, such as 'var+fastervlm@128'"
            )
        slots[method.stage] = (method, budget)
    return slots


def one_of(option: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise unless an option of a method has one of the allowed values."""
    if value not in allowed:
        raise SpecError(
            f"{option}={value!r} is unknown; expected one of {list(allowed)}.{did_you_mean(str(value), map(str, allowed))}"
        )
