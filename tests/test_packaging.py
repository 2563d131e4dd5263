# SPDX-License-Identifier: Apache-2.0
"""What is shipped and what is not: the wheel, the import, the files, and the rules of style that a machine
can check.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import vlmprune

ROOT = Path(__file__).parents[1]
COMPANIONS = ("kernels", "methods", "benchmarks")  # evidence beside the package, never importable
LIBRARY = sorted((ROOT / "vlmprune").rglob("*.py"))
HEAVY = (
    "torch",
    "transformers",
    "triton",
    "matplotlib",
    "lmms_eval",
    "ray",
    "timm",
    "jinja2",
    "numpy",
    "typer",
)
MAX_FILE, MAX_FUNCTION, MAX_WIDTH = 400, 60, 110

# spelt so that this file does not match
MACHINE_TRACES = re.compile(
    r"(?<![\w.}\])])/(?:work|tmp|root|opt|home|Users)/|inde[x]-url|find-link[s]|trusted-hos[t]|pythonhoste[d]|artifactor[y]|devp[i]"
)


def relative(path):
    return str(path.relative_to(ROOT))


def tracked_files():
    """Files that git knows or would add."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout and git to tell which files belong to the repository")
    # a checkout owned by another user is as good
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for path in map(ROOT.joinpath, listed.split("\0")[:-1]) if path.is_file()]


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, where no older build can leak in."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("vlmprune", "tests", "docs", "configs", *COMPANIONS):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """Names in a wheel built from the copy."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl"))).namelist()


def test_the_wheel_installs_one_name(wheel):
    info = f"vlmprune-{vlmprune.__version__}.dist-info"
    assert {name.split("/")[0] for name in wheel} == {"vlmprune", info}


def test_the_wheel_holds_every_file_of_the_package_and_the_licence(wheel):
    files = {
        relative(path)
        for path in (ROOT / "vlmprune").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel if name.startswith("vlmprune/")} == files
    assert "vlmprune/py.typed" in files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory):
    """The folders that an editable install of the copy puts on the path."""
    out = tmp_path_factory.mktemp("editable")
    code = "import sys; from hatchling.build import build_editable; print(build_editable(sys.argv[1]))"
    for _ in range(2):  # it is installed again and again
        done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    archive = zipfile.ZipFile(next(out.glob("*.whl")))
    lines = [archive.read(name).decode().splitlines() for name in archive.namelist() if name.endswith(".pth")]
    return [line for of_file in lines for line in of_file if line]


def test_an_editable_install_is_a_path_that_type_checkers_follow(editable, source):
    (line,) = editable
    assert Path(line).is_absolute() and not line.startswith("import")  # no hook, which they would not run
    assert [path.name for path in Path(line).iterdir()] == ["vlmprune"]
    assert (Path(line) / "vlmprune").samefile(source / "vlmprune")


def test_an_sdist_made_after_an_editable_install_holds_the_package(editable, source):
    from hatchling.builders.sdist import SdistBuilder

    assert (source / ".editable" / "vlmprune").exists()
    listed = {Path(one.relative_path) for one in SdistBuilder(str(source)).recurse_included_files()}
    package = {path.relative_to(source) for path in (source / "vlmprune").rglob("*.py")}
    assert package <= listed and not [path for path in listed if path.parts[0] == ".editable"]


