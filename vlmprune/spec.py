# SPDX-License-Identifier: Apache-2.0
"""Budget and Spec: what to run, as one line of text that parses, prints and compares.

The grammar is ``part ('+' part)*`` with ``part = name[(option=value, ...)][@keep[/scope]]``, for example
``holov(crops=16)@64/image`` or ``debias+fastv(layer=2)@0.25``. Options are literals; a plain word needs no
quotes.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, TypeAlias

from .core.budget import LARGEST, Budget, Printed
from .core.combine import check_scope
from .core.method import Method
from .errors import SpecError, did_you_mean
from .registry import fits, get, option_fields, option_types, summary

Value: TypeAlias = "int | float | bool | str | tuple[Value, ...] | None"

GRAMMAR = "name[(option=value, ...)][@keep[/scope]], joined by '+'"
# "fastv(layer=2)@0.25" -> fastv, layer=2, 0.25; without brackets or "@" these are None
_PART = re.compile(r"\s*([^\s(@]+)\s*(?:\((.*)\)\s*)?(?:@([^()]*))?\s*", re.DOTALL)
_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL)  # quoted text, or one character
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}
# other names for a budget; most mean the share to drop in one code base and the share to keep in another
_BUDGET_WORDS = re.compile(
    "keep(_ratio)?|budget|tokens|visual_token_num|retain(ed_tokens|_ratio)?|retention_ratio|ratio|rate|"
    "drop(_ratio)?|prune_ra(te|tio)|reduction_ratio|sparsity"
)


@dataclass(frozen=True, eq=False, repr=False)
class Part(Printed):
    """One method of a spec; ``args``, which may be a mapping, is held as (option, value) pairs in order."""

    name: str
    args: tuple[tuple[str, Value], ...] = ()
    budget: Budget | None = None

    def __post_init__(self) -> None:
        try:
            given = self.args.items() if isinstance(self.args, Mapping) else self.args
            pairs = tuple((str.strip(key), value) for key, value in given)  # strip refuses what is no text
        except (TypeError, ValueError) as error:
            raise SpecError(
                f"args={self.args!r} of method {self.name!r}; expected a mapping from names to values"
            ) from error
        if self.budget is not None:
            object.__setattr__(self, "budget", Budget.of(self.budget))
        # a dict keeps the last of equal names
        if len(dict(pairs)) < len(pairs):
            raise SpecError(
                f"method {self.name!r} got an option twice: {[key for key, _ in pairs]}; give each option "
                "once"
            )
        # sorted, so that specs that mean the same print and compare the same
        object.__setattr__(self, "args", tuple(sorted((key, _plain(key, value)) for key, value in pairs)))

    def __str__(self) -> str:
        args = ",".join(f"{key}={_show(value)}" for key, value in self.args)
        return self.name + (f"({args})" if args else "") + (f"@{self.budget}" if self.budget else "")

    def build(self, **inner: Method) -> Method:
        """The method with its options; ``inner`` is the wrapped method of a wrapper."""
        cls = get(self.name)
        known = {option.name: option for option in option_fields(cls)}
        # mypy takes the __hash__ of its objects for that of the class
        hints = option_types(cls)  # type: ignore[arg-type]
        for key, value in self.args:
            if key not in known:
                raise SpecError(_unknown_option(self.name, key, value, list(known)))
            if not fits(value, hints[key]):
                given = f"{key}={_show(value)} of method {self.name!r}"
                raise SpecError(f"option {given} is a {type(value).__name__}; expected {known[key].type}")
        required = [
            key
            for key, option in known.items()
            if option.default is MISSING and option.default_factory is MISSING
        ]
        missing = [key for key in required if key not in dict(self.args)]
        if missing:
            raise SpecError(
                f"method {self.name!r} has no default for {missing}; write {self.name}({missing[0]}=...)"
            )
        return cls(**inner, **dict(self.args))


@dataclass(frozen=True)
class Plan:
    """A method ready to run, with its budget if it has one."""

    method: Method
    budget: Budget | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Spec(Printed):
    """Methods that act together, in the order written; ``str`` prints the canonical text."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, (tuple, list)) or not all(
            isinstance(part, Part) for part in self.parts
        ):
            raise SpecError(f"parts={self.parts!r}; expected a tuple of Part; text is read by parse(...)")
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise SpecError(f"a spec without methods; expected {GRAMMAR}; write 'dense' for no pruning")

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))

    @property
    def prunes(self) -> bool:
        """Whether tokens are removed: by a budget that is not all tokens, or by a method's own count."""
        methods = [(part, get(part.name)) for part in self.parts]
        acting = [part for part, cls in methods if (cls.budgeted or cls.counts == "own") and not cls.wraps]
        # by what is printed: 1 == 1.0 in Python, but @1 is one token and @1.0 is all
        return any(part.budget is None or str(part.budget.keep) != "1.0" for part in acting)

    @property
    def merges(self) -> bool:
        """Whether tokens that do not stay are merged into those that do."""
        methods = [plan.method for plan in self.build()]
        return any(method.kind() == "merge" and getattr(method, "recycles", True) for method in methods)

    def _repr_html_(self) -> str:
        from .viz.notebook import facts

        return facts(str(self), {str(part): summary(part.name) for part in self.parts})

    def with_keep(self, keep: int | float | str | Budget) -> Spec:
        """A copy with this budget for the last part that takes one; without a scope, the old scope stays."""
        # from the right, as the budget of "debias+fastv@64" stands there
        for i in reversed(range(len(self.parts))):
            part, cls = self.parts[i], get(self.parts[i].name)
            if cls.budgeted and not cls.wraps:
                budget = Budget.of(keep, part.budget.scope if part.budget else "image")
                return replace(
                    self, parts=(*self.parts[:i], replace(part, budget=budget), *self.parts[i + 1 :])
                )
        raise SpecError(
            f"keep={keep} was given for {str(self)!r}, where no method takes a budget; leave it out"
        )

    def build(self, require_budget: bool = False) -> tuple[Plan, ...]:
        """One plan per method, wrappers around the part to their right."""
        plans: list[Plan] = []
        # from the right: a wrapper finds what it wraps built already
        for part in reversed(self.parts):
            cls = get(part.name)
            if cls.wraps:
                if not plans or part.budget:
                    why = "wraps the method to its right and has no budget of its own"
                    raise SpecError(
                        f"{str(part)!r} in {str(self)!r} {why}; write it as in {part.name}+fastervlm@64"
                    )
                wrapped = plans.pop()
                plans.append(Plan(part.build(inner=wrapped.method), wrapped.budget))
                continue
            method = part.build()  # its options may say who counts
            if part.budget and not method.budgeted:
                why = ", because the picture decides how many tokens stay" if method.counts == "own" else ""
                raise SpecError(
                    f"{str(part)!r} has a budget, but method {part.name!r} takes none{why}; drop "
                    f"'@{part.budget}'"
                )
            # inside the language model a schedule of its own may stand in for a budget
            counts_by_budget = method.budgeted and method.counts == "budget" and cls.slot != "inside_lm"
            if require_budget and counts_by_budget and not part.budget:
                raise SpecError(
                    f"{str(part)!r} has no budget; expected tokens or a fraction to keep: {part}@64 or "
                    f"{part}@0.25"
                )
            check_scope(method, part.budget)
            plans.append(Plan(method, part.budget))
        # plans are in reverse order up to here
        _check_alone(self, plans)
        return tuple(reversed(plans))


