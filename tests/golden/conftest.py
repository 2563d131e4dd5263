# SPDX-License-Identifier: Apache-2.0
"""Golden vectors: recorded inputs and answers of reference code, run through this package.

A folder of vectors holds one sub-folder per method with an ``index.json`` and the ``.npz`` files it names.
Each case is run by the function that ``runners/<registered name>.py`` lists in ``RUNNERS`` under the kind of
the case. Nothing is skipped: an unknown kind, a missing file and an expected array that no runner looked at
are failures, and methods that are not registered are named in the summary.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from types import EllipsisType

import numpy as np
import pytest
import torch

from vlmprune.registry import list_methods

HERE = Path(__file__).parent
REGISTERED_AS = {
    "zoo_prune": "zooprune",
    "visual_sink_var": "var",
    "attention_debiasing": "debias",
    "idpruner": "mmr",
    "textmonkey_filter": "textmonkey",
}  # folder -> method


class Case:
    """One case of an index: its input arrays, its hyper-parameters, and the comparison with its expected
    arrays.
    """

    def __init__(self, folder: Path, entry: dict) -> None:
        self.method = REGISTERED_AS.get(folder.name, folder.name)
        self.path = folder / entry["file"]
        self.kind = entry["kind"]
        self.hyper = entry.get("hyperparameters", entry.get("hyper", {}))
        self.config = entry.get("config", {})  # of a whole decoder
        self.tolerance = entry.get("tolerance", "exact")
        self.checked: set[str] = set()

    def __str__(self) -> str:
        return f"{self.method}-{self.path.stem}"

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path, allow_pickle=False) as data:
            return dict(data)

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def load(self, model: torch.nn.Module) -> torch.nn.Module:
        """Give the model the arrays ``param/*`` and set it to evaluation."""
        # transformers before 5 keeps a tower one level down
        prefix = (
            "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
        )
        state = {
            prefix + name.removeprefix("param/"): self.tensor(name)
            for name in self.arrays
            if name.startswith("param/")
        }
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and all(name.endswith("position_ids") for name in missing), (
            f"{self}: {missing=} {unexpected=}"
        )
        return model.eval()

    def check(self, name: str, actual: torch.Tensor, word: str = "", at: tuple | EllipsisType = ...) -> None:
        """Compare with array ``name``, or with its part ``at``.

        Where the tolerance is one sentence for the whole file, ``word`` picks its clause.
        """
        expected, actual = self.arrays[name][at], actual.detach().cpu().numpy()
        self.checked.add(name)
        assert actual.shape == expected.shape, (
            f"{self}: {name} has shape {actual.shape}, expected {expected.shape}"
        )
        text = self._tolerance_of(name, word or name, expected)
        if "exact" in text:
            np.testing.assert_array_equal(actual, expected, err_msg=f"{self}: {name}")
        else:
            np.testing.assert_allclose(actual, expected, **bounds(text), err_msg=f"{self}: {name}")

    def _tolerance_of(self, name: str, word: str, expected: np.ndarray) -> str:
        if isinstance(self.tolerance, dict):
            found = [
                text for pattern, text in self.tolerance.items() if fnmatchcase(name.split("/")[0], pattern)
            ]
        else:
            clauses = self.tolerance.split(";")
            found = [clause for clause in clauses if word in clause] or (clauses if len(clauses) == 1 else [])
        if not found and np.issubdtype(expected.dtype, np.integer):
            return "exact"
        assert found, f"{self}: no tolerance for {name!r} in {self.tolerance!r}; pass word= to check()"
        return found[0]

    def unchecked(self) -> list[str]:
        """Arrays that the index gives a tolerance, hence expects, and that were not compared."""
        patterns = self.tolerance if isinstance(self.tolerance, dict) else ()
        return [
            n
            for n in self.arrays
            if n not in self.checked and any(fnmatchcase(n.split("/")[0], p) for p in patterns)
        ]


def bounds(text: str) -> dict[str, float]:
    """``"rtol 1e-5, atol 1e-8"`` as keyword arguments; what is not named is zero."""
    found = {word: float(number) for word, number in re.findall(r"(rtol|atol) ([0-9.e+-]*[0-9])", text)}
    assert found, f"cannot read the tolerance {text!r}; expected 'exact' or 'rtol X, atol Y'"
    return {"rtol": 0.0, "atol": 0.0} | found


def read_cases(directory: Path) -> list[Case]:
    """All cases of a folder of vectors, in both forms of index: {"files": {name: case}} and {"cases":
    [case]}.
    """
    cases = []
    for index in sorted(directory.glob("*/index.json")):
        content = json.loads(index.read_text())
        entries = (
            content["cases"]
            if "cases" in content
            else [{"file": file} | case for file, case in content["files"].items()]
        )
        cases += [Case(index.parent, entry) for entry in entries]
    return cases


def load_runners(method: str) -> dict:
    """Kind -> function(case) of ``runners/<method>.py``."""
    path = HERE / "runners" / f"{method}.py"
    if not path.exists():
        return {}
    spec = importlib.util.spec_from_file_location(f"golden_runner_{method}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RUNNERS


def golden_dir(config: pytest.Config) -> Path:
    return config.getoption("--golden-dir") or HERE / "data"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    directory = golden_dir(metafunc.config)
    cases = read_cases(directory)
    if not cases:
        raise pytest.UsageError(
            f"no golden vectors under {directory}; expected <method>/index.json files there"
        )
    known = list_methods()
    runnable = [case for case in cases if case.method in known]
    if not runnable:
        raise pytest.UsageError(
            f"no method of {directory} is registered: {sorted({case.method for case in cases})}"
        )
    metafunc.parametrize("case", runnable, ids=str)


@pytest.fixture
def runners():
    return load_runners


def pytest_terminal_summary(terminalreporter, exitstatus, config: pytest.Config) -> None:
    passed: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, method in getattr(report, "user_properties", []):
                if name == "golden" and (report.when == "call" or outcome != "passed"):
                    ran[method] += 1
                    passed[method] += outcome == "passed"
    if not ran:
        return
    terminalreporter.section(f"golden vectors in {golden_dir(config)}")
    for method in sorted(ran):
        terminalreporter.write_line(f"{method}: {passed[method]} of {ran[method]} cases passed")
    known = list_methods()
    absent = Counter(case.method for case in read_cases(golden_dir(config)) if case.method not in known)
    if absent:
        names = ", ".join(f"{method} ({count} cases)" for method, count in sorted(absent.items()))
        terminalreporter.write_line(f"not registered: {names}")
