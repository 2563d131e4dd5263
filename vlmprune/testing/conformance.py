# SPDX-License-Identifier: Apache-2.0
"""Conformance: named checks of what every method must do on every family, on tiny random models.

``run_checks("fastervlm@9")`` runs them all; ``vlmprune verify`` prints them; authors of plug-ins call them
from a test. Each check raises AssertionError with what differed; UnsupportedError counts as "unsupported",
not as a failure.
"""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..api import prune, resolve
from ..core.report import Report
from ..errors import SpecError, UnsupportedError, VlmPruneError, did_you_mean
from ..hooks.sequence.cache import cache_name
from ..hooks.session import Session
from ..models import adapter_for
from ..registry import get, list_methods
from ..spec import Budget, parse
from .families import FAMILIES as KNOWN
from .processors import GRID
from .tiny import FAMILIES, LAYERS, tiny_inputs, tiny_model, tiny_row

RAGGED = (1, 2, 0, 1)  # images per row of the standard batch; methods for clips get a clip in every row
CLIP_FRAMES = 5  # of these clips: more than a group of four
# published options that need a real backbone, in a form that does something on a tiny random one, and options
# that have to be given
TINY_OPTIONS = {
    "var": "var(dims=[7,21,30],tau=1.2,max_sink_portion=0.9,min_visual_mass=0.0,first_layer=1)",
    "act": "act(threshold=0.05,first_layer=1)",
    "paint": "paint(first_layer=1)",
    "vscan": "vscan(shallow=1)",
    "dyvte": "dyvte(exit=1)",
    "holitom": "holitom(tau=0.0)",  # frames of noise: at the published threshold nothing stands still
}
# checks that speak of cuts and kept tokens
OF_CUTS = (
    "keep_all_is_dense",
    "cut_equals_hand_built",
    "order_and_report",
    "more_keeps_more",
    "highest_scores_are_kept",
    "every_mode_equals_kept_embeddings",
    "second_turn",
)


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check on one family: "pass", "fail" or "unsupported" (with what works instead)."""

    check: str
    family: str
    status: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class Subject:
    """What a check is about: a spec on a tiny model of one family."""

    spec: str
    family: str
    tower: str | None = None
    text: str | None = None

    @property
    def model(self) -> Any:
        return shared_model(self.family, self.tower, self.text)

    def fresh_model(self, **options: Any) -> Any:
        """A model of its own, for checks that change it."""
        return tiny_model(self.family, self.tower, self.text, **options)

    @property
    def clips(self) -> bool:
        """Whether the method reads clips, so that every row has one in place of its images."""
        return self.method.clips

    def inputs(self, images: Sequence[int] = (1,), **options: Any) -> dict[str, Tensor]:
        if self.clips and any(images):
            options |= {"video": True, "frames": CLIP_FRAMES}
            images = (0,) * len(images)
        return tiny_inputs(self.family, images=images, **options)

    def row(self, inputs: dict[str, Tensor], i: int, images: Sequence[int]) -> dict[str, Tensor]:
        """Row i of ``inputs(images)``, alone and without padding."""
        return tiny_row(inputs, self.family, i, (0,) * len(images) if self.clips else images)

    def pictures(self, images: Sequence[int]) -> list[int]:
        """Images or clips in every row of ``inputs(images)``."""
        return [1] * len(images) if self.clips and any(images) else list(images)

    def prune(self, model: Any = None, **options: Any) -> Session:
        return prune(self.model if model is None else model, self.spec, **options)

    @property
    def method(self) -> Any:
        return resolve(self.spec, need_keep=False)[0]

    @property
    def policies(self) -> tuple[str, ...]:
        """Position policies that the family knows."""
        return adapter_for(self.model).positions

    @property
    def budget(self) -> Budget | None:
        return resolve(self.spec, need_keep=False)[1]

    @property
    def inside(self) -> bool:
        """Whether the method cuts inside the language model."""
        return self.method.slot == "inside_lm"

    @property
    def keeps_nothing(self) -> bool:
        """Whether pictures may leave whole, with all that stands between their tokens."""
        return self.method.least(GRID * GRID) == 0

    @property
    def makes_rows(self) -> bool:
        """Whether the language model reads rows that a dense run does not have."""
        return self.method.kind() in ("merge", "shorten")

    def with_keep(self, keep: int | float, scope: str = "image") -> Subject:
        """The same method at another budget."""
        # inside the tower a budget is spent on each crop
        if self.method.slot == "encoder":
            scope = "crop"
        if not self.method.budgeted:
            raise UnsupportedError(f"{self.method.name} takes no budget")
        if self.inside:
            try:
                self.method.cuts(LAYERS, Budget(keep, scope), GRID * GRID)
            except SpecError as error:  # its options set a schedule that this budget does not fit
                raise UnsupportedError(str(error)) from error
        return Subject(
            str(parse(self.spec).with_keep(Budget(keep, scope))), self.family, self.tower, self.text
        )


@lru_cache(maxsize=16)
def shared_model(family: str, tower: str | None, text: str | None) -> Any:
    """Tiny models are shared between checks: every check must leave them as they were."""
    return tiny_model(family, tower, text)


def report_of(run: Session) -> Report:
    """The report of the last forward, which must be there."""
    report = run.last
    if report is None:
        raise AssertionError("no forward was reported")
    return report


def generate(model: Any, inputs: dict[str, Tensor], cache: Any = None, **options: Any) -> Tensor:
    """(B, new) new ids, greedy unless told otherwise, on a kept KV cache where one is given."""
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    if cache is not None:
        options[cache_name(inspect.signature(model.forward).parameters)] = cache
    with torch.no_grad():
        ids = model.generate(**inputs, **options)
    # given embeddings alone, generate returns the new ids only
    return ids[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else ids


def default_spec(method: str) -> str:
    """A bare method name gets a quarter of the tokens as its budget; half, or none, where its schedule cannot
    meet that, and half for clips, of which some methods keep whole frames.

    A bare wrapper is put around fastervlm.
    """
    if method in list_methods() and get(method).wraps:
        method = f"{method}+fastervlm"
    method = TINY_OPTIONS.get(method, method)
    built, budget, text = resolve(method, need_keep=False)
    if budget is not None or not built.budgeted:
        return text
    if built.clips:
        return f"{text}@0.5"
    if built.slot == "encoder":
        return f"{text}@0.25/crop"
    if built.slot != "inside_lm":
        return f"{text}@0.25"
    for keep in (0.25, 0.5):
        try:
            built.cuts(LAYERS, Budget(keep), GRID * GRID)
        except (SpecError, UnsupportedError):  # no such budget, or no weights
            continue
        return f"{text}@{keep}"
    return text


def all_checks() -> dict[str, Callable[[Subject], None]]:
    """Name -> check, in the order of the invariants that they hold."""
    # these import this module
    from . import checks_generation, checks_model, checks_sequence

    return {**checks_sequence.CHECKS, **checks_model.CHECKS, **checks_generation.CHECKS}


def checks_for(subject: Subject) -> dict[str, Callable[[Subject], None]]:
    """The checks that mean something for a method: those of cuts, or those of re-weighting in their place."""
    from . import checks_attention, checks_decode

    own = {"attention": checks_attention.CHECKS, "decode": checks_decode.CHECKS}
    if subject.method.slot not in own:
        return all_checks()
    return {
        **own[subject.method.slot],
        **{name: check for name, check in all_checks().items() if name not in OF_CUTS},
    }


def run_check(name: str, check: Callable[[Subject], None], subject: Subject) -> CheckResult:
    """Run one check and say how it ended."""
    started = time.perf_counter()
    try:
        check(subject)
        status, detail = "pass", ""
    except UnsupportedError as error:
        status, detail = "unsupported", str(error)
    # not LookupError itself, by which a capability says that it was not measured
    except (
        AssertionError,
        VlmPruneError,
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
    ) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]  # the innermost line
        status, detail = "fail", f"{type(error).__name__}: {error} ({where.name}:{where.lineno})"
    return CheckResult(name, subject.family, status, detail, time.perf_counter() - started)


def run_checks(
    spec: str, families: Sequence[str] | None = None, on_result: Callable[[CheckResult], None] | None = None
) -> list[CheckResult]:
    """Run every check of a spec on every family.

    Args:
        spec: a spec, or a bare method name (then a quarter of the tokens is kept).
        families: model types; default all.
        on_result: called after each check, for progress.
    """
    for family in families or ():
        if family not in KNOWN:
            raise SpecError(
                f"unknown family {family!r}; expected one of {list(KNOWN)}.{did_you_mean(family, KNOWN)}"
            )
    results = []
    for family in families or FAMILIES:
        subject = Subject(default_spec(spec), family)
        for name, check in checks_for(subject).items():
            results.append(run_check(name, check, subject))
            if on_result is not None:
                on_result(results[-1])
    return results


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError with a message; checks must not vanish under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def close(got: Tensor, want: Tensor, what: str, tolerance: float = 2e-5) -> None:
    """Logits agree up to a tolerance relative to their size."""
    expect(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    # small logits are compared as they are
    scale = max(1.0, float(want.abs().max()))
    worst = float((got.float() - want.float()).abs().max()) / scale
    expect(
        worst <= tolerance,
        f"{what}: differs by {worst:.2e} (relative to {scale:.1f}), allowed {tolerance:.0e}",
    )
