# SPDX-License-Identifier: Apache-2.0
"""Code of other packages, methods and tasks, is a part of the cells that it answers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module, metadata
from types import SimpleNamespace

import pytest
from sweep_tools import config, journals, sweep

from vlmprune import lazytable, registry
from vlmprune.errors import EvaluationError
from vlmprune.evaluation.leaderboard import files, identity, work
from vlmprune.evaluation.leaderboard.plan import Setting
from vlmprune.evaluation.leaderboard.run import Settings, planned
from vlmprune.evaluation.leaderboard.rundir import cell_id
from vlmprune.evaluation.tasks import registry as tasks
from vlmprune.evaluation.tasks.lmms.task import LmmsTask

METHOD = """
from vlmprune import Method, register
from {helper} import strength


@register("{name}")
class Fresh(Method):
    needs = ("features",)

    def score(self, tokens):
        return tokens.features.norm(dim=-1) * strength()
"""
HELPER = "def strength():\n    return 1\n"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Leave registry and imports as they were."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.startswith(("plug_", "task_")):
            del sys.modules[name]
    registry._TABLE.refresh()
    tasks._TABLE.refresh()


# --- plug-ins -------------------------------------------------------------------------------------


def offer(monkeypatch, group, name, value):
    """Make one entry point the only installed one."""
    point = metadata.EntryPoint(name, value, group)

    def entry_points(*, group):
        return [point] if group == point.group else []

    monkeypatch.setattr(lazytable, "metadata", SimpleNamespace(entry_points=entry_points))
    registry._TABLE.refresh()
    tasks._TABLE.refresh()


def modules(tmp_path, monkeypatch, kind):
    """A plug-in as a module with one beside it, or as a package; its name and the file of its helper."""
    monkeypatch.syspath_prepend(tmp_path)
    if kind == "module":
        (tmp_path / "plug_fresh.py").write_text(METHOD.format(name="fresh", helper="plug_helper"))
        (tmp_path / "plug_helper.py").write_text(HELPER)
        return "plug_fresh", tmp_path / "plug_helper.py"
    package = tmp_path / "plug_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "fresh.py").write_text(METHOD.format(name="fresh", helper="plug_package.helper"))
    (package / "helper.py").write_text(HELPER)
    return "plug_package.inner.fresh", package / "helper.py"


def cell(small_model, spec="fresh@9"):
    (setting,) = planned(config(small_model, specs=[spec]), Settings())
    return cell_id(identity.recipe(setting, spec))


@pytest.mark.parametrize("how", ["entry point", "by hand"])
@pytest.mark.parametrize("kind", ["module", "package"])
def test_code_of_a_plugin_is_a_part_of_its_cell(small_model, tmp_path, monkeypatch, kind, how):
    name, helper = modules(tmp_path, monkeypatch, kind)
    if how == "entry point":
        offer(monkeypatch, registry.GROUP, "fresh", f"{name}:Fresh")
    else:
        import_module(name)
    before, dense = cell(small_model), cell(small_model, "dense")
    helper.write_text(HELPER.replace("1", "2"))  # not the file of the class: what that calls
    assert cell(small_model) != before and cell(small_model, "dense") == dense
    helper.write_text(HELPER)
    assert cell(small_model) == before
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    assert cell(small_model) == before


def test_answers_of_a_changed_plugin_are_not_taken_for_new_ones(small_model, tmp_path, monkeypatch):
    name, helper = modules(tmp_path, monkeypatch, "module")
    import_module(name)
    for text in (HELPER, HELPER.replace("1", "-1"), HELPER):
        helper.write_text(text)
        sweep(small_model, tmp_path / "run", specs=["fresh@9"], limit=4)
    cells = [json.loads(path.read_text()) for path in (tmp_path / "run" / "cells").glob("*.json")]
    fresh = [recipe["plugins"] for recipe in cells if recipe["spec"] == "fresh@9"]
    assert len(fresh) == 2 and fresh[0] != fresh[1] and all(list(one) == ["fresh"] for one in fresh)
    assert len([recipe for recipe in cells if recipe["spec"] == "dense"]) == 1


BASE = """
from vlmprune import Method

class Base(Method):
    def score(self, tokens):
        return tokens
"""
DERIVED = """
from plug_base import Base
from vlmprune import register

@register("fresh")
class Fresh(Base):
    pass