def _check_alone(spec: Spec, plans: list[Plan]) -> None:
    """Refuse a smaller picture together with pruning: a share would be one of another number of tokens."""
    for plan in plans:
        if plan.method.slot == "picture" and len(plans) > 1:
            raise SpecError(
                f"{plan.method.name} changes the picture, so budgets of the others in {str(spec)!r} would "
                f"count other tokens; write it alone, as in '{plan.method.name}@64'"
            )


def parse(text: str | Spec) -> Spec:
    """Read a spec and check it, options included; a Spec is returned as it is."""
    if isinstance(text, Spec):
        return text
    if not isinstance(text, str):
        raise SpecError(f"a spec is text, got {text!r} of type {type(text).__name__}; expected {GRAMMAR}")
    spec = unbuilt(text)
    # only to check the options: the methods are built again where they run
    spec.build()
    return spec


def unbuilt(text: str) -> Spec:
    """A spec whose options are not checked: to check them, a method may open the file that one names."""
    return Spec(tuple(map(_parse_part, split(text))))


def split(text: str, at: str = "+") -> list[str]:
    """Cut at each ``at`` outside of brackets and quotes: ``"random(seed=1)@9,pool@9"`` has one ","."""
    depth, pieces = 0, [""]
    for token in _TOKEN.findall(text):
        depth += (token == "(") - (token == ")")
        if depth < 0:  # one too many closed: refused below
            break
        if token == at and not depth:
            pieces.append("")
        else:
            pieces[-1] += token
    if depth:
        raise SpecError(f"spec {text!r} has unbalanced parentheses; expected {GRAMMAR}")
    return pieces


