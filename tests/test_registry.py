# SPDX-License-Identifier: Apache-2.0
"""Registry: what a class must be to become a method, and where names come from."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, FrozenInstanceError, dataclass, field
from importlib import metadata
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vlmprune import lazytable, registry
from vlmprune.cli import app
from vlmprune.core.method import Method
from vlmprune.errors import SpecError
from vlmprune.registry import get, list_methods, method_info, refused_plugins, register, unregister
from vlmprune.spec import parse

BUILTIN = sorted(registry._BUILTIN)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the registry as it was, and hide what is installed on this machine."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    offer(monkeypatch)
    yield
    registry._TABLE.refresh()


def offer(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> list[str]:
    """Make these (name, value) pairs the installed entry points; the list grows at each discovery."""
    seen: list[str] = []

    def entry_points(*, group: str) -> list[metadata.EntryPoint]:
        seen.append(group)
        return [metadata.EntryPoint(name, value, group) for name, value in points]

    monkeypatch.setattr(lazytable, "metadata", SimpleNamespace(entry_points=entry_points))
    registry._TABLE.refresh()
    return seen


def toy(**body: object) -> type[Method]:
    return type("Toy", (Method,), {"score": lambda self, tokens: tokens, "__module__": __name__, **body})


def test_a_registered_class_is_a_frozen_dataclass_that_knows_its_name() -> None:
    cls = register("toy")(toy(__annotations__={"layer": "int"}, layer=3))
    assert cls is get("toy")
    assert cls.name == "toy"
    assert "toy" in list_methods()
    assert cls() == cls(layer=3) and hash(cls()) == hash(cls(3))
    with pytest.raises(FrozenInstanceError):
        cls().layer = 4


def test_an_explicit_dataclass_is_left_alone() -> None:
    @register("explicit")
    @dataclass(frozen=True, repr=False)
    class Explicit(Method):
        layer: int = 1

        def score(self, tokens):
            return tokens

    assert "Explicit(layer" not in repr(Explicit())


@pytest.mark.parametrize("name", ["", "Toy", "my-toy", "2toy", "_toy", "to y", "töy", "toy\n", 3, None])
def test_names_are_lower_case_identifiers(name: object) -> None:
    with pytest.raises(SpecError, match="lower case"):
        register(name)


@pytest.mark.parametrize("thing", [int, Method.score, 3])
def test_only_method_subclasses_register(thing: object) -> None:
    with pytest.raises(SpecError, match=r"subclass of vlmprune\.Method"):
        register("toy")(thing)


def test_a_method_overrides_a_verb_of_its_slot() -> None:
    with pytest.raises(SpecError, match="overrides none of score, select, merge"):
        register("toy")(type("Toy", (Method,), {}))
    with pytest.raises(SpecError, match="overrides none of reweight, relogit, head_scales"):
        register("toy")(type("Toy", (Method,), {"slot": "attention"}))
    register("toy")(type("Toy", (Method,), {"slot": "decode", "visible": lambda self, held, step: held}))
    assert method_info("toy").kind == "visible"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"slot": "before_llm"}, "Did you mean 'before_lm'"),
        ({"positions": "orignal"}, "Did you mean 'original'"),
        ({"layout": "pack"}, "Did you mean 'packed'"),
        ({"needs": ("feature",)}, "Did you mean 'features'"),
        ({"needs": "features"}, "expected a tuple"),
        ({"wraps": True}, "inner: Method"),
        ({"__annotations__": {"slot": "str"}, "slot": "before_lm"}, r"annotates \['slot'\]"),
    ],
)
def test_wrong_declarations_are_refused(body: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        register("toy")(toy(**body))
    assert "toy" not in list_methods()


def test_needs_may_depend_on_options() -> None:
    needs = property(lambda self: ("keys",) if self.deep else ("features",))
    register("toy")(toy(__annotations__={"deep": "bool"}, deep=True, needs=needs))
    assert method_info("toy").needs == ("keys",)


def test_a_cell_run_again_replaces_and_another_class_does_not() -> None:
    first = register("toy")(toy())
    second = register("toy")(toy())
    assert get("toy") is second is not first
    with pytest.raises(SpecError, match=r"is taken by .*:Toy"):
        register("toy")(toy(__qualname__="Other"))
    assert get("toy") is second


def test_one_class_has_one_name() -> None:
    cls = register("toy")(toy())
    with pytest.raises(SpecError, match="registered as 'toy' already"):
        register("toy2")(cls)
    assert cls.name == "toy"


def test_a_built_in_name_cannot_be_taken_even_before_it_is_loaded() -> None:
    registry._METHODS.pop("fastervlm", None)
    with pytest.raises(SpecError, match=r"taken by vlmprune\.methods\.fastervlm:FasterVLM"):
        register("fastervlm")(toy())


def test_unregister() -> None:
    register("toy")(toy())
    unregister("toy")
    assert "toy" not in list_methods()
    with pytest.raises(SpecError, match="not registered"):
        unregister("toy")


@pytest.mark.parametrize(
    ("name", "near"), [("fastervln", "fastervlm"), ("FasterVLM", "fastervlm"), ("rnadom", "random")]
)
def test_an_unknown_name_gets_the_nearest_one(name: str, near: str) -> None:
    with pytest.raises(SpecError, match=rf"{name}.*Did you mean '{near}'\? .*list_methods") as caught:
        get(name)
    assert len(str(caught.value)) < 120  # and not all names, which would fill the screen


def test_an_unknown_name_that_is_near_to_none_gets_all_of_them() -> None:
    with pytest.raises(SpecError, match=r"'xyzw' is unknown. Known are act, .*, zooprune. .*list_methods"):
        get("xyzw")


@pytest.mark.parametrize("name", BUILTIN)
def test_the_first_line_of_a_method_is_a_sentence(name: str) -> None:
    assert registry.summary(name).endswith(".")


@pytest.mark.parametrize("name", [None, 3, ["random"]])
def test_a_name_is_text(name: object) -> None:
    with pytest.raises(SpecError, match="unknown"):
        get(name)


def test_method_info_describes_without_a_model() -> None:
    register("toy")(toy(__doc__="Ranks nothing.", needs=("features",), paper="arXiv:0", nested=False))
    info = method_info("toy")
    assert (info.name, info.slot, info.kind, info.positions, info.paper) == (
        "toy",
        "before_lm",
        "score",
        "compact",
        "arXiv:0",
    )
    assert (info.query_aware, info.calibrated, info.nested, info.budgeted) == (False, False, False, True)
    assert (info.needs, info.options, info.doc) == (("features",), (), "Ranks nothing.")


def test_method_info_tells_type_default_and_help_of_each_option() -> None:
    @register("optional")
    class Optional(Method):
        """Has options.

        Args:
            layer: where to look,
                counted from zero.
            other: not this one.
        """

        scale: float
        layer: int = 2
        weights: tuple[float, ...] = field(default_factory=lambda: (1.0,), metadata={"help": "one per scale"})

        def select(self, tokens, k):
            return tokens

    assert method_info("optional").options == (
        ("scale", "float", MISSING, ""),
        ("layer", "int", 2, "where to look, counted from zero."),
        ("weights", "tuple[float, ...]", (1.0,), "one per scale"),
    )
    assert method_info("optional").kind == "select"


def test_the_inner_method_of_a_wrapper_is_no_option() -> None:
    annotations = {"inner": "Method", "strength": "float"}
    register("toy")(
        toy(
            wraps=True,
            __annotations__=annotations,
            strength=1.0,
            needs=property(lambda self: self.inner.needs),
        )
    )
    info = method_info("toy")
    assert [option.name for option in info.options] == ["strength"]
    assert info.needs == ()


def test_entry_points_are_discovered_once_and_loaded_on_demand(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    (tmp_path / "far_away.py").write_text(
        textwrap.dedent("""
        from vlmprune.core.method import Method
        from vlmprune.registry import register

        @register("far")
        class Far(Method):
            def score(self, tokens):
                return tokens
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "far_away", raising=False)
    seen = offer(monkeypatch, ("far", "far_away:Far"), ("far", "far_away:Far"))

    assert "far" in list_methods() and "far" in list_methods()
    assert "far_away" not in sys.modules
    assert get("far").__qualname__ == "Far"
    assert seen == ["vlmprune.methods"]

    unregister("far")
    assert get("far").name == "far", "an entry point comes back after unregister"


