# SPDX-License-Identifier: Apache-2.0
"""The slow twin: pruning before the language model done by hand, sharing no code with the hooks.

A dense model is run once to read the merged embeddings of every sample; kept rows are picked with plain
indexing, and the language model is called on them alone, unpadded, without a cache, with positions written
out. Greedy decoding recomputes the whole sequence for every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.keepmap import KeepMap
from ..models import adapter_for
from .reference_masks import attends_both_ways, blocks_of, mask_by_hand
from .tiny import head_of


@dataclass
class Kept:
    """One sample without padding: (1, n, D) embeddings, (1, n) or (3, 1, n) positions, and what is added
    after early layers.

    ``stacked`` holds one (n, D) per layer, zero where nothing is added (DeepStack). ``blocks`` (n,) numbers
    the sets of tokens that attend to each other both ways, -1 for tokens that are in none. ``beside`` (1, m,
    layers, d) is what layers are given of each token beside its hidden state (Gemma 4); text behind the first
    m tokens has its own, which the model finds by its embedding.
    """

    embeds: Tensor
    positions: Tensor
    stacked: list[Tensor] = field(default_factory=list)
    blocks: Tensor | None = None
    beside: Tensor | None = None

    def grown(self, rows: Tensor) -> Kept:
        """With (1, t, D) rows of text behind it."""
        # counts on from the last position, on every axis
        numbers = self.positions[..., -1:] + 1 + torch.arange(rows.shape[1])
        stacked = [torch.cat([one, torch.zeros_like(rows[0])]) for one in self.stacked]
        blocks = None if self.blocks is None else nn.functional.pad(self.blocks, (0, rows.shape[1]), value=-1)
        return Kept(
            torch.cat([self.embeds, rows], 1),
            torch.cat([self.positions, numbers], -1),
            stacked,
            blocks,
            self.beside,
        )

    def columns(self, keep: Tensor) -> Kept:
        """Only the columns of a mask or of indices (n,)."""
        blocks = None if self.blocks is None else self.blocks[keep]
        return Kept(
            self.embeds[:, keep],
            self.positions[..., keep],
            [one[keep] for one in self.stacked],
            blocks,
            None if self.beside is None else self.beside[:, keep],
        )

    def recounted(self) -> Kept:
        """At positions without gaps."""
        # from the first position, which is 1 in PaliGemma
        return replace(self, positions=self.positions[:, :1] + torch.arange(self.embeds.shape[1])[None])


def language_model(model: Any) -> Any:
    """The decoder of a tiny model."""
    return adapter_for(model).language_model


def language_model_call(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the language model is given in one forward."""
    seen: list[dict[str, Any]] = []
    handle = language_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return seen[0]