def test_an_editable_install_makes_nothing_else_importable(editable, tmp_path):
    names = ("vlmprune", *COMPANIONS, "tests", "docs")
    code = (
        f"import sys; sys.path[:0] = {editable}; from importlib.util import find_spec\n"
        f"print([find_spec(name) is not None for name in {names}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout.lower()) == [True] + [False] * (len(names) - 1)


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_companion_folder_is_no_package(name):
    assert list((ROOT / name).rglob("__init__.py")) == []


def test_a_console_script_does_not_put_the_root_on_the_path(tmp_path):
    # transformers 5.0 to 5.8 take a bare folder kernels/ on sys.path for the package of that name, and fail
    script = tmp_path / "command.py"
    script.write_text(
        "import importlib.util, json, sys\n"
        "found = importlib.util.find_spec('kernels')\n"
        "print(json.dumps([sys.path, list(found.submodule_search_locations or []) if found else []]))\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=env, check=True, capture_output=True, text=True
    )
    path, kernels = json.loads(done.stdout)
    assert str(ROOT) not in path and "" not in path
    assert str(ROOT / "kernels") not in kernels


SCRIPTS = sorted(
    path for path in (ROOT / "benchmarks").rglob("*.py") if "__main__" in path.read_text("utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_script_finds_its_neighbours_though_its_folder_is_left_off_the_path(script):
    text = script.read_text("utf-8")
    beside = {path.stem for path in script.parent.glob("*.py")}
    imported = {node.module for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)}
    imported |= {
        name.name for node in ast.parse(text).body if isinstance(node, ast.Import) for name in node.names
    }
    assert "PYTHONSAFEPATH" in text or not imported & beside


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == vlmprune.__version__
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == vlmprune.__version__


# --- the import -----------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    code = (
        "import sys, vlmprune; vlmprune.__version__; dir(vlmprune); print(sorted(set(sys.modules) & "
        f"set({HEAVY})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_type_checkers_and_python_see_the_same_names():
    """A checker runs no code: it believes a literal ``__all__``, and names that are imported ``as``
    themselves.
    """
    tree = ast.parse((ROOT / "vlmprune" / "__init__.py").read_text())
    lists = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    (block,) = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    exported = {
        alias.name: node.module for node in block.body for alias in node.names if alias.asname == alias.name
    }
    assert lists == [vlmprune.__all__] and vlmprune.__all__ == sorted(vlmprune.__all__)
    assert exported == vlmprune._HOME and {*exported, "__version__"} == set(vlmprune.__all__)
    # seen by a checker, it would make every misspelt name an Any
    assert "__getattr__" not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", vlmprune.__all__)
def test_a_public_name_resolves(name):
    assert getattr(vlmprune, name) is not None
    assert name in dir(vlmprune)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="public names"):
        vlmprune.no_such_name  # noqa: B018


def test_the_command_has_a_module():
    assert find_spec("vlmprune.cli") is not None


# --- the files ------------------------------------------------------------------------------------


def test_every_source_file_names_its_licence():
    sources = [
        path
        for folder in ("vlmprune", "tests", "docs", *COMPANIONS)
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    lines = {relative(path): path.read_text().partition("\n")[0] for path in sources if path.stat().st_size}
    assert [name for name, line in lines.items() if line != "# SPDX-License-Identifier: Apache-2.0"] == []


def test_no_file_names_a_machine():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # arrays and pictures
            continue
        found += [f"{relative(path)}: {match[0]}" for match in MACHINE_TRACES.finditer(text)]
    assert found == []


def test_nothing_is_to_be_installed_that_was_never_released():
    """There is no release, so an extra is installed from a clone: ``pip install -e ".[eval]"``."""
    wanted = re.compile(r"pip3? install (?:-\S+ )*[\"']?vlmprune\b(?!-)")
    files = [*LIBRARY, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    texts = {relative(path): path.read_text(encoding="utf-8") for path in files}
    assert [f"{name}: {found[0]}" for name, text in texts.items() for found in wanted.finditer(text)] == []


# --- what checks the code, and how people report ---------------------------------------------------


def test_the_workflow_runs_the_same_check_as_people_do():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_hooks_use_the_tools_that_the_test_extra_installs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]  # nothing is downloaded
    tools = [hook["entry"].split()[0] for hook in hooks["repos"][0]["hooks"]]
    extra = re.search(r"^test = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {"ruff", "mypy", "check-jsonschema"} == set(tools) and set(tools) <= set(
        ast.literal_eval(extra[1])
    )


@pytest.mark.parametrize("name", ["bug", "method"])
def test_a_template_asks_for_what_it_needs(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) >= 3
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_formatter_is_told_the_width_and_nowhere_switched_off():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\nline-length = {MAX_WIDTH}\n" in settings and re.search(r'select = \[.*"E"', settings)
    switch = re.compile(r"#\s*fmt:\s*(?:off|skip)")
    folders = ("vlmprune", "tests", "docs", *COMPANIONS)
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [relative(path) for path in sources if switch.search(path.read_text(encoding="utf-8"))] == []


# --- style, by syntax tree ------------------------------------------------------------------------


def violations(tree):
    """What library code must not do, as (line, what)."""
    for node in ast.walk(tree):
        match node:
            case ast.Assert():
                yield node.lineno, "bare assert"
            case ast.ExceptHandler(type=None | ast.Name(id="Exception" | "BaseException"), body=[ast.Pass()]):
                yield node.lineno, "swallowed exception"
            case ast.Call(
                func=ast.Name(id="suppress") | ast.Attribute(attr="suppress"), args=[ast.Name(id="Exception")]
            ):
                yield node.lineno, "swallowed exception"
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield node.lineno, name
            case ast.Import(names=names) if any(
                alias.name in ("pickle", "dill", "cloudpickle", "joblib") for alias in names
            ):
                yield node.lineno, "pickle"
            case ast.ImportFrom(module="pickle" | "dill" | "cloudpickle" | "joblib"):
                yield node.lineno, "pickle"
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                yield node.value.lineno, "trust_remote_code"
            case ast.keyword(arg="weights_only", value=ast.Constant(value=False)):
                yield node.value.lineno, "pickle"
            case ast.FunctionDef() | ast.AsyncFunctionDef() if node.end_lineno - node.lineno >= MAX_FUNCTION:
                yield node.lineno, f"{node.name} has more than {MAX_FUNCTION} lines"


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_a_library_file_keeps_the_rules(path):
    source = path.read_text()
    assert list(violations(ast.parse(source))) == []
    length = len(source.splitlines())
    assert length <= MAX_FILE


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("assert x", "bare assert"),
        ("try:\n    f()\nexcept:\n    pass", "swallowed exception"),
        ("try:\n    f()\nexcept Exception as error:\n    pass", "swallowed exception"),
        ("with suppress(Exception):\n    f()", "swallowed exception"),
        ("eval('1')", "eval"),
        ("import os, pickle", "pickle"),
        ("from pickle import load", "pickle"),
        ("torch.load(f, weights_only=False)", "pickle"),
        ("f(trust_remote_code=True)", "trust_remote_code"),
        ("def f():\n" + "    x\n" * MAX_FUNCTION, f"f has more than {MAX_FUNCTION} lines"),
    ],
)
def test_the_rules_catch_what_they_forbid(code, what):
    assert [found for _, found in violations(ast.parse(code))] == [what]


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "try:\n    f()\nexcept KeyError:\n    pass",
        "def f():\n" + "    x\n" * (MAX_FUNCTION - 1),
    ],
)
def test_the_rules_let_the_rest_pass(code):
    assert list(violations(ast.parse(code))) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/" + "tmp/x", True),
        ("see /" + "home/me", True),
        ("tests/tmp/x", False),
        ("--index" + "-url x", True),
    ],
)
def test_the_pattern_for_machines_finds_paths_and_registries(text, found):
    assert bool(MACHINE_TRACES.search(text)) is found
