# SPDX-License-Identifier: Apache-2.0
"""The text that a picture is asked about, for methods that choose by it before the language model.

A picture belongs to one prompt: where several rows of a batch show the same picture with different text, each
of them has a picture of its own. Rows of one prompt (beams, several returned sequences) go on sharing theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.method import Method, Need, Text
from ...errors import UnsupportedError
from .placement import Placement

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..state import ForwardState
    from ..vision.pictures import Picture


def told_apart(state: ForwardState, placement: Placement) -> Placement:
    """The placement with one picture per prompt, where rows with different text share a picture."""
    given = state.given
    prompt, valid = given[:, : given.shape[1] - state.generated], state.columns.valid

    def same(one: int, other: int) -> bool:
        masked = valid is not None and not torch.equal(valid[one], valid[other])
        return not masked and torch.equal(prompt[one], prompt[other])

    pictures: list[Picture] = []
    rows: list[list[int]] = []
    prompts: list[int] = []  # with pictures, the first row of each
    for row, mine in enumerate(placement.rows):
        if not mine:
            rows.append([])
            continue
        twin = next((one for one in prompts if placement.rows[one] == mine and same(one, row)), None)
        if twin is None:
            prompts.append(row)
            rows.append(list(range(len(pictures), len(pictures) + len(mine))))
            pictures += [placement.pictures[p] for p in mine]
        else:
            rows.append(rows[twin])
    return replace(placement, pictures=pictures, rows=rows)


def with_text(
    state: ForwardState, adapter: Adapter, pictures: Sequence[Picture], needs: Sequence[Need]
) -> list[Picture]:
    """The pictures of a forward with the embeddings (R, D) of the text that each is asked about.

    Where words stand is known on the device only, which is asked once per text.
    """
    found = list(pictures)
    for need in (one for one in needs if one.what == "text_embeds"):
        words = word_columns(state, adapter, need.text or "question").cpu()
        first = 0
        for placement in state.placements:
            # rows that share a picture ask the same about it, see told_apart: any of them will do
            for p, row in {p: row for row, p, _ in placement.spans}.items():
                columns, picture = words[row].nonzero()[:, 0], found[first + p]
                text = state.embeds[row, columns.to(state.embeds.device)].detach()
                found[first + p] = replace(picture, captured={**picture.captured, need: text})
            first += len(placement.pictures)
    return found


def word_columns(state: ForwardState, adapter: Adapter, text: Text) -> Tensor:
    """(B, L) bool, columns of the question or of the whole prompt.

    Padding, pictures, tokens that the configuration names (begin, end, placeholders) and what was generated
    so far are no words.
    """
    columns, given = state.columns, state.given
    device = columns.visual[0].device
    words = ~columns.pictures
    if text == "question":
        words &= columns.after_pictures()
    if columns.valid is not None:
        words &= columns.valid.to(device)
    ids = torch.tensor(sorted(set(named_ids(adapter))), device=device)
    if state.input_ids is not None:
        words &= ~torch.isin(given.to(device), ids)
    else:
        embedding = adapter.inner.get_input_embeddings()
        # some families name placeholders that have no embedding
        ids = ids[ids < embedding.num_embeddings].to(given.device)
        for row in embedding(ids):
            words &= ~(given == row).all(dim=-1).to(device)
    words[:, words.shape[1] - state.generated :] = False
    return words


def named_ids(adapter: Adapter) -> Iterator[int]:
    """Ids of tokens that have a name in the configuration."""
    model: Any = adapter.model
    parts = (
        model.config,
        getattr(model.config, "text_config", None),
        getattr(model, "generation_config", None),
    )
    for part in parts:
        for name, value in ({} if part is None else vars(part)).items():
            if name.endswith(("token_id", "token_ids", "token_index")):
                some = value if isinstance(value, list | tuple) else [value]
                yield from (one for one in some if isinstance(one, int) and one >= 0)


def without_skipped(state: ForwardState, text: Tensor, method: Method) -> Tensor:
    """(B, n) bool, text (B, n) without what a method skips; all of it where nothing else is there."""
    if state.input_ids is None:
        raise UnsupportedError(
            f"{method.name} skips words by their token ids, and the call gives inputs_embeds alone; give "
            "input_ids, or leave the option skip out"
        )
    ids = state.input_ids.to(text.device)
    skipped = torch.isin(ids, torch.tensor(method.skips, device=ids.device))
    # a question of stop words alone is still a question
    left = text & ~state.views.follow(skipped, 0)
    return torch.where(left.any(dim=1, keepdim=True), left, text)
