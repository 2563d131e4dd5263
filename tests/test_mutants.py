# SPDX-License-Identifier: Apache-2.0
"""The list of deliberate mistakes follows the code: each stands for one line that is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_replaces_one_line_of_the_code(mutant):
    assert (ROOT / "vlmprune" / mutant.file).read_text().count(mutant.old) == 1 and mutant.old != mutant.new
