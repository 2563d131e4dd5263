# SPDX-License-Identifier: Apache-2.0
"""Sequences from which the model itself took columns of pictures, in front of its language model.

Ids, masks and later turns speak of all columns; what follows speaks of those that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import InvariantError, UnsupportedError

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..state import ForwardState
    from ..vision.pictures import Picture


def take_columns(state: ForwardState, visual: Tensor, pictures: Sequence[Picture]) -> None:
    """Put what was given in terms of the sequence from which the model itself took columns of pictures.

    Args:
        visual: (B, L) bool, placeholder columns of all that was encoded.
    """
    each = [
        torch.ones(one.encoded_count, dtype=torch.bool)
        if one.left is None
        else torch.zeros(one.encoded_count, dtype=torch.bool).index_fill_(0, one.left, True)
        for one in pictures
    ]
    mask, (batch, length) = torch.cat(each).to(visual.device), visual.shape  # (S,)
    repeats = int(visual.sum()) // max(len(mask), 1)  # one prompt, which generate may repeat
    stays = torch.ones(batch, length, dtype=torch.bool, device=visual.device)
    stays[visual] = mask.repeat(repeats)
    given = state.given[stays.to(state.given.device)].view(batch, -1, *state.given.shape[2:])
    if given.shape[1] != state.embeds.shape[1]:
        raise InvariantError(
            f"the language model is given {state.embeds.shape[1]} columns; expected {given.shape[1]} of "
            f"{length} after what the model itself drops of clips"
        )
    state.given, state.stays = given, stays
    if state.input_ids is not None:
        state.input_ids = given


def refuse_leftovers(state: ForwardState, adapter: Adapter) -> None:
    """Refuse a turn that begins with placeholders of the clip before it.

    ``generate`` cuts off as many tokens as the cache counts, and those that the model itself took out are not
    among them.
    """
    if state.placements or state.new_tokens == 1 or state.input_ids is None:
        return
    named = [adapter.token_id(modality) for modality in adapter.modalities]
    if bool(torch.isin(state.input_ids, torch.tensor(named, device=state.input_ids.device)).any()):
        raise UnsupportedError(
            f"the new turn of {state.new_tokens} tokens holds placeholders of a clip of which the model "
            "itself dropped tokens, so that its conversation cannot be continued by generate; give the whole "
            "conversation with its clip again and no cache, or feed the new tokens alone to the model"
        )


def left_by_model(mask: Any, stays: Tensor) -> Any:
    """A padding mask (B, L + n) without the columns that the model itself took out of the prompt."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < stays.shape[1]:
        return mask
    prompt, behind = mask[:, : stays.shape[1]], mask[:, stays.shape[1] :]
    return torch.cat([prompt[stays.to(mask.device)].view(mask.shape[0], -1), behind], dim=1)