@lru_cache(maxsize=256)  # a part is immutable, and the same few texts are read at every attachment
def _parse_part(text: str) -> Part:
    match = _PART.fullmatch(text)
    if not match:
        raise SpecError(f"cannot read {text.strip()!r} as part of a spec; expected {GRAMMAR}")
    name, args, keep = match.groups()
    # "name@" has the keep "", which Budget refuses; without "@" it is None
    return Part(name, _parse_args(name, args or ""), None if keep is None else Budget.of(keep))


def _parse_args(name: str, text: str) -> tuple[tuple[str, Value], ...]:
    problem = f"cannot read the options ({text}) of method {name!r}; expected option=value, ..."
    try:
        # read as a call in Python and never run: every value must be a literal
        call = ast.parse(f"f({text})", mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise SpecError(f"{problem}: {error}") from error
    # the text may close our parenthesis and go on: only one plain call is an argument list
    if (
        not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name))
        # neither f(1) nor f(**more)
        or call.args
        or any(k.arg is None for k in call.keywords)
    ):
        raise SpecError(problem)
    return tuple((str(k.arg), _literal(k.value, problem)) for k in call.keywords)


def _literal(node: ast.expr, problem: str) -> Value:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=word):
            return _WORDS.get(word, word)
        # -2 is an operator and a number to Python; -True would be -1
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if (
            not isinstance(value, bool)
        ):
            return -value
        case ast.Tuple(elts=nodes) | ast.List(elts=nodes):  # as tuples, since lists cannot be hashed
            return tuple(_literal(item, problem) for item in nodes)
    raise SpecError(f"{problem}, each value a number, a word, a tuple, or text in quotes such as 'a-b'")


def _plain(key: str, value: Any) -> Value:
    # before numbers: True is an int to Python
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # also of a subclass, such as NumPy's text
        return str(value)
    # NumPy's numbers become Python's, which print as they are typed
    if isinstance(value, Integral) and abs(int(value)) <= LARGEST:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and math.isfinite(value):
        return float(value)
    if isinstance(value, (list, tuple)):
        return tuple(_plain(key, item) for item in value)
    raise SpecError(
        f"option {key!r} got a {type(value).__name__}; expected finite 64-bit numbers, bool, None, str, or "
        "tuples of them"
    )


def _show(value: Value) -> str:
    if isinstance(value, str):
        # quoted is what would be read back as something else
        bare = (
            re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", value)
            and not keyword.iskeyword(value)
            and value not in _WORDS
        )
        return value if bare else repr(value)
    if isinstance(value, tuple):
        # (1) would be read back as 1
        return f"({','.join(map(_show, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _unknown_option(name: str, key: str, value: Value, known: list[str]) -> str:
    # the names that other code bases have for a budget get advice of their own
    if not _BUDGET_WORDS.fullmatch(key.lower()):
        return (
            f"method {name!r} has no option {key!r}; its options are "
            f"{known or 'none'}.{did_you_mean(key, known)}"
        )
    both = ""
    if isinstance(value, float) and 0 < value < 1:
        both = (
            f". If {value} is the share to drop, write {name}@{round(1 - value, 12)}; if it is the share to "
            f"keep, {name}@{value}"
        )
    return (
        f"{key}={_show(value)} in method {name!r}: write the budget, what to KEEP, after '@', not as an "
        f"option, as in {name}@64 (tokens) or {name}@0.25 (fraction); a share to drop must be "
        f"converted, keep = 1 - drop{both}"
    )
