# SPDX-License-Identifier: Apache-2.0
"""Methods by name: built-ins, classes registered by hand, entry points; each loaded when asked for."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from .checks import one_of
from .core.method import NEEDS, SLOTS, VERBS, Counts, Layout, Method, Need, Positions
from .errors import SpecError, did_you_mean, reason
from .lazytable import LazyTable

GROUP = "vlmprune.methods"

_BUILTIN = {
    "dense": "vlmprune.methods.baselines:Dense",
    "blind": "vlmprune.methods.baselines:Blind",
    "random": "vlmprune.methods.baselines:Random",
    "uniform": "vlmprune.methods.baselines:Uniform",
    "pool": "vlmprune.methods.baselines:Pool",
    "downsample": "vlmprune.methods.baselines:Downsample",
    "fastervlm": "vlmprune.methods.fastervlm:FasterVLM",
    "visionselector": "vlmprune.methods.visionselector:VisionSelector",
    "visionzip": "vlmprune.methods.visionzip:VisionZip",
    "divprune": "vlmprune.methods.divprune:DivPrune",
    "cdpruner": "vlmprune.methods.cdpruner:CDPruner",
    "scope": "vlmprune.methods.scope:SCOPE",
    "mmtok": "vlmprune.methods.mmtok:MMTok",
    "mmr": "vlmprune.methods.mmr:MMR",
    "fastv": "vlmprune.methods.fastv:FastV",
    "pyramiddrop": "vlmprune.methods.pyramiddrop:PyramidDrop",
    "sparsevlm": "vlmprune.methods.sparsevlm:SparseVLM",
    "debias": "vlmprune.methods.debias:Debias",
    "var": "vlmprune.methods.var:VAR",
    "act": "vlmprune.methods.act:ACT",
    "paint": "vlmprune.methods.paint:PAINT",
    "carve": "vlmprune.methods.carve:CARVE",
    "vhr": "vlmprune.methods.vhr:VHR",
    "holov": "vlmprune.methods.holov:HoloV",
    "zooprune": "vlmprune.methods.zooprune:ZOOPrune",
    "hiprune": "vlmprune.methods.hiprune:HiPrune",
    "prumerge": "vlmprune.methods.prumerge:PruMerge",
    "vispruner": "vlmprune.methods.vispruner:VisPruner",
    "flashvlm": "vlmprune.methods.flashvlm:FlashVLM",
    "gprune": "vlmprune.methods.gprune:GPrune",
    "textmonkey": "vlmprune.methods.textmonkey:TextMonkey",
    "dart": "vlmprune.methods.dart:DART",
    "fitprune": "vlmprune.methods.fitprune:FitPrune",
    "adaptinfer": "vlmprune.methods.adaptinfer:AdaptInfer",
    "vscan": "vlmprune.methods.vscan:VScan",
    "dyvte": "vlmprune.methods.dyvte:DyVTE",
    "rcp": "vlmprune.methods.rcp:RCP",
    "flowcut": "vlmprune.methods.flowcut:FlowCut",
    "tome": "vlmprune.methods.tome:ToMe",
    "evs": "vlmprune.methods.evs:EVS",
    "vidcom2": "vlmprune.methods.vidcom2:VidCom2",
    "fastvid": "vlmprune.methods.fastvid:FastVID",
    "holitom": "vlmprune.methods.holitom:HoliTom",
    "dycoke": "vlmprune.methods.dycoke:DyCoke",
    "dycoke_decode": "vlmprune.methods.dycoke:DyCokeDecode",
    "prunevid": "vlmprune.methods.prunevid:PruneVid",
    "prunevid_inside": "vlmprune.methods.prunevid:PruneVidInside",
    "holitom_inner": "vlmprune.methods.holitom.inner:HoliTomInner",
}
_TABLE: LazyTable[type[Method]] = LazyTable("method", _BUILTIN, SpecError, group=GROUP)
_METHODS: dict[str, type[Method]] = {}  # registered: by hand, or because their module was imported

M = TypeVar("M", bound=type[Method])


class Option(NamedTuple):
    """One option of a method; ``default`` is ``dataclasses.MISSING`` where the option must be given."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True, repr=False)