"""


def test_a_base_class_elsewhere_counts_too(small_model, tmp_path, monkeypatch):
    base = tmp_path / "base" / "plug_base.py"
    base.parent.mkdir()
    base.write_text(BASE)
    (tmp_path / "plug_derived.py").write_text(DERIVED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(base.parent)
    import_module("plug_derived")
    before = cell(small_model)
    base.write_text(BASE + "# changed\n")
    assert cell(small_model) != before


def test_a_method_without_a_source_file_is_refused(small_model):
    made = type("Typed", (registry.get("random"),), {"__module__": "nowhere"})
    registry.register("typed")(made)
    with pytest.raises(EvaluationError, match=r"method 'typed' has no source file.*put it in a module"):
        planned(config(small_model, specs=["typed@9"]), Settings())


def test_modules_among_installed_packages_do_not_count_their_neighbours(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "fresh.py").write_text("import mine_helper, torch\n")
    for name in ("mine_helper", "torch"):
        (site / f"{name}.py").write_text("")
    owners = {"fresh": ["fresh-dist"], "mine_helper": ["fresh-dist"], "torch": ["torch"]}
    monkeypatch.setattr(files, "metadata", SimpleNamespace(packages_distributions=lambda: owners))
    root, found = files.source_files(site / "fresh.py")
    assert root == site and [file.name for file in found] == ["fresh.py", "mine_helper.py"]


@pytest.mark.parametrize("where", ["method", "task"])
def test_a_worker_with_other_code_of_a_plugin_does_not_answer(small_model, tmp_path, monkeypatch, where):
    name, _ = modules(tmp_path, monkeypatch, "module")
    import_module(name)
    (setting,) = planned(config(small_model, specs=["fresh@9"]), Settings())
    if where == "task":
        with pytest.raises(
            EvaluationError, match=r"task_code is '' here and 'other' where the run was started"
        ):
            work.Bench(replace(setting, task_code="other"))
        return
    bench = work.Bench(replace(setting, plugins=(("absent", "x"), ("fresh", "other"))))
    found = {one.spec: one for one in bench.work(work.Job(0, ("fresh@9", "absent@9", "uniform@9")))}
    assert (
        "the code of method 'fresh' is" in found["fresh@9"].error
        and "'other' where the run" in found["fresh@9"].error
    )
    assert "'absent' is unknown" in found["absent@9"].error
    assert isinstance(found["uniform@9"], work.Lines)


RAISING = """
from vlmprune import Method, register

@register("fresh")
class Fresh(Method):
    slot = "inside_lm"
    needs = ("text_attention",)

    def cuts(self, depth, budget, count):
        raise ZeroDivisionError

    def score(self, tokens):
        return tokens
"""


def test_a_plugin_that_raises_when_it_is_attached_fails_alone(small_model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plug_raising.py").write_text(RAISING)
    import_module("plug_raising")
    found = sweep(small_model, tmp_path / "run", specs=["fresh@9", "uniform@9"], limit=4)
    (lost,) = found["failed"]
    assert lost["spec"] == "fresh@9" and "ZeroDivisionError" in lost["error"]
    assert {"dense", "uniform@9"} <= set(journals(tmp_path / "run"))


# --- tasks ----------------------------------------------------------------------------------------

TASK = """
from dataclasses import replace
from vlmprune.evaluation.tasks.shapes import shapes

class Task(type(shapes())):
    name = "task_fresh"

    def score(self, sample, answer):
        return {score}

def make():
    return Task()
"""


def test_code_of_a_task_out_of_tree_is_a_part_of_its_cells(small_model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    offer(monkeypatch, tasks.GROUP, "fresh", "task_fresh:make")
    found = set()
    for score in ("0.0", "1.0"):
        (tmp_path / "task_fresh.py").write_text(TASK.format(score=score))
        sys.modules.pop("task_fresh", None)
        setting: Setting = planned(config(small_model, tasks=["fresh"]), Settings())[0]
        assert setting.task_code and setting.task_fingerprint == tasks.get_task("shapes").fingerprint
        found.add(cell_id(identity.recipe(setting, "dense")))
    assert len(found) == 2
    assert planned(config(small_model), Settings())[0].task_code == ""


def test_functions_of_a_task_file_of_lmms_eval_count(tmp_path):
    pytest.importorskip("lmms_eval")
    spec = tmp_path / "utils.py"
    found = set()
    for text in (
        "def process_results(doc, results):\n    return 0\n",
        "def process_results(doc, results):\n    return 1\n",
    ):
        spec.write_text(text)
        module = SimpleNamespace()
        exec(
            compile(text, str(spec), "exec"),
            module.__dict__ | {"__name__": "utils"},
            made := {"__name__": "utils"},
        )
        lists = {
            "process_results": made["process_results"],
            "metric_list": [{"aggregation": sum}],
            "task": "x",
        }
        task = object.__new__(LmmsTask)
        task.lmms = SimpleNamespace(config=SimpleNamespace(**lists))
        found.add(identity.task_code("lmms:x", task))
    assert len(found) == 2 and "" not in found


@pytest.mark.parametrize("raised", ["RuntimeError('boom')", "SystemExit(3)"])
def test_a_task_that_cannot_be_loaded_is_one_error(tmp_path, monkeypatch, raised):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "task_raising.py").write_text(f"raise {raised}\n")
    offer(monkeypatch, tasks.GROUP, "fresh", "task_raising:make")
    with pytest.raises(
        EvaluationError, match=r"task 'fresh': its entry point 'task_raising:make' does not load: \w+: "
    ):
        tasks.get_task("fresh")
    (tmp_path / "task_raising.py").write_text(f"def make():\n    raise {raised}\n")
    with pytest.raises(EvaluationError, match=r"task 'fresh': .* makes no task: \w+: "):
        tasks.get_task("fresh")
