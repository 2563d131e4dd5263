# SPDX-License-Identifier: Apache-2.0
"""The slot inside the language model: cuts at the input of layers, ranked by what a layer attends to.

A cut at layer L drops tokens from the sequence that enters L; all later layers get a view of their own (mask,
positions, cache slots). Tokens are ranked by what is read of layer L - 1, which has run, or of L itself,
which is started on the uncut sequence as far as its attention.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.budget import Budget
from ...core.method import CutPoint, Merged, Method
from ...core.select import choose
from ...core.tokens import VisualTokens
from ...errors import InvariantError, UnsupportedError
from ..attention_call import AttentionCall, compared_forms
from ..attention_tap import probe, tap
from ..sequence.beside import check_aligned, follow_beside
from ..sequence.cache import cache_in, cache_name
from ..sequence.compaction import Compaction
from ..sequence.masks import check_kinds, uses_flash
from ..sequence.text import without_skipped
from ..state import ForwardState
from . import Attachment, Handle, all_or_none
from .cutting import drop_columns
from .landing import land
from .ranking import ATTENTION, LayerTokens, Ranked, asked_for, asks_the_question, read, tokens_of
from .spans import InsideRecord, Span, apply_choice

_DOES = "cuts inside the language model"


class InsideLM:
    """Runs the cuts of one method inside the language model."""

    in_tower: ClassVar[bool] = False

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        self.attachment, self.budget = attachment, budget
        if budget is not None and budget.scope != "image":
            raise UnsupportedError(
                f"{method.name} spends its budget per image: write '@{budget.keep}' instead of '@{budget}'"
            )
        if attachment.frames:
            raise UnsupportedError(
                f"{method.name} cuts inside the language model, where every image has a budget of its own: "
                "frames that are images to the model (frames=True) are no clip there; use a method before "
                "the language model, such as 'evs@0.25'"
            )
        self.language_model, self.depth = attachment.adapter.language_model, attachment.depth
        check_aligned(attachment.adapter, method.name)
        self._known: dict[int, tuple[CutPoint, ...]] = {}  # cuts of a picture, by its number of tokens
        # any count will do to ask for layers, but a number to keep must fit into it
        count = budget.keep if budget is not None and isinstance(budget.keep, int) else 576
        self.method = method = land(attachment, method, budget, count)
        self.sources = {point.layer: point.source for point in self._points(count)}
        self.layers = list(self.sources)
        self.wanted = asked_for(method)
        self.reads_attention = any(what in self.wanted for what in ATTENTION)
        self.policy = attachment.policy(method)
        # the method chooses its queries
        self.by_choice = getattr(method.raters, "__func__", None) is not Method.raters
        self.by_question = asks_the_question(method)
        later = range(min(self.layers, default=self.depth), self.depth)
        check_kinds(self.language_model.config, later, method.name)
        attachment.refuse_checkpointing(self.language_model, method, _DOES)

    def _points(self, count: int) -> tuple[CutPoint, ...]:
        if (found := self._known.get(count)) is None:
            found = self._known[count] = self.method.cuts(self.depth, self.budget, count)
        return found

    def _leaving(self, state: ForwardState, index: int) -> list[tuple[Span, int]]:
        """Pictures that lose tokens at the input of a layer, and how many tokens of each go on."""
        found = []
        for span in state.tracked.spans:
            points = {point.layer: point.keep for point in self._points(span.picture.count)}
            if index not in points:
                raise InvariantError(
                    f"{self.method.name} cuts a picture of {span.picture.count} tokens at layers "
                    f"{list(points)}, and others at {self.layers}; the number of tokens may change what cuts "
                    "keep, but not their layers"
                )
            if points[index] < span.count:
                found.append((span, points[index]))
        return found

    def hooks(self) -> list[Handle]:
        """Pre-hooks on all decoder layers, and taps on the attention that ranks."""
        layers = self.language_model.layers
        found: list[Handle] = [
            layer.register_forward_pre_hook(partial(self._layer, index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]
        with all_or_none(found):
            for index in sorted({source for source in self.sources.values() if source is not None}):
                found.append(tap(layers[index], index, self.method.name, partial(self._attended, index)))
        return found

    def missed(self, state: ForwardState) -> set[int]:
        return set() if state.inside is None else set(self.layers) - state.inside.done

    def enter(self, state: ForwardState) -> None:
        """Find the tokens of every picture in the sequence that enters the first layer."""
        if not state.placements:
            return
        # it may have been enabled since
        self.attachment.refuse_checkpointing(self.language_model, self.method, _DOES)
        keep = None if self.budget is None else self.budget.keep
        spans, number = [], 0
        compaction = state.views.cuts[0][1] if state.views.cuts else None
        for placement in state.placements:
            for picture in placement.pictures:
                if self.attachment.strict and isinstance(keep, int) and keep > picture.count:
                    raise InvariantError(
                        f"strict: keep={keep} tokens but a picture holds {picture.count}; lower keep or drop "
                        "strict"
                    )
                self.method.check_unit(picture.count)
            shown: set[int] = set()
            ordinals: dict[int, int] = defaultdict(int)
            for row, p, start in placement.spans:
                picture = placement.pictures[p]
                ids = state.kept_patches(number + p, picture)
                if ids is None and picture.special is None:
                    columns = placement.columns(row, start, picture.length)
                else:
                    patches = torch.arange(picture.count) if ids is None else ids
                    columns = placement.columns(row, start, picture.slots_of(patches.to(state.embeds.device)))
                if compaction is not None:
                    columns = compaction.moved(row, columns)
                spans.append(Span(row, columns, ids, number + p, p not in shown, ordinals[row], picture))
                spans[-1].take(state.picture_cuts[number + p] if state.picture_cuts else None)
                shown.add(p)
                ordinals[row] += 1
            number += len(placement.pictures)
        lengths = state.columns.lengths
        if lengths is not None and compaction is not None:
            lengths = compaction.lengths(lengths)
        state.inside = state.tracked = InsideRecord(spans, None, lengths)
        if self.by_choice or self.by_question:
            raters, queries = self._raters(state, spans)
            state.tracked.raters, state.tracked.queries = raters, max(1, queries)

    def _raters(self, state: ForwardState, spans: Sequence[Span]) -> tuple[Tensor, int]:
        """(B, n) bool, columns that the method ranks by, and the most that a row has, or a number that is not
        smaller.
        """
        embeds, valid = state.embeds, state.views.at(0).new
        text = state.views.follow(state.text_after_pictures(), 0) & valid
        text &= torch.arange(text.shape[1], device=text.device) < text.shape[1] - state.generated
        if self.method.skips:
            text = without_skipped(state, text, self.method)
        if not self.by_choice:
            return text, int(text.sum(dim=1).max())
        here, raters = text.cpu(), torch.zeros_like(text)  # one wait for all rows
        for row in range(text.shape[0]):
            own = [span for span in spans if span.row == row]
            columns = here[row].nonzero()[:, 0].to(text.device)
            if own and columns.shape[0]:
                visual = torch.cat([embeds[row, span.columns] for span in own])
                chosen = self.method.raters(embeds[row, columns], visual)  # (T,) bool
                raters[row, columns] = True if chosen is None else chosen
        # how many of the text were chosen would be asked of a device once more
        counts = (raters if raters.device.type == "cpu" else here).sum(dim=1)
        return raters, int(counts.max())

    # --- one layer --------------------------------------------------------------------------------

    def _layer(
        self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        state = self.attachment.state()
        if state is None or not state.viewed:
            return None
        # in decode steps nothing is tracked, but layers behind a cut still need their view
        cuts = state.inside is not None and index in self.sources
        if not cuts and state.views.at(index).start == 0:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if state.inside is not None and cuts:
            if self.sources[index] == index and self._leaving(state, index):
                state.inside.ranked = self._probe(state, index, module, hidden, kwargs)
            hidden = self._cut(state, index, hidden, self._angles(state, index, hidden, kwargs))
        if len(args) > 1 or self.attachment.adapter.beside:
            args, kwargs = follow_beside(state.views, index, module, args, kwargs, self.attachment.adapter)
        return (hidden, *args[1:]), self._as_viewed(state, index, hidden, kwargs)

    def _as_viewed(
        self, state: ForwardState, index: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The keyword arguments of a layer with mask, angles and positions of its view."""
        view, config = state.views.at(index), self.language_model.config
        if view.start == 0:
            return kwargs
        kwargs = {**kwargs, "attention_mask": view.mask(config, index, hidden, cache_in(kwargs))}
        own = view.position_ids is state.views.at(0).position_ids  # the model made its angles of these
        if kwargs.get("position_embeddings") is not None and not own:
            kwargs["position_embeddings"] = state.views.angles(self.language_model, index, hidden)
        # Ministral 3 scales its queries by them; FlashAttention would take gaps for packed sequences
        kwargs["position_ids"] = None if uses_flash(config) else view.plain_positions
        if "cache_position" in kwargs:
            kwargs["cache_position"] = torch.arange(view.held.shape[1], view.width, device=hidden.device)
        return kwargs

    def _angles(
        self, state: ForwardState, index: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """(B or 1, n, d) cos and sin of what enters a layer; () where a model keeps them in another form."""
        given: Any = kwargs.get("position_embeddings")
        view = state.views.at(index)
        if given is not None and view.position_ids is not state.views.at(0).position_ids:
            given = view.angles(self.language_model, index, hidden)
        known = isinstance(given, tuple) and all(
            isinstance(one, Tensor)
            and one.ndim == 3
            and one.shape[:2] in ((1, hidden.shape[1]), hidden.shape[:2])
            for one in given
        )
        return given if known else ()

    # --- attention rows ---------------------------------------------------------------------------

    @torch.compiler.disable
    @torch.no_grad()
    def _probe(
        self, state: ForwardState, index: int, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Ranked:
        """What a layer says before it runs: what that ranks is cut at its input."""
        view = state.views.at(index)
        kwargs = self._as_viewed(state, index, hidden, kwargs)
        keyword = cache_name(kwargs) if cache_in(kwargs) is not None else None
        last = "lm_received" not in self.wanted and self._last_alone(state, index)
        attended = probe(module, hidden, kwargs, keyword, view.held.shape[1], last)
        queries = self._queries(state, index)
        attention = self._rows(state, index, attended, queries[0])
        return read(attended, queries, attention, self.wanted, state.tracked.spans, view.width)

    def _attended(self, index: int, attended: AttentionCall, output: Tensor) -> None:
        state = self.attachment.state()
        if state is not None and state.inside is not None:
            self._rank(state, index, attended, output)

    @torch.compiler.disable
    @torch.no_grad()
    def _rank(self, state: ForwardState, index: int, attended: AttentionCall, output: Tensor) -> None:
        """A layer that ranks has attended: its rows are checked, and kept for the cut at the next layer."""
        ranks_next = self.sources.get(index + 1) == index
        if ranks_next and not self._leaving(state, index + 1):
            return
        known = compared_forms(attended, state.checks)
        if not ranks_next and attended.form in known:
            return
        rows, real = self._queries(state, index)
        if not ranks_next:
            rows, real = rows[:, -1:], None if real is None else real[:, -1:]
        attention = self._rows(state, index, attended, rows)
        if attention is not None:
            last_real, last = None if real is None else real[:, -1:], attention[:, :, -1:]
            attended.check(rows[:, -1:], last_real, last, output, state.checks, known)
        if ranks_next:
            slots, spans = state.views.at(index).width, state.tracked.spans
            state.tracked.ranked = read(attended, (rows, real), attention, self.wanted, spans, slots)

    def _rows(self, state: ForwardState, index: int, attended: AttentionCall, rows: Tensor) -> Tensor | None:
        """(B, H, R, S) attention of queries (B, R), where the method reads any."""
        call = attended.of_last() if self._last_alone(state, index) else attended
        return call.attention(rows) if self.reads_attention else None

    def _last_alone(self, state: ForwardState, index: int) -> bool:
        """Whether the last column alone asks and all are tokens, known without asking a device."""
        return state.tracked.raters is None and state.views.at(index).maskless and not state.generated

    def _queries(self, state: ForwardState, index: int) -> tuple[Tensor, Tensor | None]:
        """Query columns (B, R) of every row, real ones last, and which of them are real (B, R)."""
        last = state.views.at(index).last_of_prompt(state.generated)
        raters = state.tracked.raters
        if raters is None:
            return last, None
        order = raters.to(torch.int8).argsort(dim=1, stable=True)[:, -state.tracked.queries :]
        real = raters.gather(1, order)
        none = ~real[:, -1:]  # rows without a rater
        order = torch.where(none, last, torch.where(real, order, order[:, -1:]))
        return order, torch.cat([real[:, :-1], real[:, -1:] | none], dim=1)

    # --- the cut ----------------------------------------------------------------------------------

    @torch.compiler.disable
    def _cut(self, state: ForwardState, index: int, hidden: Tensor, angles: Sequence[Tensor]) -> Tensor:
        """Cut the sequence (B, n, D) that enters layer ``index``, and its rotary angles along with it."""
        started, inside = time.perf_counter(), state.tracked
        # it holds attention of the uncut sequence: nobody must read it after this cut
        ranked, inside.ranked = inside.ranked, None
        groups: dict[tuple, list[Span]] = defaultdict(list)
        for span, keep in self._leaving(state, index):
            groups[(span.count, keep, span.grids)].append(span)
        inside.done.add(index)
        if not groups:
            return hidden
        if self.sources[index] is None:
            ranked = Ranked(*self._queries(state, index))
        if ranked is None:
            raise InvariantError(
                f"{self.method.name} cuts at layer {index}, but the attention of layer {self.sources[index]} "
                "was not seen; was a part of the model compiled, or its forward replaced, after attaching? "
                "Detach, and attach again"
            )
        batch, length = hidden.shape[:2]
        dropped, gone = [0] * batch, []
        for (count, k, _), spans in groups.items():
            gone += [span.flat(length) for span in spans]
            result: Tensor | Merged | Sequence[Tensor]
            if k == 0:
                result = torch.empty(len(spans), 0, dtype=torch.long, device=hidden.device)
            else:
                result = self._choose(self._tokens(state, index, spans, hidden, ranked), k, state)
            hidden = apply_choice(spans, result, hidden)
            for span in spans:
                dropped[span.row] += count - span.count
        kept = [span.flat(length) for spans in groups.values() for span in spans]
        lengths = inside.lengths or [length] * batch
        if min(have - drop for have, drop in zip(lengths, dropped, strict=True)) < 1:
            raise InvariantError(
                f"{self.method.name} keeps no visual token behind layer {index}, and a prompt of this call "
                "holds nothing else: there is nothing left to read; ask something about the picture"
            )
        policy, view = self.policy, state.views.at(index)
        # positions that are counted again turn otherwise
        turned = angles if policy == "original" else ()
        compaction = drop_columns(view, inside.lengths, (gone, kept), dropped, [hidden, *turned], policy)
        if inside.lengths is not None:
            inside.lengths = [have - drop for have, drop in zip(inside.lengths, dropped, strict=True)]
        if not compaction.is_even:
            state.refuse_dead_slots(compaction, self.attachment.spec)
        state.views.cut(index, compaction, policy)
        if turned and compaction.is_even:
            turned = tuple(compaction.sequence(one) for one in turned)
        elif compaction.slides:
            turned = tuple(one[:, : compaction.width] for one in angles)
        if turned and compaction.is_even:
            state.views.at(index).take_angles(self.language_model, index, turned)
        self._follow(state, index, compaction)
        state.report.seconds += time.perf_counter() - started
        self._note(state, index)
        return compaction.sequence(hidden)

    def _choose(
        self, tokens: VisualTokens, k: int, state: ForwardState
    ) -> Tensor | Merged | Sequence[Tensor]:
        """What stays of units of equal length."""
        return choose(self.method, tokens, k, state.checks)

    def _tokens(
        self, state: ForwardState, index: int, spans: Sequence[Span], hidden: Tensor, ranked: Ranked
    ) -> LayerTokens:
        source = self.sources[index]
        source = index if source is None else source
        return tokens_of(
            self.language_model,
            self.wanted,
            ranked,
            spans,
            hidden,
            state.views.at(source).position_ids,
            source=source,
            cut=self.layers.index(index),
            checks=state.checks,
        )

    def _follow(self, state: ForwardState, index: int, compaction: Compaction) -> None:
        """Take all tracked columns through a cut at layer ``index``."""
        inside = state.tracked
        if index != self.layers[-1]:  # after the last cut nobody asks where the tokens stand
            for span in inside.spans:
                span.columns = compaction.moved(span.row, span.columns)
        if inside.raters is not None:
            inside.raters = compaction.follow(inside.raters)

    def _note(self, state: ForwardState, index: int) -> None:
        report = state.report
        for span in state.tracked.spans:
            if span.shown:
                span.tell(report, index)
        report.sequence = (state.new_tokens, state.views.at(index).new.shape[1])
        report.fire("stage")
