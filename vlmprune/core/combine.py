# SPDX-License-Identifier: Apache-2.0
"""How methods combine: wrappers act as what they wrap, and a spec has one method per slot."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import SpecError, UnsupportedError
from .budget import Budget
from .method import Method, SlotName

# what a wrapper copies from its inner method
AS_INNER = (
    *("slot", "needs", "layout", "positions", "query_aware", "nested", "budgeted"),
    *("skips", "sliding", "clips", "gated", "repairs"),
)
VERBS_OF_INNER = (
    *("kind", "cuts", "raters", "check_unit", "least", "later"),
    *("leaves", "repairs_on", "repair_context", "repair"),
)


def act_as(wrapper: Method, inner: Method, but: tuple[str, ...] = ()) -> None:
    """Give a wrapper what its inner method declares: slot, needs, budget and verb."""
    if inner.counts != "budget":
        raise SpecError(
            f"{wrapper.name} changes what a budget is spent on, but {inner.name} may count by itself; wrap a "
            "method that takes a budget, such as 'fastervlm@64'"
        )
    for name in {*AS_INNER, *VERBS_OF_INNER} - {*but}:
        object.__setattr__(wrapper, name, getattr(inner, name))


def check_scope(method: Method, budget: Budget | None) -> None:
    """Raise where a budget is spent on another thing than the method can act on."""
    if method.clips and budget is not None and budget.scope != "image":
        what = "one frame at a time" if budget.scope == "crop" else "all clips of a prompt together"
        raise UnsupportedError(
            f"{method.name}@{budget} is spent on {what}, but {method.name} compares the frames of one clip; "
            f"use {method.name}@{budget.keep!r}, which is spent on each clip"
        )


def by_slot(plans: Sequence[tuple[Method, Budget | None]]) -> dict[SlotName, tuple[Method, Budget | None]]:
    """One method with its budget per slot; a method that goes on in a later slot is there too."""
    slots: dict[SlotName, tuple[Method, Budget | None]] = {}
    for method, budget in [one for plan in plans for one in (plan, *plan[0].later(plan[1]))]:
        if method.slot in slots:
            raise UnsupportedError(
                f"{slots[method.slot][0].name} and {method.name} both act in the slot {method.slot!r}; "
                "combine methods of different slots, such as 'var+fastervlm@128'"
            )
        slots[method.slot] = (method, budget)
    _refuse_lost_marks({name: method for name, (method, _) in slots.items()})
    if "attention" in slots and "decode" in slots:
        edits, hides = slots["attention"][0].name, slots["decode"][0].name
        raise UnsupportedError(
            f"{edits} changes the attention of decode steps, and {hides} hides tokens from it: each would "
            f"act as if the other did not; use one of the two, such as '{edits}+fastervlm@128'"
        )
    if "encoder" in slots and "before_lm" in slots:
        inside, behind = slots["encoder"][0].name, slots["before_lm"][0].name
        raise UnsupportedError(
            f"{inside} leaves patches out of the vision tower, and {behind} reads all of them behind it; "
            f"use one of the two, or cut further inside the language model, such as '{inside}@128+fastv@64'"
        )
    return slots


def _refuse_lost_marks(methods: dict[SlotName, Method]) -> None:
    """Refuse cuts behind which it cannot be said where a token that was marked in the tower stands."""
    reader = methods.get("attention")
    if reader is None or type(reader).mark_tokens is Method.mark_tokens:
        return
    for name in ("encoder", "before_lm", "inside_lm"):
        cut = methods.get(name)
        if cut is None or (cut.slot != "encoder" and cut.layout == "packed" and cut.kind() != "merge"):
            continue
        does = (
            "leaves patches out of the vision tower" if name == "encoder" else "makes rows of several tokens"
        )
        raise UnsupportedError(
            f"{cut.name} {does}, and {reader.name} marks single tokens there; use a method that keeps "
            f"tokens as they are, such as '{reader.name}+fastervlm@64'"
        )
