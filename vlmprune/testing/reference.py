# SPDX-License-Identifier: Apache-2.0
"""The slow twin: pruning before the language model done by hand, sharing no code with the hooks.

A dense model is run once to read the merged embeddings of every sample; kept rows are picked with plain indexing, and the
language model is called on them alone, unpadded, without a cache, with positions written out. Greedy decoding recomputes
the whole sequence for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.keepmap import KeepMap


@dataclass
class Kept:
    """One sample without padding: (1, n, D) embeddings and (1, n) positions of what is kept, and the full length."""

    embeds: Tensor
    positions: Tensor
    full: int


def merged_embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, L, D) what the language model is given in a dense run."""
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return seen[0]


def placeholder_columns(model: Any, input_ids: Tensor, embeds: Tensor) -> list[list[int]]:
    """Per row the columns of patches, newline embeddings left out."""
    config = model.config
    tokens = [config.image_token_id] + ([config.video_token_id] if getattr(config, "video_token_id", None) is not None else [])
    newline = getattr(model.model, "image_newline", None)
    rows = []
    for ids, row in zip(input_ids, embeds, strict=True):
        columns = [c for c in range(len(ids)) if int(ids[c]) in tokens]
        if newline is not None:
            columns = [c for c in columns if not torch.equal(row[c], newline.detach().to(row.dtype))]
        rows.append(columns)
    return rows


def kept_by_hand(model: Any, inputs: dict[str, Tensor], maps: Sequence[KeepMap], positions: str) -> list[Kept]:
    """The kept part of every row of a batch, from dense embeddings and the KeepMaps of a pruned run.

    KeepMaps lie in the order in which their pictures stand in the batch (images before clips).
    """
    embeds = merged_embeddings(model, inputs)
    columns = placeholder_columns(model, inputs["input_ids"], embeds)
    kept: list[Kept] = []
    pending = list(maps)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        keep = mask.clone()
        start = 0
        while start < len(columns[row]):
            one = pending.pop(0)
            block = columns[row][start : start + one.total]
            keep[block] = False
            keep[[block[i] for i in one.keep_idx.tolist()]] = True
            start += one.total
        numbers = (mask.long().cumsum(0) - 1)[keep] if positions == "original" else torch.arange(int(keep.sum()))
        kept.append(Kept(embeds[row : row + 1, keep], numbers[None], int(mask.sum())))
    if pending:
        raise ValueError(f"{len(pending)} KeepMaps are left over: they do not describe this batch")
    return kept


def logits_of(model: Any, kept: Kept) -> Tensor:
    """(n, V) logits of the kept sequence."""
    with torch.no_grad():
        output = model.model.language_model(
            inputs_embeds=kept.embeds,
            attention_mask=torch.ones(
                kept.embeds.shape[:2], dtype=torch.long
            ),  # gaps in positions would read as packed sequences
            position_ids=kept.positions,
            use_cache=False,
        )
        return model.lm_head(output.last_hidden_state)[0]


def greedy(model: Any, kept: Kept, new_tokens: int, positions: str) -> list[int]:
    """Greedy answer, the whole sequence recomputed for every token."""
    ids: list[int] = []
    embed = model.get_input_embeddings()
    banned = model.generation_config.suppress_tokens or []
    for step in range(new_tokens):
        logits = logits_of(model, kept)[-1]
        logits[banned] = -torch.inf
        ids.append(int(logits.argmax()))
        number = kept.full + step if positions == "original" else int(kept.positions[0, -1]) + 1
        with torch.no_grad():
            row = embed(torch.tensor([[ids[-1]]]))
        kept = Kept(torch.cat([kept.embeds, row], 1), torch.cat([kept.positions, torch.tensor([[number]])], 1), kept.full)
    return ids


def entered(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Per sample the (n, D) rows that the first decoder layer really reads, dead slots and padding left out.

    For merging methods, whose rows cannot be picked from the dense embeddings. Run it with the method attached; the mask is
    read off an eager attention mask, so the model must use ``attn_implementation="eager"``.
    """
    seen: list[tuple[Tensor, Tensor | None]] = []

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append((hidden.detach().clone(), kwargs.get("attention_mask")))

    handle = model.model.language_model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs, **options)
    finally:
        handle.remove()
    hidden, mask = seen[0]
    if mask is None:
        return list(hidden)
    last = mask[:, 0, -1]  # (B, n) what the last token may read
    return [row[allowed == 0] if allowed.is_floating_point() else row[allowed] for row, allowed in zip(hidden, last, strict=True)]
