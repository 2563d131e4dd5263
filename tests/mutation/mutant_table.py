# SPDX-License-Identifier: Apache-2.0
"""All mutants, by the part of the package that they break."""

from __future__ import annotations

import mutants_inside
import mutants_of_core
import mutants_of_kernels
from mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*mutants_of_core.MUTANTS, *mutants_inside.MUTANTS, *mutants_of_kernels.MUTANTS)


def named(name: str) -> Mutant:
    """The mutant of a name."""
    return next(mutant for mutant in MUTANTS if mutant.name == name)