def test_an_entry_point_cannot_take_a_built_in_name_and_nobody_else_suffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, ("random", "impostor:Random"))
    assert get("random").__module__ == "vlmprune.methods.baselines" and list_methods() == BUILTIN
    assert str(parse("random@9+fastv@9")) == "random@9+fastv@9"
    (reason,) = refused_plugins()
    assert "'impostor:Random'" in reason and "takes the name of 'vlmprune.methods.baselines:Random'" in reason


def test_a_name_that_two_packages_offer_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ("fresh", "here:Fresh"), ("fresh", "there:Fresh"), ("other", "json:JSONDecoder"))
    assert set(list_methods()) == {*BUILTIN, "other"} and len(refused_plugins()) == 1
    with pytest.raises(SpecError, match=r"'there:Fresh'.*takes the name of 'here:Fresh'"):
        get("fresh")


def test_a_list_of_entry_points_that_cannot_be_read_costs_the_plugins_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def entry_points(*, group: str) -> None:
        raise TypeError("a line without '='")

    monkeypatch.setattr(lazytable, "metadata", SimpleNamespace(entry_points=entry_points))
    registry._TABLE.refresh()
    assert list_methods() == BUILTIN
    assert "cannot be read: TypeError: a line without '='" in refused_plugins()[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "no_such_module_anywhere:Fresh",
            "does not load: ModuleNotFoundError: No module named 'no_such_module_anywhere'",
        ),
        ("json:Fresh", "does not load: AttributeError"),
        ("json:JSONDecoder", r"decorate its class with @register\('fresh'\)"),
        ("no module at all", "does not load"),
    ],
)
def test_a_broken_entry_point_is_named_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    offer(monkeypatch, ("fresh", value))
    assert "fresh" in list_methods()
    with pytest.raises(SpecError, match=f"{value}.*{message}"):
        get("fresh")


