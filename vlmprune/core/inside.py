# SPDX-License-Identifier: Apache-2.0
"""Cuts inside the language model: at the input of chosen decoder layers, ranked by recomputed attention rows.

A stage at layer L drops tokens from the sequence that enters L; all later layers get a frame of their own (mask, positions, cache
group). Scores come from the rows of layer L - 1 or of L itself, as the method says, recomputed for the queries that it names.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvariantError, UnsupportedError
from .attention_tap import AttentionCall, over_slots, probe, tap
from .base import Merged
from .cache import cache_in, cache_name
from .call import Call
from .compaction import Compaction
from .cutting import Cut, keep_maps
from .entrance import refuse_dead_slots_in_states
from .frames import check_kinds, rotary_frequencies, uses_flash
from .select import choose
from .tokens import VisualTokens


@dataclass(eq=False)
class Span:
    """The tokens of one picture that are still there, in one row of the batch."""

    row: int
    columns: Tensor  # (n,) ascending columns of the current sequence
    ids: Tensor  # (n,) patch number in the picture, -1 for merged rows
    count: int  # tokens before any cut
    report: int | None  # number of the picture in the report, for the first row that shows it
    ordinal: int
    grids: tuple[tuple[int, int], ...]  # of all ``count`` tokens

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """The blocks that the tokens still form: all of the picture's, or none once some are cut."""
        return self.grids if self.ids.shape[0] == self.count else ()


@dataclass(eq=False)
class Inside:
    """What cuts inside the language model know in one call."""

    spans: list[Span]
    text: Tensor  # (B, n) bool, columns after the last picture of each row
    raters: Tensor | None = None  # (B, n) bool, chosen query columns
    ranked: Ranked | None = None  # rows for the next cut
    done: set[int] = field(default_factory=set)  # layers whose cut was made or found unnecessary


@dataclass(frozen=True, eq=False)
class Ranked:
    """Attention rows of one layer for the query columns (B, R), of which some only fill up, over all its slots: (B, H, R, S)."""

    rows: Tensor
    real: Tensor
    attention: Tensor