class MethodInfo:
    """What is known of a method without a model.

    ``needs`` is that of the default options where it depends on them, and empty where an option has no
    default (wrappers need what their inner method needs). ``kind`` is empty where a schedule says enough.
    """

    name: str
    slot: str
    needs: tuple[str, ...]
    query_aware: bool
    calibrated: bool
    nested: bool
    kind: str
    positions: str
    budgeted: bool
    options: tuple[Option, ...]
    paper: str
    licence: str
    doc: str
    counts: str
    clips: bool

    def __repr__(self) -> str:
        options = ", ".join(option.name for option in self.options) or "none"
        return (
            f"MethodInfo({self.name!r}, {self.slot}, needs {', '.join(self.needs) or 'nothing'}, options: "
            f"{options})"
        )

    def _repr_html_(self) -> str:
        from .viz.notebook import facts

        rows: dict[str, object] = {"what it does": self.doc.partition("\n\n")[0], "slot": self.slot}
        rows |= {"needs": ", ".join(self.needs) or "nothing", "paper": self.paper or "none"}
        rows |= {f"option {option.name}": f"{option.type}: {option.help or '-'}" for option in self.options}
        return facts(self.name, rows)


def register(name: str) -> Callable[[M], M]:
    """Class decorator that makes a method known by name; what is no dataclass becomes a frozen one."""
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise SpecError(
            f"method name {name!r} is not usable in a spec; expected lower case like 'my_method': "
            "@register('my_method')"
        )

    def decorate(cls: M) -> M:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise SpecError(f"@register({name!r}) got {cls!r}; expected a subclass of vlmprune.Method")
        # vars, since a child of a dataclass inherits this without being one
        if "__dataclass_params__" not in vars(cls):
            dataclass(frozen=True)(cls)  # in place
        _check_class(name, cls)
        _check_free(name, cls)
        cls.name = name
        _METHODS[name] = cls
        return cls

    return decorate


def _check_class(name: str, cls: type[Method]) -> None:
    # an annotated attribute of Method would be an option of every spec
    hidden = sorted({field.name for field in fields(cls)} & set(Method.__annotations__))
    if hidden:
        raise SpecError(
            f"method {name!r} annotates {hidden}, which makes options of them; expected plain class "
            "attributes"
        )
    if "stage" in vars(cls):
        raise SpecError(
            f"method {name!r} says stage={vars(cls)['stage']!r}; where a method acts is its `slot` now"
        )
    one_of("slot", cls.slot, SLOTS)
    one_of("positions", cls.positions, get_args(Positions))
    one_of("layout", cls.layout, get_args(Layout))
    one_of("counts", cls.counts, get_args(Counts))
    if cls.slot == "before_lm" and cls.counts != "budget" and cls.own is Method.own:
        raise SpecError(f"method {name!r} says counts={cls.counts!r} but does not override own; override it")
    if cls.slot != "inside_lm":  # there a schedule alone may say enough
        cls.kind()
    if cls.wraps and "inner" not in {field.name for field in fields(cls)}:
        raise SpecError(f"method {name!r} wraps another one but has no field for it; add `inner: Method`")
    # the property itself, where the needs depend on options
    needs = inspect.getattr_static(cls, "needs")
    if isinstance(needs, property):
        return
    if not isinstance(needs, tuple):
        raise SpecError(
            f"needs={needs!r} of method {name!r} is a {type(needs).__name__}; expected a tuple of names, as "
            "in ('features',)"
        )
    for need in needs:
        if not isinstance(need, Need):
            one_of("needs", need, NEEDS)


def _check_free(name: str, cls: type[Method]) -> None:
    target = f"{cls.__module__}:{cls.__qualname__}"
    holder = _METHODS.get(name)
    # a built-in has its name from the start, before its module is imported
    taken = f"{holder.__module__}:{holder.__qualname__}" if holder else _BUILTIN.get(name, target)
    # the same path again is a notebook cell or a module run twice: the newer class replaces the older
    if taken != target:
        raise SpecError(
            f"method name {name!r} is taken by {taken}, so {target} cannot have it; choose another name"
        )
    # cls.name can say one name only
    others = [other for other, known in _METHODS.items() if known is cls and other != name]
    if others:
        raise SpecError(
            f"{target} is registered as {others[0]!r} already, so it cannot be {name!r} too; subclass it for "
            "a second name"
        )


def unregister(name: str) -> None:
    """Forget a registered method; a built-in or an entry point comes back when asked for."""
    if name not in _METHODS:
        raise SpecError(
            f"method {name!r} is not registered; expected one of "
            f"{sorted(_METHODS)}.{did_you_mean(name, _METHODS)}"
        )
    del _METHODS[name]


def list_methods() -> list[str]:
    """Sorted names of all methods; loads none of them."""
    return sorted({*_TABLE.names(), *_METHODS})


def attachable_methods() -> list[str]:
    """Sorted names of the methods that act inside a model: all but those that change the picture before, or
    ask the model again.
    """
    return [name for name in list_methods() if get(name).slot not in ("picture", "answer")]


def refused_plugins() -> list[str]:
    """Why entry points of other packages are not used: names that are taken, lists that cannot be read."""
    return list(_TABLE.offers.refused)


