# SPDX-License-Identifier: Apache-2.0
"""The list of mutants follows the code, and whoever tries them tells what notices from what does not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent / "mutation"))
import mutant_runner
from mutant import BrokenMutant, Checks, Mutant, Pytest, patched, resolve
from mutant_runner import ROOT, START, Verdict, run, settled
from mutant_table import MUTANTS, named

from vlmprune.testing.conformance import all_checks, shared_model
from vlmprune.testing.tiny import FAMILIES

CHECK = Checks("random@9", "llava", "order_and_report")
TOP_K = named("inverted sort").target
forking = pytest.mark.skipif(
    START != "fork", reason="mutants made here cannot be looked up by a process that does not fork"
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_stands_in_the_place_of_its_target_and_leaves_nothing(mutant: Mutant) -> None:
    _, _, before = resolve(mutant.target)
    with patched(mutant):
        assert resolve(mutant.target)[2] is not before
    assert resolve(mutant.target)[2] is before


def test_names_are_distinct_and_judges_exist() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for judge in {mutant.by for mutant in MUTANTS}:
        if isinstance(judge, Pytest):
            file, _, test = judge.path.partition("::")
            assert (ROOT / file).exists() and test.partition("[")[0] in (
                (ROOT / file).read_text() if test else ""
            ), judge
        else:
            assert judge.family in FAMILIES and judge.only in ("", *all_checks()), judge


def test_whoever_imported_a_function_gets_the_mutant_too(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ModuleType("made_first"), ModuleType("made_second")
    first.add = lambda a, b: a + b
    second.plus = first.add
    first.LIMIT = second.LIMIT = second.OTHER = 2.5
    for module in (first, second):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with patched(Mutant("", "made_first:add", lambda add: lambda a, b: add(a, b) + 1, CHECK)) as watch:
        assert (first.add(1, 2), second.plus(1, 2), watch.calls) == (4, 4, 2)
    assert second.plus is first.add and first.add(1, 2) == 3
    with patched(Mutant("", "made_first:LIMIT", lambda limit: limit * 2, CHECK)):
        assert (first.LIMIT, second.LIMIT, second.OTHER) == (5.0, 2.5, 2.5), (
            "a plain value counts in its own package only"
        )


@pytest.mark.parametrize(
    "target", ["vlmprune.core.select:top_kk", "vlmprune.core.selekt:top_k", "vlmprune.api:nobody.top_k"]
)
def test_a_target_that_is_gone_is_named_with_what_to_do(target: str) -> None:
    with pytest.raises(BrokenMutant, match=r"is not there .* point mutant_targets\.py at where it is now"):
        resolve(target)


def test_a_change_must_change_something() -> None:
    for target in (TOP_K, "vlmprune.kernels.reference:RESIDUAL"):
        with (
            pytest.raises(BrokenMutant, match="gives back what was there"),
            patched(Mutant("", target, lambda value: value, CHECK)),
        ):
            pass


@pytest.fixture(scope="module")
def built() -> None:
    """The model that the check asks for, so that a fork finds it."""
    shared_model(CHECK.family, None, None)


def verdict_on(
    change: Callable[[Any], Any], timeout: float = 60.0, by: Checks = CHECK, target: str = TOP_K
) -> Verdict:
    """How a mutant of top_k ends."""
    ((_, verdict),) = run([Mutant("made here", target, change, by)], timeout)
    return verdict


def slowly(top_k: Callable[..., Any]) -> Callable[..., Any]:
    def changed(scores: Any, k: int) -> Any:
        time.sleep(600)

    return changed


@forking
@pytest.mark.usefixtures("built")
def test_the_runner_tells_verdicts_apart() -> None:
    killed = verdict_on(lambda top_k: lambda scores, k: top_k(scores, k)[:, 1:])
    assert killed.status == "killed" and killed.killer == CHECK and "tokens" in killed.detail
    assert verdict_on(lambda top_k: lambda scores, k: top_k(scores, k)).status == "survived"
    uncalled = verdict_on(
        lambda crop: lambda self, size: None, target="vlmprune.hooks.sequence.cache:CutCacheMixin.crop"
    )
    assert (uncalled.status, uncalled.detail) == ("survived", "the mutant was never called")
    crash = verdict_on(lambda top_k: lambda scores, k: os._exit(7))
    assert crash.status == "crash" and "ended with 7" in crash.detail
    broken = verdict_on(lambda top_k: lambda scores: top_k(scores, 1))
    assert broken.status == "broken" and "the mutant itself raised TypeError" in broken.detail
    assert verdict_on(lambda top_k: lambda scores, k: scores.no_such_name).status == "broken"
    assert (
        verdict_on(lambda top_k: lambda scores, k: None, by=replace(CHECK, only="no_such_check")).status
        == "broken"
    )


@forking
@pytest.mark.usefixtures("built")
def test_a_mutant_that_hangs_is_ended_and_the_list_goes_on() -> None:
    hanging = Mutant("hangs", TOP_K, slowly, CHECK)
    started = time.monotonic()
    quick = replace(named("inverted sort"), by=replace(CHECK, only="no_such_check"))
    found = list(run([hanging, quick], timeout=8.0, jobs=2))
    assert time.monotonic() - started < 60
    assert {mutant.name: verdict.status for mutant, verdict in found} == {
        "hangs": "timeout",
        quick.name: "broken",
    }


def test_what_fails_without_the_mutant_kills_nothing() -> None:
    killed = Verdict("killed", "differs", CHECK)
    assert settled(killed, CHECK, Verdict("survived", "1 check passed")) is killed
    for without in (
        Verdict("killed", "fails anyway", CHECK),
        Verdict("survived", "", unsupported=("order_and_report",)),
    ):
        assert settled(killed, CHECK, without).status == "broken"
    refused = Verdict("survived", "", unsupported=("second_turn",))
    assert settled(refused, CHECK, Verdict("timeout", "took too long")).status == "broken"
    assert settled(refused, CHECK, Verdict("survived", "", unsupported=("second_turn",))).status == "survived"
    noticed = settled(refused, CHECK, Verdict("survived", ""))
    assert noticed.status == "killed" and noticed.killer == replace(CHECK, only="second_turn")


@pytest.fixture
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants_command", ROOT / "tests" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unknown_names_are_refused_with_the_nearest(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["inverted srt"])
    assert (
        caught.value.code == 2
        and "no mutant is called 'inverted srt'. Did you mean 'inverted sort'?" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as caught:
        command.main(["--timeout", "0"])
    assert caught.value.code == 2


def test_the_list_names_targets_and_judges(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(MUTANTS) and all(
        m.target in line and str(m.by) in line for m, line in zip(MUTANTS, lines, strict=True)
    )


@pytest.mark.parametrize(("statuses", "code"), [("kk", 0), ("ks", 1), ("kt", 1), ("kc", 1), ("kb", 1)])
def test_the_exit_code_is_0_only_where_all_are_killed(
    command: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    statuses: str,
    code: int,
) -> None:
    words = {"k": "killed", "s": "survived", "t": "timeout", "c": "crash", "b": "broken"}
    verdicts = [Verdict(words[letter], "why", CHECK if letter == "k" else None) for letter in statuses]
    monkeypatch.setattr(command, "prepare", lambda judges: None)
    monkeypatch.setattr(command, "run", lambda mutants, timeout, jobs: zip(mutants, verdicts, strict=True))
    assert command.main(["inverted sort", "unsorted output"]) == code
    assert f"1 {words[statuses[1]]}" in capsys.readouterr().out or statuses == "kk"


BY_A_TEST = "lost and won swapped"


@forking
def test_a_test_kills(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "prepare", lambda judges: None)  # this process has imported all of that
    assert command.main([BY_A_TEST]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"killed    {BY_A_TEST}") and named(BY_A_TEST).by.path in said


@pytest.mark.slow
def test_a_test_kills_from_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "tests/mutants.py", BY_A_TEST], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"killed    {BY_A_TEST}")


@pytest.mark.slow
def test_where_processes_do_not_fork_a_fresh_one_looks_the_mutant_up() -> None:
    code = (
        f"import sys; sys.path.append({str(Path(mutant_runner.__file__).parent)!r})\n"
        "from mutant_runner import run; from mutant_table import named\n"
        "print([verdict.status for _, verdict in run([named('inverted sort')], start='spawn')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "['killed']", done.stdout + done.stderr
