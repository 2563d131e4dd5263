# SPDX-License-Identifier: Apache-2.0
"""The slow eager twin of cuts inside the language model: layers called one by one, tokens physically removed,
no cache.

Needs a model with ``attn_implementation="eager"``; scores are read off the attention maps that eager
attention returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..core.method import CutPoint, Merged, Method, needs, needs_of
from ..core.select import choose
from ..core.tokens import LayerFields, VisualTokens
from ..hooks.sequence.cache import cache_in, cache_name, slots_held
from ..hooks.slots.landing import landed
from .reference import Kept, beside_layers, language_model
from .reference_masks import angles_by_hand, frequencies, mask_by_hand


def first_norm(layer: Any) -> Any:
    """What stands in front of the attention of a layer; nothing does in EXAONE 4, which norms behind it."""
    return getattr(layer, "input_layernorm", None) or getattr(layer, "operator_norm", nn.Identity())


def last_norm(language_model: Any) -> Any:
    """What stands between the last layer and the head."""
    return getattr(language_model, "norm", None) or language_model.embedding_norm


def held_keys(attention: Any, held: Any) -> Tensor:
    """(1, n, Hk, d) keys that one layer of a cache holds."""
    # DeepSeek V3 holds latents, of which its attention makes keys and values in every call
    latent = hasattr(attention, "expand_kv")
    keys: Tensor = attention.expand_kv(held.keys, held.values)[0] if latent else held.keys
    return keys.transpose(1, 2)


def shared_keys(layer: Any) -> dict[str, Any]:
    """Where a layer of Gemma 4 puts its keys for later layers, if any share them."""
    return {"shared_kv_states": {}} if "shared_kv_states" in signature(layer.forward).parameters else {}


def placed(attention: Any, numbers: Tensor) -> dict[str, Tensor]:
    """Plain positions (n,) as (1, n), where attention scales its queries by them (Ministral 3)."""
    known = "position_ids" in signature(attention.forward).parameters
    return {"position_ids": numbers[None]} if known and numbers.ndim == 1 else {}


class Said(NamedTuple):
    """What a layer says: attention maps (1, H, n, n), and keys (1, n, Hk, d) for a method that reads them."""

    maps: Tensor
    keys: Tensor | None


@dataclass
class Twin:
    """One sample of L columns, columns of every picture's patches, text columns after the last one."""

    model: Any
    method: Method
    budget: Any
    policy: str
    dense: Kept
    pictures: list[list[int]]
    text: list[int]
    kept: dict[int, list[int]] = field(
        default_factory=dict
    )  # layer -> prompt columns that it and later layers read
    merged: dict[int, tuple[list[int], Tensor]] = field(
        default_factory=dict
    )  # layer -> columns and the rows put there

    @property
    def language_model(self) -> Any:
        return language_model(self.model)

    @property
    def embeds(self) -> Tensor:
        return self.dense.embeds

    def points(self, count: int) -> tuple[CutPoint, ...]:
        """Cuts of a picture of ``count`` tokens."""
        layers = self.language_model.layers
        return landed(self.method, layers, self.budget, count).cuts(len(layers), self.budget, count)

    @torch.no_grad()
    def logits(self, new: Tensor | None = None) -> Tensor:
        """(n, V) logits after the prompt and ``new`` (1, t, D) embeddings; the cut is made once, by the first
        call.
        """
        # the first call chooses, later ones follow it
        choosing = not self.kept
        length = self.embeds.shape[1]
        whole = self.dense if new is None else self.dense.grown(new)
        hidden, numbers, blocks = (
            whole.embeds,
            whole.positions[..., 0, :],
            whole.blocks,
        )  # positions (L,) or (3, L)
        # columns[i]: the column of the dense sequence that stands at place i
        columns = list(range(hidden.shape[1]))
        spans, said = [list(picture) for picture in self.pictures], Said(torch.empty(0), None)
        # layer -> (number of the cut, the cut)
        cuts = {
            stage.layer: (number, stage)
            for number, stage in enumerate(self.points(len(spans[0]) if spans else 1))
        }
        for index in range(len(self.language_model.layers)):
            if index in cuts and spans:
                number, stage = cuts[index]
                if choosing:
                    # a layer that ranks its own input has to run on all of it first
                    if stage.source == index:
                        said = self._attend(index, hidden, numbers, blocks, whole, columns)[1]
                    spans = self._cut(index, number, spans, columns, numbers, hidden, said)
                # rows that merging made, in the columns of tokens that stay
                if index in self.merged:
                    at, rows = self.merged[index]
                    hidden = hidden.index_copy(1, torch.tensor([columns.index(c) for c in at]), rows[None])
                # what is kept of the prompt, and all that came behind it
                where = [i for i, c in enumerate(columns) if c in set(self.kept[index]) or c >= length]
                hidden, columns = hidden[:, where], [columns[i] for i in where]
                numbers = torch.arange(len(columns)) if self.policy == "compact" else numbers[..., where]
                blocks = None if blocks is None else blocks[where]
            hidden, said = self._attend(index, hidden, numbers, blocks, whole, columns)
            if index < len(whole.stacked):
                hidden = hidden + whole.stacked[index][columns]
        return self.model.lm_head(last_norm(self.language_model)(hidden))[0]

    def _raters(self) -> list[int]:
        """Prompt columns whose rows rank the tokens."""
        if not self.text:
            return [self.embeds.shape[1] - 1]
        visual = torch.cat([self.embeds[0, picture] for picture in self.pictures])
        if any(need.text == "question" for need in needs_of(self.method)):
            return self.text
        chosen = self.method.raters(self.embeds[0, self.text], visual)
        return (
            self.text[-1:]
            if chosen is None
            else [c for c, yes in zip(self.text, chosen.tolist(), strict=True) if yes]
        )

    def _cut(
        self,
        index: int,
        number: int,
        spans: list[list[int]],
        columns: list[int],
        numbers: Tensor,
        hidden: Tensor,
        said: Said,
    ) -> list[list[int]]:
        """Choose at one layer: the columns that stay of every picture; remembers what is kept and merged."""
        queries = [columns.index(c) for c in self._raters()]
        source = self.points(len(self.pictures[0]))[number].source
        source = index if source is None else source
        left, places, rows = [], [], []
        for picture, span in zip(self.pictures, spans, strict=True):
            keep = self.points(len(picture))[number].keep
            if keep >= len(span):
                left.append(span)
                continue
            if keep == 0:
                left.append([])
                continue
            at = [columns.index(c) for c in span]
            tokens = VisualTokens(
                features=hidden[:, at],
                **self._read(said, hidden, at, queries),
                query_mask=torch.ones(1, len(queries), dtype=torch.bool),
                query_positions=numbers[None, queries] if numbers.ndim == 1 else None,
                positions=numbers[None, at] if numbers.ndim == 1 else None,
                rotary_frequencies=frequencies(self.language_model, source) if numbers.ndim == 1 else None,
                cut=number,
            )
            result = choose(self.method, tokens, keep)
            stay = (result.slots if isinstance(result, Merged) else result)[0].tolist()
            own = [span[i] for i in stay if i >= 0]
            if isinstance(result, Merged):  # rows without a place of their own take the last free ones
                free = [c for c in span if c not in own]
                own = sorted(own + free[len(free) - stay.count(-1) :])
                places += own
                rows.append(result.features[0])
            left.append(own)
        # all that is no patch stays
        patches, staying = {c for span in spans for c in span}, {c for span in left for c in span}
        self.kept[index] = [c for c in columns if c not in patches or c in staying]
        if rows:
            self.merged[index] = (places, torch.cat(rows))
        return left

    def _read(self, said: Said, hidden: Tensor, at: list[int], queries: list[int]) -> LayerFields:
        """Fields of VisualTokens: of a picture at columns ``at``, and of the columns that query it."""
        states = last_norm(self.language_model)(hidden)
        return {
            "text_attention": said.maps[:, :, queries][..., at],  # (1, H, R, N)
            "text_to_text": said.maps[:, :, queries][..., queries],
            "lm_received": said.maps.amax(dim=1)[:, at][..., at].sum(dim=1),
            "lm_keys": None if said.keys is None else said.keys[:, at],
            "text_keys": None if said.keys is None else said.keys[:, queries],
            "lm_states": states[:, at],
            "text_states": states[:, queries],
        }

    def _attend(
        self,
        index: int,
        hidden: Tensor,
        numbers: Tensor,
        blocks: Tensor | None,
        whole: Kept,
        columns: Sequence[int],
    ) -> tuple[Tensor, Said]:
        """Output (1, n, D) of a layer that reads these columns of the whole, and what it says."""
        layer = self.language_model.layers[index]
        angles = angles_by_hand(self.language_model, index, hidden, numbers[..., None, :])
        if not hasattr(layer, "self_attn"):  # it keeps a running state, and nobody can rank by it
            return layer(hidden, attention_mask=None, position_embeddings=angles), Said(torch.empty(0), None)
        mask = mask_by_hand(self.model.config, index, hidden.shape[1], blocks)
        # a cache of this one call, for its keys
        cache, options = DynamicCache(), {}
        places = placed(layer.self_attn, numbers)
        if needs(self.method, "lm_keys"):
            options[cache_name(signature(layer.self_attn.forward).parameters)] = cache
        maps = layer.self_attn(
            hidden_states=first_norm(layer)(hidden),
            position_embeddings=angles,
            attention_mask=mask,
            **options,
            **places,
            **shared_keys(layer),
        )[1]
        layers: Any = cache.layers  # of attention: those of other kinds hold no keys
        said = Said(maps, held_keys(layer.self_attn, layers[index]) if options else None)
        # the layer as a whole, which gives no maps
        given = shared_keys(layer) | places | beside_layers(self.model, whole, columns)[index]
        out = layer(hidden, attention_mask=mask, position_embeddings=angles, **given)
        return (out[0] if isinstance(out, tuple) else out), said

    def greedy(self, new_tokens: int, given: Sequence[int] = ()) -> list[int]:
        """Greedy answer, everything recomputed for every token.

        Args:
            new_tokens: how many.
            given: ids that follow the prompt, after the cut was made.
        """
        ids, banned = list(given), self.model.generation_config.suppress_tokens or []
        # the cut is made by the prompt alone
        if given:
            self.logits()
        for _ in range(new_tokens):
            new = self.model.get_input_embeddings()(torch.tensor([ids])).detach() if ids else None
            logits = self.logits(new)[-1]
            logits[banned] = -torch.inf
            ids.append(int(logits.argmax()))
        return ids[len(given) :]