def get(name: str) -> type[Method]:
    """The class of a method; imports its module on first use."""
    if isinstance(name, str) and name in _METHODS:
        return _METHODS[name]
    known = list_methods()
    if name not in known:
        # known is a list, so a name that cannot be hashed comes as far as this
        if isinstance(name, str) and name in _TABLE.offers.clashes:
            raise SpecError(_TABLE.offers.clashes[name])
        # one near name says enough; all of them would fill the screen
        near = did_you_mean(str(name).lower(), known) or f" Known are {', '.join(known)}."
        raise SpecError(f"method {name!r} is unknown.{near} See `vlmprune list`, or vlmprune.list_methods()")
    _load(name)
    return _METHODS[name]


def _load(name: str) -> None:
    before = set(_METHODS)
    # a module registers its methods while it is imported, and may have more than this one
    try:
        found = _TABLE.load(name)
    except SpecError:
        for left in _METHODS.keys() - before:  # of a module that failed half-way
            del _METHODS[left]
        raise
    if name not in _METHODS and getattr(found, "name", None) == name:
        register(name)(found)  # its module was imported before, and the name unregistered since
    if name not in _METHODS:
        raise SpecError(
            f"{_TABLE.origin(name)!r} was loaded for method {name!r} but registers no such name; decorate "
            f"its class with @register({name!r})"
        )


def option_fields(cls: type[Method]) -> tuple[Field[Any], ...]:
    """The dataclass fields that a spec may set: all but the inner method of a wrapper."""
    return tuple(field for field in fields(cls) if field.init and not (cls.wraps and field.name == "inner"))


@lru_cache  # resolving them takes a third of the time of attaching a method
def option_types(cls: type[Method]) -> Mapping[str, Any]:
    """The annotations of a method, resolved."""
    try:
        return get_type_hints(cls)
    except NameError as error:
        raise SpecError(
            f"the annotations of {cls.__qualname__} cannot be resolved: {error}; import that name at run time"
        ) from error


def fits(value: object, hint: Any) -> bool:
    """Whether a literal may stand for an annotation; what cannot be compared is left to the method."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)  # Literal[1] takes no True
    if hint is float:
        # a whole number will do, True will not
        return type(value) in (int, float)
    if hint in (bool, int, str, type(None)):
        return type(value) is hint
    if (origin or hint) in (tuple, list, Sequence):
        if not isinstance(value, tuple):
            return False  # the only kind of sequence in a spec
        # tuple[int, float]: each item has a type of its own
        if origin is tuple and inner[-1:] != (...,):
            return len(value) == len(inner) and all(map(fits, value, inner))
        return not inner or all(fits(item, inner[0]) for item in value)
    return True


def summary(name: str) -> str:
    """What a method does, in one line."""
    return (inspect.getdoc(get(name)) or "").partition("\n")[0]


def method_info(name: str) -> MethodInfo:
    """Describe a method."""
    cls = get(name)
    try:
        return _described(name, cls)
    except SpecError:
        raise
    except Exception as error:  # properties of a plug-in are code of others
        raise SpecError(f"method {name!r} cannot be described: {reason(error)}; repair it") from error


def _described(name: str, cls: type[Method]) -> MethodInfo:
    needs: Any = cls.needs
    # needs depend on options: those of the defaults, where all options have one
    if isinstance(needs, property):
        required = [
            field
            for field in fields(cls)
            if field.init and field.default is MISSING and field.default_factory is MISSING
        ]
        needs = () if required else cls().needs
    verbs = (*VERBS[cls.slot], "own")
    overrides_verb = any(getattr(cls, verb) is not getattr(Method, verb) for verb in verbs)
    doc = inspect.getdoc(cls) or ""
    return MethodInfo(
        name=name,
        slot=cls.slot,
        needs=tuple(str(need) for need in needs),
        query_aware=cls.query_aware,
        calibrated=cls.calibrated,
        nested=cls.nested,
        # kind raises where no verb is overridden
        kind=cls.kind() if overrides_verb else "",
        positions=cls.positions,
        budgeted=cls.budgeted,
        options=tuple(_option(field, doc) for field in option_fields(cls)),
        paper=cls.paper,
        licence=cls.licence,
        doc=doc,
        counts=cls.counts,
        clips=cls.clips,
    )


def _option(field: Field[Any], doc: str) -> Option:
    kind = field.type
    # text where the module has `from __future__ import annotations`, else the annotation itself
    if not isinstance(kind, str):
        kind = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    # its entry under "Args:", with the lines that are indented further
    entry = re.search(rf"^( +){field.name}: *(.+(?:\n\1 +.+)*)", doc, re.MULTILINE)
    text = " ".join(entry[2].split()) if entry else ""
    return Option(field.name, kind, default, field.metadata.get("help", text))
