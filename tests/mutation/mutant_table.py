# SPDX-License-Identifier: Apache-2.0
"""All mutants, by the part of the package that they break."""

from __future__ import annotations

import mutants_inside
import mutants_of_choice
import mutants_of_encoder
import mutants_of_evaluation
import mutants_of_kernels
import mutants_of_methods
import mutants_of_models
import mutants_of_sequence
import mutants_of_session
from mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *mutants_of_choice.MUTANTS,
    *mutants_of_sequence.MUTANTS,
    *mutants_of_session.MUTANTS,
    *mutants_inside.MUTANTS,
    *mutants_of_encoder.MUTANTS,
    *mutants_of_methods.MUTANTS,
    *mutants_of_models.MUTANTS,
    *mutants_of_kernels.MUTANTS,
    *mutants_of_evaluation.MUTANTS,
)


def named(name: str) -> Mutant:
    """The mutant of a name."""
    return next(mutant for mutant in MUTANTS if mutant.name == name)