@contextmanager
def masked(
    model: Any,
    kept: dict[int, list[int]],
    merged: dict[int, tuple[list[int], Tensor]],
    policy: str = "original",
) -> Iterator[Any]:
    """A dense eager model with cuts by masks: no token is removed, layers do not see what was dropped before
    them.

    For batches of one prompt (repeated for beams) in every mode of generate with a cache; ``kept`` and
    ``merged`` are those of a Twin. Windows would count dropped tokens, so the layers must not slide.
    """
    decoder = language_model(model)

    def hook(
        index: int, module: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        # before any layer has run: those that share keys with earlier ones hold none of their own
        if index == 0:
            prompt["first"] = int(slots_held(cache_in(kwargs)))
        # the last cut up to this layer
        stage = max((layer for layer in kept if layer <= index), default=None)
        if stage is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        first = prompt["first"]
        mask = kwargs["attention_mask"].clone()  # (B, 1, q, slots)
        # of the first call; later ones are as long as what is new
        prompt.setdefault("length", hidden.shape[1])
        dropped = torch.tensor(sorted(set(range(prompt["length"])) - set(kept[stage])), dtype=torch.long)
        if first == 0 and index in merged:
            at, rows = merged[index]
            hidden = hidden.index_copy(1, torch.tensor(at), rows.expand(hidden.shape[0], -1, -1))
        mask[..., dropped] = torch.finfo(mask.dtype).min
        changed = {name: value for name, value in kwargs.items() if name != "hidden_states"} | {
            "attention_mask": mask
        }
        if policy == "compact":
            columns = torch.arange(first, first + hidden.shape[1])
            # a column moves to the left by as many as were dropped before it
            places = (columns - (dropped[:, None] < columns).sum(0))[None]
            changed["position_embeddings"] = angles_by_hand(decoder, index, hidden, places)
        return (hidden, *args[1:]), changed

    prompt: dict[str, int] = {}
    handles = [
        layer.register_forward_pre_hook(partial(hook, index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
