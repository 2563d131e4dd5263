# SPDX-License-Identifier: Apache-2.0
"""Attention of the last row to the patches of one picture, step by step, while a model generates.

Nothing of the model is changed: taps read one row per layer and step. Tokens that a method cut have 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..api import prune
from ..errors import UnsupportedError
from ..hooks.attention_call import AttentionCall, over_slots
from ..hooks.attention_tap import tap
from ..hooks.patches import PatchedMethod
from ..hooks.session import Session
from ..hooks.state import ForwardState
from ..models import adapter_for


class Watch:
    """What some layers attend to, of one prompt with one picture.

    Args:
        session: what is attached to the model; it knows where the patches are.
        layers: decoder layers.
    """

    def __init__(self, session: Session, layers: Sequence[int]) -> None:
        self.session, self.layers = session, list(layers)
        self.grid: tuple[int, int] = (0, 0)
        self.view = "stretch"
        self.count = 0
        self._steps: list[dict[int, Tensor]] = []
        self._patches: dict[int, Tensor] = {}  # per layer (slots,) patch that stands there, -1 for none

    def attention(self) -> Tensor:
        """(T, layers, N) of every step, mean over heads, on the CPU."""
        return torch.stack([torch.stack([step[layer] for layer in self.layers]) for step in self._steps])

    @torch.no_grad()
    def see(self, layer: int, call: AttentionCall, output: Tensor) -> None:
        """Note what the last row of a call gives each patch."""
        # the tap was called outside of a forward of the session
        state = self.session.state
        if state is None:
            return
        if state.placements:  # the prompt with the picture; decode steps find what was noted for it
            self._place(state, layer)
        if layer not in self._patches:
            return
        # (1, 1)
        last = torch.full((1, 1), call.queries.shape[2] - 1, device=call.queries.device)
        row = call.attention(last)[0, :, 0].mean(dim=0)  # (S,)
        if layer == self.layers[0]:  # layers run in order: the lowest one begins a step
            self._steps.append({})
        patches = self._patches[layer].to(row.device)
        width = patches.shape[0] + len(self._steps) - 1  # every step has added a slot
        row = over_slots(row, width)[: patches.shape[0]]  # slots of the answer hold no patches
        there = patches >= 0
        seen = torch.zeros(self.count, device=row.device)
        # on the CPU: there is one for every layer and step
        self._steps[-1][layer] = seen.index_put((patches[there],), row[there]).cpu()

    def _place(self, state: ForwardState, layer: int) -> None:
        pictures = [picture for placement in state.placements for picture in placement.pictures]
        batch = state.columns.visual[0].shape[0]
        if len(pictures) != 1 or batch != 1 or len(pictures[0].grids) != 1:
            raise UnsupportedError(
                f"the map of a picture needs one prompt with one picture of one grid; got {batch} prompts, "
                f"{len(pictures)} pictures and the grids {[list(one.grids) for one in pictures]}; use a "
                "model that reads the picture as one, or smaller pictures"
            )
        (picture,) = pictures
        self.grid, self.view, self.count = picture.grids[0], picture.view, picture.count
        (placement,) = state.placements
        # (1, L) the patch in each column, -1 for text; then what every cut before this layer left of them
        numbers = torch.full((1, state.views.columns), -1, device=state.embeds.device)
        columns = placement.columns(0, 0, picture.slots_of(torch.arange(picture.count)))
        numbers[0, columns.to(numbers.device)] = torch.arange(picture.count, device=numbers.device)
        for start, compaction in state.views.cuts:
            if start <= layer:
                numbers = numbers.gather(1, compaction.index.long().to(numbers.device))
        # slots of earlier turns hold none of these patches
        past = state.views.at(layer).held.shape[1]
        self._patches[layer] = torch.nn.functional.pad(numbers[0], (past, 0), value=-1)


@contextmanager
def watching(model: Any, layers: Sequence[int]) -> Iterator[Watch]:
    """Watch a model, with what is attached to it."""
    session = attached(model)
    if session is None:
        # without pruning a session is needed all the same: it knows where the patches stand
        with prune(model, "dense") as dense, _taps(dense, layers) as watch:
            yield watch
    else:
        with _taps(session, layers) as watch:
            yield watch


@contextmanager
def _taps(session: Session, layers: Sequence[int]) -> Iterator[Watch]:
    watch, decoder = Watch(session, layers), session.adapter.language_model.layers
    made = []
    try:
        for layer in watch.layers:
            made.append(tap(decoder[layer], layer, "refine", partial(watch.see, layer)))
        yield watch
    finally:
        for one in made:
            one.remove()


def attached(model: Any) -> Session | None:
    """The session that is attached to a model."""
    adapter = adapter_for(model)
    for modality in adapter.modalities:
        # a patched method lies in the instance, before that of the class
        found = adapter.inner.__dict__.get(modality.encode)
        if isinstance(found, PatchedMethod):
            return found.session
    return None
