# SPDX-License-Identifier: Apache-2.0
"""What ranks the tokens of a cut inside the language model: read where one layer attends, and only what a
method needs.

Letters: B prompts, n columns of this call, S slots of the layer (earlier ones included), R queries, H heads,
Hk key heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...core.deferred import Checks
from ...core.method import Method, What, needs_of
from ...core.select import rows_at
from ...core.tokens import LayerFields, VisualTokens
from ...errors import UnsupportedError
from ..attention_call import AttentionCall, over_slots
from ..sequence.masks import rotary_frequencies
from .spans import Span

ATTENTION = ("text_attention", "text_to_text", "lm_received")
_KEYS = ("lm_keys", "text_keys")
_STATES = ("lm_states", "text_states")
_ROWS_AT_ONCE = 16  # queries whose attention is held together


@dataclass(frozen=True, eq=False)
class Ranked:
    """What was read of one layer; None where the method does not need it.

    Args:
        rows: (B, R) query columns, real ones last.
        real: (B, R) bool, queries and not filling of shorter rows; None: all are queries.
        attention: (B, H, R, S) of the queries.
        keys: (B, S, Hk, d), as the attention function got them.
        received: (B, S), see ``received_by_pictures``.
    """

    rows: Tensor
    real: Tensor | None
    attention: Tensor | None = None
    keys: Tensor | None = None
    received: Tensor | None = None


def asked_for(method: Method) -> frozenset[What]:
    """What a method needs, by name; one that declares nothing ranks by attention."""
    return frozenset(need.what for need in needs_of(method)) or frozenset({"text_attention"})


def asks_the_question(method: Method) -> bool:
    """Whether all text after the last picture queries the tokens."""
    return any(need.text == "question" for need in needs_of(method))


def read(
    call: AttentionCall,
    queries: tuple[Tensor, Tensor | None],
    attention: Tensor | None,
    wanted: Collection[What],
    spans: Sequence[Span],
    slots: int,
) -> Ranked:
    """What a layer of ``slots`` slots says.

    Args:
        queries: their columns (B, R), and which of them are real.
        attention: (B, H, R, S) of them.
    """
    rows, real = queries
    keys = received = None
    if attention is not None:
        attention = over_slots(attention, slots)
    if any(what in wanted for what in _KEYS):
        keys = over_slots(call.keys.transpose(2, 3), slots).permute(0, 3, 1, 2)
    if "lm_received" in wanted:
        received = received_by_pictures(call, spans, slots)
    return Ranked(rows, real, attention, keys, received)


def received_by_pictures(call: AttentionCall, spans: Sequence[Span], slots: int) -> Tensor:
    """(B, S) what every token of a picture gets from the tokens of that picture: the sum over these queries
    of the largest attention of any head.

    Some rows at a time: no n x S map is held.
    """
    # once for all rows, where `attention` would do it for every part of them
    call = call if call.keys.dtype == torch.float32 else replace(call, keys=call.keys.float())
    batch, count = call.queries.shape[0], call.queries.shape[2]
    picture = torch.zeros(batch, count, dtype=torch.long, device=call.queries.device)  # 0: of no picture
    queries = [0] * batch
    for number, span in enumerate(spans, start=1):
        picture[span.row, span.columns] = number
        queries[span.row] += span.columns.shape[0]
    of_slot = nn.functional.pad(picture, (slots - count, 0))  # (B, S)
    visual_last = (picture > 0).to(torch.int8).argsort(dim=1, stable=True)
    total = torch.zeros(batch, slots, device=picture.device)
    for rows in visual_last[:, count - max(queries, default=0) :].split(_ROWS_AT_ONCE, dim=1):
        strongest = over_slots(call.attention(rows).amax(dim=1), slots)  # (B, r, S)
        asking = picture.gather(1, rows)[..., None]  # 0 fills up rows with fewer tokens
        own = (asking == of_slot[:, None]) & (asking > 0)
        total += strongest.masked_fill(~own, 0.0).sum(dim=1)
    return total


@dataclass(frozen=True, eq=False)
class Units:
    """Where U units of N tokens stand in a batch.

    Args:
        rows: (U,) row of each; None: unit b stands in row b of B.
        at: (U, N) columns.
    """

    rows: Tensor | None
    at: Tensor

    def of_row(self, value: Tensor) -> Tensor:
        """(U, ...) of what there is of every row (B, ...)."""
        return value if self.rows is None else value[self.rows]

    def take(self, value: Tensor, held: int = 0) -> Tensor:
        """(U, N, *) of what every slot (B, S, *) has, the first ``held`` of them from before this call."""
        return rows_at(self.of_row(value), self.at + held if held else self.at)


class LayerTokens(VisualTokens):
    """Tokens at a cut: what few methods read is gathered when it is first asked for."""

    _gathered: Mapping[str, Callable[[], Any]]  # what each gives is said by its property

    def gathering(self, later: Mapping[str, Callable[[], Any]]) -> LayerTokens:
        """These tokens with fields that are given by what gathers them; for who has just made the tokens."""
        held = vars(self)
        for name in later:
            del held[name]
        held["_gathered"] = later
        return self

    def with_fields(self, **fields: Any) -> LayerTokens:
        """The same with some fields set."""
        made = object.__new__(type(self))
        vars(made).update(vars(self), **fields)
        return made

    # a value of the instance goes before these, and each leaves its answer there

    @cached_property
    def features(self) -> Tensor:
        return self._gathered["features"]()

    @cached_property
    def positions(self) -> Tensor:
        return self._gathered["positions"]()

    @cached_property
    def query_positions(self) -> Tensor:
        return self._gathered["query_positions"]()

    @cached_property
    def rotary_frequencies(self) -> Tensor | None:
        return self._gathered["rotary_frequencies"]()


def fields_of(ranked: Ranked, wanted: Collection[What], units: Units, length: int) -> LayerFields:
    """Fields of VisualTokens for some units.

    Args:
        length: n, columns of this call; the slots before them are earlier ones.
    """
    found: LayerFields = {}
    asking = (
        units if ranked.attention is None and ranked.keys is None else Units(None, units.of_row(ranked.rows))
    )
    if ranked.attention is not None:
        held = ranked.attention.shape[-1] - length
        attention = units.of_row(ranked.attention)  # (U, H, R, S)
        found["text_attention"] = _columns_of(attention, units.at + held if held else units.at)
        if "text_to_text" in wanted:
            found["text_to_text"] = _columns_of(attention, asking.at + held)
    if ranked.keys is not None:
        held, keys = ranked.keys.shape[1] - length, units.of_row(ranked.keys)
        found["lm_keys"] = Units(None, units.at).take(keys, held)
        found["text_keys"] = asking.take(keys, held)
    if ranked.received is not None:
        found["lm_received"] = units.take(ranked.received, ranked.received.shape[1] - length)
    return found


def _columns_of(attention: Tensor, at: Tensor) -> Tensor:
    """(U, H, R, N) of the slots ``at`` (U, N)."""
    return attention.gather(3, at[:, None, None].expand(-1, attention.shape[1], attention.shape[2], -1))


def states_of(
    language_model: nn.Module,
    hidden: Tensor,
    ranked: Ranked,
    units: Units,
) -> LayerFields:
    """Normalised hidden states (B, n, D) of the same units, and of the text that queries them."""
    # the second name is that of LFM2 and LFM3, where it stands behind the layers all the same
    names = ("norm", "embedding_norm")
    norm = next((getattr(language_model, name) for name in names if hasattr(language_model, name)), None)
    if norm is None:
        raise UnsupportedError(
            f"{type(language_model).__name__} has no final norm by the names {list(names)}, which this "
            "method reads hidden states through; use a method that ranks by attention, e.g. 'fastv@64'"
        )
    # tokens and text go through the norm together: one launch
    places = torch.cat([units.at, units.of_row(ranked.rows)], dim=1)
    states = norm(Units(units.rows, places).take(hidden))
    count = units.at.shape[1]
    return {"lm_states": states[:, :count], "text_states": states[:, count:]}


def tokens_of(
    language_model: nn.Module,
    wanted: Collection[What],
    ranked: Ranked,
    spans: Sequence[Span],
    hidden: Tensor,
    position_ids: Tensor,
    *,
    source: int,
    cut: int,
    checks: Checks,
) -> LayerTokens:
    """The tokens of spans of equal length, a unit each, in a sequence (B, n, D) with its positions.

    Args:
        source: the layer that ranks.
        cut: number of the cut.
    """
    rows, columns = [span.row for span in spans], [span.columns for span in spans]
    at = columns[0][None] if len(columns) == 1 else torch.stack(columns)  # (U, N)
    # one picture in every row, the usual case: nothing has to be gathered by row
    in_order = rows == list(range(hidden.shape[0]))
    units = Units(None if in_order else torch.tensor(rows, device=hidden.device), at)
    found = fields_of(ranked, wanted, units, hidden.shape[1])
    if any([what in wanted for what in _STATES]):
        found.update(states_of(language_model, hidden, ranked, units))
    tokens = LayerTokens.of(
        {},
        [span.ordinal for span in spans],
        **found,
        query_mask=None if ranked.real is None else units.of_row(ranked.real),
        grids=spans[0].grids,
        size=(at.shape[0], at.shape[1]),
        like=hidden,
        cut=cut,
        checks=checks,
    )
    later: dict[str, Callable[[], Any]] = {"features": lambda: units.take(hidden)}
    if position_ids.ndim == 2:  # M-RoPE knows no single position
        plain = position_ids.expand(hidden.shape[0], -1)
        later["positions"] = lambda: units.of_row(plain).gather(1, at)
        later["query_positions"] = lambda: units.of_row(plain.gather(1, ranked.rows))
        later["rotary_frequencies"] = lambda: rotary_frequencies(language_model, source)
    return tokens.gathering(later)