def merged_embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, L, D) what the language model is given in a dense run."""
    return first_rows(language_model_call(model, inputs))


def first_rows(call: dict[str, Any]) -> Tensor:
    """(B, L, D) what the first layer is given: embeddings, and features that are added in front of it."""
    embeds: Tensor = call["inputs_embeds"].detach().clone()
    features = (call.get("deepstack_features") or {}).get(0)
    if features is not None:  # Granite Vision, whose embeddings are 0 there
        embeds[call["vision_mask"][..., 0]] = features.detach()
    return embeds


def added_rows(call: dict[str, Any]) -> list[Tensor]:
    """(B, L, D) for each layer what is added behind it, 0 where there is no picture (DeepStack)."""
    visual = call.get("visual_pos_masks")
    behind = dict(enumerate(call.get("deepstack_visual_embeds") or []))
    if call.get("deepstack_features"):  # Granite Vision adds in front of layers
        visual = call["vision_mask"][..., 0]
        behind = {layer - 1: features for layer, features in call["deepstack_features"].items() if layer}
    found = [torch.zeros_like(call["inputs_embeds"]) for _ in range(max(behind, default=-1) + 1)]
    for layer, features in behind.items():
        found[layer][visual] = features.detach()
    return found


def dense_rows(model: Any, inputs: dict[str, Tensor]) -> list[Kept]:
    """Every row of a batch, whole and without its padding, at the positions that generate gives it."""
    call = language_model_call(model, inputs)
    embeds, places = first_rows(call), call.get("position_ids")
    stacked = added_rows(call)
    rows, beside = [], call.get("per_layer_inputs")
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        numbers = torch.arange(int(mask.sum()))[None] + (
            model.config.model_type == "paligemma"
        )  # which counts from 1
        if places is not None and places.ndim == 3:  # places in pictures, which the model knows
            numbers = places[-3:, row : row + 1, mask]  # without the number of the token
        blocks, types = None, inputs.get(adapter_for(model).types)
        if types is not None and attends_both_ways(model.config):
            blocks = blocks_of(model.config.model_type, types[row, mask])
        rows.append(
            Kept(
                embeds[row : row + 1, mask],
                numbers,
                [one[row, mask] for one in stacked],
                blocks,
                None if beside is None else beside[row : row + 1, mask].detach(),
            )
        )
    return rows


def beside_all(model: Any, kept: Kept) -> Tensor | None:
    """(1, n, layers, d) of all tokens, also of text that stands behind the first."""
    if kept.beside is None:
        return None
    text = kept.embeds[:, kept.beside.shape[1] :]
    if not text.shape[1]:
        return kept.beside
    make, lm = language_model(model).get_per_layer_inputs, language_model(model)
    if "inputs_embeds" in inspect.signature(make).parameters:
        return torch.cat([kept.beside, make(None, text)], dim=1)
    table = lm.embed_tokens(torch.arange(lm.config.vocab_size))  # (V, D)
    ids = (text[..., None, :] == table).all(-1).float().argmax(-1)
    return torch.cat([kept.beside, make(ids)], dim=1)


def beside_layers(model: Any, kept: Kept, columns: Sequence[int]) -> list[dict[str, Tensor]]:
    """What every layer is given beside its hidden states at some of the columns: nothing in most models."""
    lm, beside = language_model(model), beside_all(model, kept)
    if beside is None:
        return [{} for _ in lm.layers]
    made = lm.project_per_layer_inputs(kept.embeds, beside)[:, list(columns)]  # (1, n, layers, d)
    return [{"per_layer_input": made[:, :, index]} for index in range(len(lm.layers))]


def placeholder_columns(model: Any, input_ids: Tensor, embeds: Tensor) -> list[list[int]]:
    """Per row the columns of patches, newline and [CLS] embeddings left out."""
    config = model.config
    tokens = [config.image_token_id] + (
        [config.video_token_id] if getattr(config, "video_token_id", None) is not None else []
    )
    inner = adapter_for(model).inner
    marks = [getattr(inner, name, None) for name in ("image_newline", "view_separator")]
    rows = []
    for ids, row in zip(input_ids, embeds, strict=True):
        columns = [c for c in range(len(ids)) if int(ids[c]) in tokens]
        # newlines and their like have the id of a placeholder, and are told by their values
        for mark in marks:
            if mark is not None:
                columns = [c for c in columns if not torch.equal(row[c], mark.detach().to(row.dtype))]
        if config.model_type == "video_llava":  # a [CLS] in front of every frame
            frames = [c for c in columns if int(ids[c]) == config.video_token_id]
            first = set(
                frames[:: (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1]
            )
            columns = [c for c in columns if c not in first]
        rows.append(columns)
    return rows


def kept_by_hand(
    model: Any, inputs: dict[str, Tensor], maps: Sequence[KeepMap], positions: str, text_only: bool = False
) -> list[Kept]:
    """The kept part of every row of a batch, from dense embeddings and the KeepMaps of a pruned run.

    KeepMaps lie in the order in which their pictures stand in the batch (images before clips). With
    ``text_only`` newline and [CLS] embeddings of the pictures go as well.
    """
    names = ("image_token_id", "video_token_id")
    # -1 is no id: not every family has clips
    pictured = torch.isin(
        inputs["input_ids"], torch.tensor([getattr(model.config, name, None) or -1 for name in names])
    )
    embeds = merged_embeddings(model, inputs)
    columns = placeholder_columns(model, inputs["input_ids"], embeds)
    kept: list[Kept] = []
    pending = list(maps)
    for row, (mask, dense) in enumerate(
        zip(inputs["attention_mask"].bool(), dense_rows(model, inputs), strict=True)
    ):
        keep = mask.clone()
        start = 0
        # each map describes the next placeholders of its row
        while start < len(columns[row]):
            one = pending.pop(0)
            block = columns[row][start : start + one.total]
            keep[block] = False
            keep[[block[i] for i in one.keep_idx.tolist()]] = True
            start += one.total
        if text_only:
            keep &= ~pictured[row]
        chosen = dense.columns(keep[mask])
        kept.append(chosen if positions == "original" else chosen.recounted())
    if pending:
        raise ValueError(f"{len(pending)} KeepMaps are left over: they do not describe this batch")
    return kept


def by_row(maps: Sequence[KeepMap], images: Sequence[int], frames: int) -> list[KeepMap]:
    """Maps of a report (all images, then all frames) in the order in which rows read them: images, then the
    clip of that row.
    """
    stills, moving = ([one for one in maps if (one.frame is None) == still] for still in (True, False))
    ordered = []
    for row, count in enumerate(images):
        ordered += [stills.pop(0) for _ in range(count)] + moving[row * frames : (row + 1) * frames]
    return ordered


def logits_of(model: Any, kept: Kept) -> Tensor:
    """(n, V) logits of the kept sequence."""
    length = kept.embeds.shape[1]
    # spelled out: gaps in positions would read as packed sequences
    extra: dict[str, Any] = {"attention_mask": torch.ones(1, length, dtype=torch.long)}
    if kept.blocks is not None:
        # one mask for each kind of layer, where there are kinds
        kinds = getattr(language_model(model).config, "layer_types", None)
        masks = {
            kind: mask_by_hand(model.config, i, length, kept.blocks)
            for i, kind in enumerate(kinds or ["all"])
        }
        extra["attention_mask"] = masks if kinds else masks["all"]
    if kept.beside is not None:
        extra["per_layer_inputs"] = beside_all(model, kept)
    # every column: ``stacked`` is 0 where nothing is added
    columns = torch.ones(kept.embeds.shape[:2], dtype=torch.bool)
    if kept.stacked and adapter_for(model).added is not None:
        features = dict(enumerate(kept.stacked, 1))
        extra |= {"vision_mask": columns[..., None], "deepstack_features": features}
    elif kept.stacked:
        extra |= {"visual_pos_masks": columns, "deepstack_visual_embeds": kept.stacked}
    with torch.no_grad():
        output = language_model(model)(
            inputs_embeds=kept.embeds,
            position_ids=kept.positions,
            use_cache=False,
            **extra,
        )
        return head_of(model)(output.last_hidden_state)[0]


def greedy(model: Any, kept: Kept, new_tokens: int) -> list[int]:
    """Greedy answer, the whole sequence recomputed for every token."""
    ids: list[int] = []
    embed = model.get_input_embeddings()
    # as generate does: ids of placeholders are never made
    banned = model.generation_config.suppress_tokens or []
    for _ in range(new_tokens):
        logits = logits_of(model, kept)[-1]
        logits[banned] = -torch.inf
        ids.append(int(logits.argmax()))
        with torch.no_grad():
            kept = kept.grown(embed(torch.tensor([[ids[-1]]])))
    return ids


def entered(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Per sample the (n, D) rows that the first decoder layer really reads, dead slots and padding left out.

    For merging methods, whose rows cannot be picked from the dense embeddings. Run it with the method
    attached; the mask is read off an eager attention mask, so the model must use
    ``attn_implementation="eager"``.
    """
    seen: list[tuple[Tensor, Tensor | None]] = []

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        # Gemma 3n holds several states of every token, of which the first is its embedding
        first = hidden[0] if hidden.ndim == 4 else hidden
        seen.append((first.detach().clone(), kwargs.get("attention_mask")))

    handle = language_model(model).layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs, **options)
    finally:
        handle.remove()
    hidden, mask = seen[0]
    if mask is None:
        return list(hidden)
    read = (mask == 0 if mask.is_floating_point() else mask)[:, 0].any(
        dim=1
    )  # (B, n) what some token may read
    return [row[allowed] for row, allowed in zip(hidden, read, strict=True)]


