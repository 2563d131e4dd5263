# SPDX-License-Identifier: Apache-2.0
"""ForwardState: what is read too early is named."""

from __future__ import annotations

import pytest
import torch

from vlmprune.core.report import Report
from vlmprune.errors import InvariantError
from vlmprune.hooks.state import ForwardState


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("embeds", "merged sequence"),
        ("columns", "columns of pictures"),
        ("tracked", "record of cuts inside"),
        ("views", "way to open views"),
        ("given", "input"),
    ],
)
def test_what_a_forward_does_not_know_yet_is_an_error(name: str, said: str) -> None:
    with pytest.raises(InvariantError, match=f"this forward has no {said}"):
        getattr(ForwardState(None, None, Report("fastv@9")), name)


def test_ids_are_what_was_given_and_embeddings_in_their_place() -> None:
    ids, embeds = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 4, 2)
    assert ForwardState(ids, None, Report("fastv@9")).given is ids
    state = ForwardState(None, embeds, Report("fastv@9"))
    assert state.given is embeds and state.new_tokens == 4