RAISES = {
    "RuntimeError('boom\\nand more')": "RuntimeError: boom and more",
    "SystemExit(3)": "SystemExit: 3",
    "ZeroDivisionError()": "ZeroDivisionError;",
    "RecursionError('deep')": "RecursionError: deep",
}


@pytest.mark.parametrize("raised", RAISES)
def test_a_plugin_that_raises_at_import_is_named_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path, raised: str
) -> None:
    (tmp_path / "evil_module.py").write_text(
        "import vlmprune.core.method as base, vlmprune.registry as registry\n"
        "@registry.register('evil')\n"
        "class Evil(base.Method):\n"
        "    def score(self, tokens):\n"
        "        return tokens\n"
        f"raise {raised}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    offer(monkeypatch, ("evil", "evil_module:Evil"))
    for _ in range(2):  # the second time is no better: what the module registered before it failed is gone
        with pytest.raises(
            SpecError, match=f"'evil': its entry point 'evil_module:Evil' does not load: {RAISES[raised]}"
        ):
            parse("evil@9").build()
    assert get("random") and "evil" not in registry._METHODS


def test_the_list_names_what_it_skips_and_ends_well(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "exiting.py").write_text("raise SystemExit(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    offer(monkeypatch, ("evil", "exiting:Evil"), ("random", "impostor:Random"))
    result = CliRunner().invoke(app, ["list", "--json"])
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)] == BUILTIN
    skipped = [line for line in result.stderr.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 2 and "SystemExit: 7" in skipped[0] and "takes the name of" in skipped[1]


def test_a_plugin_may_be_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "slow_module.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    offer(monkeypatch, ("slow", "slow_module:Slow"))
    with pytest.raises(KeyboardInterrupt):
        get("slow")


def test_a_method_that_cannot_be_described_is_named() -> None:
    register("toy")(toy(needs=property(lambda self: 1 / 0)))
    with pytest.raises(SpecError, match="'toy' cannot be described: ZeroDivisionError: division by zero"):
        method_info("toy")


def test_listing_imports_no_method() -> None:
    code = f"""if True:
        import sys
        sys.path[:0] = {[folder for folder in sys.path if folder]!r}
        from vlmprune.registry import list_methods
        list_methods()
        print([name for name in sys.modules if name.startswith("vlmprune.methods.")])
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize("name", BUILTIN)
def test_built_ins_load_and_describe_themselves(name: str) -> None:
    assert name in list_methods()
    assert get(name).name == name
    assert method_info(name).doc


def test_a_built_in_comes_back_after_unregister() -> None:
    first = get("dense")
    unregister("dense")
    assert get("dense") is first