def legible(model: Any, dense: Kept) -> str | None:
    """The policy of a session whose columns ``read_rows`` can tell; None where the family has only one."""
    # what generate takes is asked as it does itself (HyperCLOVA X: ids only)
    alone = "inputs_embeds" in inspect.signature(model.prepare_inputs_for_generation).parameters
    if not alone and dense.positions.ndim == 2:
        return "original"
    if dense.blocks is not None or dense.beside is not None or (dense.stacked and dense.positions.ndim == 2):
        return "original"
    return "compact" if dense.positions.ndim == 2 else None


def read_rows(model: Any, inputs: dict[str, Tensor], dense: Kept) -> tuple[Kept, list[int] | None]:
    """What the language model reads of a batch of one while a method is attached, merged rows included.

    Positions count on; where tokens have places in pictures, or attend both ways, they are those of ``dense``
    at the columns that are read, which are given as well.
    """
    seen: list[dict[str, Any]] = []
    handle = language_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
    finally:
        handle.remove()
    rows = first_rows(seen[0])
    if legible(model, dense) == "compact":
        return Kept(rows, torch.arange(rows.shape[1])[None]), None
    if dense.positions.ndim == 2:
        # original positions, less the first one, are columns
        given = seen[0].get("position_ids")  # none where nothing is cut: the model counts for itself
        columns = torch.arange(rows.shape[1]) if given is None else given[0] - dense.positions[0, 0]
        return replace(dense.columns(columns), embeds=rows), columns.tolist()
    places = seen[0]["position_ids"][:, 0]  # (4, n), or (3, n)
    if len(places) == 4:
        # generate puts the number of every token before its places; in Qwen3-Omni all of them are floats
        columns = places[0].long()
    else:  # Cosmos 3 Edge does not; no two tokens have the same place
        columns = (places[:, :, None] == dense.positions[:, 0, None]).all(dim=0).int().argmax(dim=1)
    return replace(dense.columns(columns), embeds=rows), columns.tolist()