class InsideHost:
    """Runs the stages of one session's method."""

    def __init__(self, session: Any, method: Any, budget: Any) -> None:
        self.session, self.method, self.budget = session, method, budget
        if budget is not None and budget.scope != "image":
            raise UnsupportedError(f"{method.name} spends its budget per image: write '@{budget.keep}' instead of '@{budget}'")
        count = getattr(budget, "keep", 1.0)  # any count will do to ask for layers, but a number to keep must fit into it
        stages = method.stages(session.depth, budget, count if isinstance(count, int) else 576)
        self.sources = {stage.layer: stage.source for stage in stages}
        self.layers = list(self.sources)
        check_kinds(session.adapter.language_model.config, range(min(self.layers, default=session.depth), session.depth), method.name)
        self._refuse_checkpointing()

    def _refuse_checkpointing(self) -> None:
        language_model = self.session.adapter.language_model
        # read off the modules: transformers renamed the property that says it
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in language_model.modules())
        if language_model.training and recomputes:
            raise UnsupportedError(
                f"{self.method.name} cuts inside the language model, which gradient checkpointing would recompute without cuts; "
                "call model.gradient_checkpointing_disable(), or prune before the language model, e.g. with 'fastervlm@64'"
            )

    def _check(self, count: int) -> None:
        """Refuse a picture of ``count`` tokens that the method or a strict budget cannot take."""
        keep = getattr(self.budget, "keep", None)
        if self.session.strict and isinstance(keep, int) and keep > count:
            raise InvariantError(f"strict: keep={keep} tokens but a picture holds {count}; lower keep or drop strict")
        self.method.check_unit(count)

    def hooks(self) -> list[Any]:
        """Pre-hooks on all decoder layers, and taps on the attention that ranks."""
        layers = self.session.adapter.language_model.layers
        found: list[Any] = [
            layer.register_forward_pre_hook(partial(self._layer, index), with_kwargs=True) for index, layer in enumerate(layers)
        ]
        try:
            for index in sorted(set(self.sources.values())):
                found.append(tap(layers[index], index, self.method.name, partial(self._attended, index)))
        except BaseException:
            for handle in found:
                handle.remove()
            raise
        return found

    @torch.compiler.disable
    def begin(self, call: Call, embeds: Tensor) -> None:
        """Find the spans in the sequence that enters the first layer (B, n, D)."""
        self._refuse_checkpointing()  # it may have been enabled since
        spans, number = [], 0
        last = torch.full((embeds.shape[0],), -1)
        origin = call.compactions[0][1].index.cpu() if call.compactions else None  # (B, n) column before the first cut
        for placed in call.placed:
            for picture in placed.pictures:
                self._check(picture.count)
            columns = [row.nonzero()[:, 0].cpu() for row in placed.visual]
            shown: set[int] = set()
            for row, mine in enumerate(placed.rows):
                start = 0
                for ordinal, p in enumerate(mine):
                    picture = placed.pictures[p]
                    here = columns[row][start : start + picture.length]
                    start += picture.length
                    last[row] = max(int(last[row]), int(here[-1]))
                    slots, ids = picture.patches.cpu(), torch.arange(picture.count)
                    at = here[slots]
                    if origin is not None:  # only what an earlier cut left
                        valid = call.compactions[0][1].valid[row].cpu()
                        where = torch.full((int(call.fed),), -1)
                        where[origin[row][valid]] = valid.nonzero()[:, 0]
                        ids = ids[where[at] >= 0]
                        at = where[at][where[at] >= 0]
                    report = None if p in shown else number + p
                    shown.add(p)
                    spans.append(Span(row, at, ids, picture.count, report, ordinal, picture.grids))
            number += len(placed.pictures)
        full = torch.arange(call.fed)[None] > last[:, None]
        text = (full if origin is None else full.gather(1, origin)).to(embeds.device) & call.frames[0].fed
        call.units = Inside(spans, text)

    def _layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        call = self.session.call
        if call is None or not call.frames:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        inside: Inside | None = call.units
        if inside is not None:
            if index == 0:
                self._find_raters(call, hidden)
            if index in self.sources:
                if self.sources[index] == index:
                    inside.ranked = self._probe(call, index, module, hidden, kwargs)
                hidden = self._stage(call, index, hidden)
        if call.frame(index).start == 0:
            return None
        return (hidden, *args[1:]), self._as_framed(call, index, hidden, kwargs)

    def _as_framed(self, call: Call, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer with mask, angles and positions of its frame."""
        frame, language_model = call.frame(index), self.session.adapter.language_model
        if frame.start == 0:
            return kwargs
        kwargs = dict(kwargs)
        kwargs["attention_mask"] = frame.mask(language_model.config, index, hidden, cache_in(kwargs))
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = frame.angles(language_model, index, hidden)
        # Ministral 3 scales its queries by them; FlashAttention would take gaps for packed sequences
        kwargs["position_ids"] = None if uses_flash(language_model.config) else frame.plain_positions
        if "cache_position" in kwargs:
            kwargs["cache_position"] = frame.cache_position()
        return kwargs

    @torch.compiler.disable
    @torch.no_grad()
    def _probe(self, call: Call, index: int, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Ranked:
        """Attention rows of a layer before it runs: what they rank is cut at its input."""
        frame = call.frame(index)
        kwargs = self._as_framed(call, index, hidden, kwargs)
        cached = cache_in(kwargs) is not None
        attended = probe(module, hidden, kwargs, cache_name(kwargs) if cached else None, frame.past.shape[1])
        rows, real = _padded(call.units.raters)
        return Ranked(rows, real, over_slots(attended.attention(rows), frame.width))

    @torch.compiler.disable
    @torch.no_grad()
    def _attended(self, index: int, attended: AttentionCall, output: Tensor) -> None:
        """A layer that ranks has attended: its rows are checked, and kept for the cut at the next layer."""
        call = self.session.call
        if call is None or call.units is None:
            return
        rows, real = _padded(call.units.raters)
        if self.sources.get(index + 1) != index:
            rows, real = rows[:, -1:], real[:, -1:]
        attention = attended.attention(rows)
        attended.check(rows[:, -1:], real[:, -1:], attention[:, :, -1:], output)
        if self.sources.get(index + 1) == index:
            call.units.ranked = Ranked(rows, real, over_slots(attention, call.frame(index).width))

    @torch.compiler.disable
    def _find_raters(self, call: Call, hidden: Tensor) -> None:
        """Query columns: the method's raters, or the last token of the prompt."""
        inside: Inside = call.units
        fed = call.frames[0].fed
        raters = torch.zeros_like(fed)
        for row in range(fed.shape[0]):
            spans = [span for span in inside.spans if span.row == row]
            prompt = torch.arange(fed.shape[1], device=fed.device) < fed.shape[1] - call.tail
            text = (inside.text[row] & prompt).nonzero()[:, 0]
            chosen = None
            if spans and text.shape[0]:
                visual = torch.cat([hidden[row, span.columns.to(hidden.device)] for span in spans])
                chosen = self.method.raters(hidden[row, text], visual)  # (T,) bool, or None for the last token
            if chosen is not None:
                raters[row, text[chosen]] = True
            else:
                end = text if text.shape[0] else (fed[row] & prompt).nonzero()[:, 0]
                raters[row, end[-1]] = True
        inside.raters = raters

    @torch.compiler.disable
    def _stage(self, call: Call, index: int, hidden: Tensor) -> Tensor:
        """Cut the sequence (B, n, D) that enters layer ``index``."""
        started = time.perf_counter()
        inside: Inside = call.units
        frame = call.frame(index)
        ranked, inside.ranked = inside.ranked, None
        if ranked is None:
            raise InvariantError(
                f"{self.method.name} cuts at layer {index}, but the attention of layer {self.sources[index]} was not seen; "
                "was a part of the model compiled, or its forward replaced, after attaching? Detach, and attach again"
            )
        inside.done.add(index)
        keep = torch.ones_like(frame.fed)
        changed = False
        groups: dict[tuple, list[Span]] = defaultdict(list)
        for span in inside.spans:
            stage = next(s for s in self.method.stages(self.session.depth, self.budget, span.count) if s.layer == index)
            groups[(span.columns.shape[0], stage.keep, span.blocks)].append(span)
        for (count, k, _), spans in groups.items():
            if k >= count:
                continue
            changed = True
            tokens = self._tokens(call, index, spans, hidden, ranked)
            result = choose(self.method, tokens, k)
            hidden = self._apply(spans, result, keep, hidden)
        if not changed:
            return hidden
        compaction = Compaction(keep, frame.fed)
        refuse_dead_slots_in_states(call, compaction, self.session.spec)
        call.cut(index, compaction, self.session.policy(self.method))
        _move(inside, compaction)
        call.report.seconds += time.perf_counter() - started
        self._note(call, index)
        return compaction.sequence(hidden)

    def _tokens(self, call: Call, index: int, spans: list[Span], hidden: Tensor, ranked: Ranked) -> VisualTokens:
        at = torch.stack([span.columns for span in spans]).to(hidden.device)  # (U, N)
        row = torch.tensor([span.row for span in spans], device=hidden.device)  # (U,)
        rows, attention, source = ranked.rows, ranked.attention, self.sources[index]
        past = attention.shape[-1] - hidden.shape[1]
        picked = attention[row].gather(3, (at + past)[:, None, None].expand(-1, attention.shape[1], attention.shape[2], -1))
        places, language_model = call.frame(source).position_ids, self.session.adapter.language_model
        numbers = places.expand(hidden.shape[0], -1)[row] if places.ndim == 2 else None  # M-RoPE knows no single position
        return VisualTokens(
            features=hidden[row[:, None], at],
            text_attention=picked,
            query_mask=ranked.real[row],
            query_positions=None if numbers is None else numbers.gather(1, rows[row]),
            positions=None if numbers is None else numbers.gather(1, at),
            rotary_frequencies=None if numbers is None else rotary_frequencies(language_model, source),
            grids=spans[0].blocks,
            ordinal=torch.tensor([span.ordinal for span in spans]),
            stage=self.layers.index(index),
        )

    def _apply(self, spans: list[Span], result: Tensor | Merged, keep: Tensor, hidden: Tensor) -> Tensor:
        """Mark what stays; merged rows take over the slots of dropped tokens, listed after the kept ones."""
        slots = (result.slots if isinstance(result, Merged) else result).cpu()
        for number, span in enumerate(spans):
            kept = slots[number]
            hosts = kept
            if isinstance(result, Merged):
                free = torch.ones(span.columns.shape[0], dtype=torch.bool)
                free[kept[kept >= 0]] = False
                free = free.nonzero()[:, 0]
                # the last free slots, so that kept rows before them keep their own
                hosts = torch.cat([kept[kept >= 0], free[free.shape[0] - int((kept < 0).sum()) :]]).sort().values
            keep[span.row, span.columns.to(keep.device)] = False
            columns = span.columns[hosts]
            keep[span.row, columns.to(keep.device)] = True
            if isinstance(result, Merged):
                hidden = hidden.clone()
                hidden[span.row, columns.to(hidden.device)] = result.features[number].to(hidden.dtype)
            span.columns = columns
            span.ids = torch.where(kept >= 0, span.ids[kept.clamp_min(0)], -1)
        return hidden

    def _note(self, call: Call, index: int) -> None:
        report = call.report
        for span in call.units.spans:
            if span.report is None:
                continue
            left = report.realised_tokens[span.report] = span.columns.shape[0]
            report.layer_tokens[span.report][index:] = [left] * (self.session.depth - index)
        shown = [span for span in call.units.spans if span.report is not None]
        pictures = [picture for placed in call.placed for picture in placed.pictures]
        left = {span.report: span.ids[span.ids >= 0].sort().values for span in shown}
        cuts = [Cut(torch.empty(0), left[number], picture.grids) for number, picture in enumerate(pictures)]
        report.keep = keep_maps(pictures, cuts, report.method)
        report.sequence = (call.fed, call.frame(index).fed.shape[1])
        report.fire("stage")


def _padded(raters: Tensor) -> tuple[Tensor, Tensor]:
    """Query columns (B, R) of every row and which of them are real (B, R); shorter rows repeat their last query."""
    width = int(raters.sum(dim=1).max())
    order = raters.to(torch.int8).argsort(dim=1, stable=True)[:, raters.shape[1] - width :]  # real ones last, ascending
    real = raters.gather(1, order)
    return torch.where(real, order, order[:, -1:]), real


def _move(inside: Inside, compaction: Compaction) -> None:
    """Follow all tracked columns through a cut."""
    where = (compaction.kept.cumsum(dim=1) - 1 + (compaction.width - compaction.count)[:, None]).cpu()
    for span in inside.spans:
        span.columns = where[span.row][span.columns]
    raters = inside.raters.gather(1, compaction.index) & compaction.valid
    # a prompt that ends in its picture: where the cut took the query itself, the last token that stays asks from here on
    last = torch.arange(compaction.width, device=raters.device) == compaction.width - 1
    inside.raters = torch.where(raters.any(dim=1, keepdim=True), raters, last & compaction.valid)
    inside.text = inside.text.gather(1, compaction.index) & compaction.valid
