# SPDX-License-Identifier: Apache-2.0
"""Settings of methods that are found out once for a model, from a few pictures with questions.

FitPrune (arXiv:2409.10197): how many visual tokens may leave behind each layer. In every layer tokens are
sorted by what the text gives them, and by what the picture gives them. Of each list the longest beginning may
go without which the tokens still get (1 - alpha) of what they all get from the dense model there; what stands
in both beginnings leaves. The smallest alpha that meets the budget of FLOPs is found by bisection.

AdaptInfer (arXiv:2508.06084): the layers behind which tokens leave. Of the tokens that text attends to most,
the attention summed up over the layers bends once; the layers where most curves bend are taken.

Both are written from descriptions of the official code (FitPrune d28e418, no licence file; AdaptInfer-base
91b1784, Apache-2.0 by its README); no code copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_number, one_of
from ..errors import SpecError, UnsupportedError
from ..hooks.attention_call import AttentionCall
from ..hooks.attention_tap import tap
from ..methods.fitprune import PATCHES
from ..models import adapter_for
from ..models.base import Adapter
from .data import Exercise, batch_of, check_masks, question_columns, visual_of

STEPS = 7  # halvings of alpha: to a hundredth
TOP = 0.1  # share of the tokens whose curves AdaptInfer looks at
SHORTEST = 2  # layers of a part of such a curve


def fitprune_schedule(
    model: Any, processor: Any, asked: Sequence[Exercise], percent: float
) -> tuple[int, ...]:
    """``schedule`` of ``fitprune`` for a model: tokens of 576 that leave behind each layer.

    Args:
        percent: of the FLOPs that visual tokens cost in the language model, how much is to be saved.
    """
    check_number("percent", percent, least=1, most=99)
    prompts = _prompts(model, processor, asked, "fitprune")
    config = prompts[0].adapter.language_model.config
    costs, depth = TokenCosts.of(config), config.num_hidden_layers
    with torch.no_grad():
        # the dense model, of whose attention alpha is a share
        dense = [prompt.run(None, costs, math.inf) for prompt in prompts]
        # bisection: the smallest alpha at which all prompts fit so far is ``high``
        low, high, best = 0.0, 1.0, None
        for _ in range(STEPS):
            alpha = (low + high) / 2
            runs = [
                prompt.run(Loss(alpha, whole), costs, (1 - percent / 100) * costs.whole(prompt.count, depth))
                for prompt, whole in zip(prompts, dense, strict=True)
            ]
            if all(one.fits for one in runs):
                high, best = alpha, runs
            else:
                low = alpha
    if best is None:
        raise SpecError(
            f"percent={percent:g} of the FLOPs cannot be saved on these pictures, whatever attention is "
            "lost; ask for less"
        )
    shares = torch.tensor([one.deleted for one in best]).double() / prompts[0].count  # (n, depth)
    # 1e-6: a whole number must not fall to the next lower one by rounding
    schedule = tuple(int(PATCHES * share + 1e-6) for share in shares.mean(dim=0).tolist())
    if not any(schedule):
        raise SpecError(f"percent={percent:g} of the FLOPs is less than one token of {PATCHES}; ask for more")
    return schedule


def adaptinfer_layers(
    model: Any, processor: Any, asked: Sequence[Exercise], count: int = 3
) -> tuple[int, ...]:
    """``layers`` of ``adaptinfer`` for a model: at most ``count`` where most curves bend, ascending."""
    check_int("count", count, least=1)
    prompts = _prompts(model, processor, asked, "adaptinfer")
    bends: list[int] = []
    with torch.no_grad():
        for prompt in prompts:
            # no costs, no loss: the dense model, watched
            given = torch.stack(prompt.run(None, None, math.inf).given)  # (depth, N)
            best = given.sum(dim=0).topk(max(1, round(TOP * prompt.count))).indices
            bends += [bend_of(curve) for curve in given[:, best].T.tolist()]
    depth = prompts[0].adapter.depth
    # behind the last layer there is nothing to save
    return peaks_of([bends.count(layer) for layer in range(depth - 1)], count)


def bend_of(curve: Sequence[float]) -> int:
    """The last layer of the first part, where the running sum of a curve is cut into two constant parts."""
    total = torch.tensor(curve, dtype=torch.float64).cumsum(dim=0)
    if len(total) < 2 * SHORTEST:
        raise UnsupportedError(
            f"a language model of {len(total)} layers; a curve needs at least {2 * SHORTEST} to bend"
        )

    def apart(part: Tensor) -> float:
        return float((part - part.mean()).square().sum())

    cuts = range(SHORTEST, len(total) - SHORTEST + 1)
    # the cut with the least sum of squares; -1: from a length to the last layer of the part
    return min(cuts, key=lambda cut: apart(total[:cut]) + apart(total[cut:])) - 1


def peaks_of(counts: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many places, ascending, that are higher than the one before and no lower than the next."""
    # zeros on both sides, so that place i is ends[i + 1] and the ends can be peaks
    ends = [0, *counts, 0]
    peaks = [
        place
        for place in range(len(counts))
        if ends[place] < ends[place + 1] >= ends[place + 2] and ends[place + 1] > 0
    ]
    highest = sorted(peaks, key=lambda place: (-counts[place], place))[:most]
    return tuple(sorted(highest))


@dataclass(frozen=True)
class TokenCosts:
    """Multiplications of n visual tokens in a decoder layer: ``linear`` n + ``square`` n * n."""

    linear: float
    square: float

    @classmethod
    def of(cls, config: Any) -> TokenCosts:
        """Of queries, keys, values and output, of scores and sums, and of three matrices behind them."""
        wide, heads = config.hidden_size, config.num_attention_heads
        # some configs have the field and leave it None
        width = getattr(config, "head_dim", None) or wide // heads
        keys = config.num_key_value_heads * width
        return cls(
            # queries and output, keys and values, gate, up and down
            2 * wide * heads * width + 2 * wide * keys + 3 * wide * config.intermediate_size,
            # scores, and sums of values
            2 * heads * width,
        )

    def layer(self, count: float) -> float:
        return self.linear * count + self.square * count * count

    def whole(self, count: int, depth: int) -> float:
        return depth * self.layer(count)


@dataclass(frozen=True, eq=False)
class Loss:
    """What may be lost: a share ``alpha`` of what the ``dense`` model gives the tokens in each layer."""

    alpha: float
    dense: Watched


@dataclass(eq=False)
class Watched:
    """What one pass gave, layer by layer.

    Args:
        given: (N,) what the text gives each token, sum over heads and rows.
        cross, own: sum over the tokens of what text, and picture, give them by their strongest heads.
        deleted: tokens that left.
        fits: whether the pass met its budget.
    """

    given: list[Tensor] = field(default_factory=list)
    cross: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
    spent: float = 0.0
    fits: bool = False


@dataclass(eq=False)
class Prompt:
    """A picture with a question, whose attention is read.

    Args:
        visual, text: (L,) bool, columns of the picture, and of the text behind it.
        count: N, tokens of the picture.
    """

    model: Any
    adapter: Adapter
    method: str
    inputs: dict[str, Any]
    visual: Tensor
    text: Tensor
    count: int

    def run(self, loss: Loss | None, costs: TokenCosts | None, budget: float) -> Watched:
        """A pass in which tokens leave behind each layer until what is left fits the budget; None: dense."""
        made, alive = Watched(), torch.ones(self.count, dtype=torch.bool, device=self.visual.device)
        layers = self.adapter.language_model.layers

        def attends(index: int, call: AttentionCall, output: Tensor) -> Tensor:
            A = self._masked(call, alive)
            self._note(made, A, alive, index, loss)
            left = int(alive.sum())
            # the budget is met once the layers that follow can read all tokens that are left
            if costs is not None:
                made.spent += costs.layer(left)
                made.fits = made.fits or made.spent + (len(layers) - index - 1) * costs.layer(left) <= budget
            if loss is not None and not made.fits:
                alive.logical_and_(self._staying(A, alive, made, loss, index))
            # 0 where the budget is met already
            made.deleted.append(left - int(alive.sum()))
            # the layer goes on with the attention that was changed, so that later ones see the loss
            return call.weigh(A).to(output.dtype)

        handles = [
            tap(layer, index, self.method, partial(attends, index)) for index, layer in enumerate(layers)
        ]
        try:
            self.model(**self.inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return made

    def _masked(self, call: AttentionCall, alive: Tensor) -> Tensor:
        """(1, H, L, L) attention without the tokens that left."""
        length = len(self.visual)
        A = call.attention(torch.arange(length, device=alive.device)[None]).float()
        # (L,), 0 where a visual token has left
        columns = torch.ones(length, device=alive.device).masked_scatter(self.visual, alive.float())
        A = A * columns
        return A / A.sum(dim=-1, keepdim=True).clamp_min(1e-12)

    def _sides(self, A: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) what text and picture give each token by their strongest heads, 0 for those that left."""
        M = A[0].amax(dim=0)[:, self.visual]  # (L, N)
        own = M[self.visual] * alive[:, None]
        return M[self.text].mean(dim=0), own.sum(dim=0) / self.count

    def _note(self, made: Watched, A: Tensor, alive: Tensor, index: int, loss: Loss | None) -> None:
        # only a dense pass is compared with
        if loss is None:
            cross, own = self._sides(A, alive)
            made.cross.append(float(cross.double().sum()))
            made.own.append(float(own.double().sum()))
            made.given.append(A[0][:, self.text][..., self.visual].sum(dim=(0, 1)).cpu())

    def _staying(self, A: Tensor, alive: Tensor, made: Watched, loss: Loss, index: int) -> Tensor:
        """(N,) bool, tokens of which not both sides may be lost; one always stays."""
        cross, own = self._sides(A, alive)
        share = 1 - loss.alpha
        gone = beginning(cross, alive, share * loss.dense.cross[index])
        gone &= beginning(own, alive, share * loss.dense.own[index])
        # products are not negative, so that -1 never wins
        best = (cross * own).masked_fill(~alive, -1.0).argmax()
        gone[best] = False
        return ~gone


def beginning(values: Tensor, alive: Tensor, least: float) -> Tensor:
    """(N,) bool, the most tokens, the lowest first, without which the living still have ``least`` in all."""
    # those that left sort last, behind the total
    held = values.double().masked_fill(~alive, torch.inf)
    order = held.argsort(stable=True)
    lost = held[order].cumsum(dim=0)
    total = lost[int(alive.sum()) - 1]  # of the same sum, so that nothing is left of it without all
    return torch.zeros_like(alive).scatter(0, order, total - lost >= least)


def _prompts(model: Any, processor: Any, asked: Sequence[Exercise], method: str) -> list[Prompt]:
    if not asked:
        raise SpecError(f"{method} is calibrated on pictures with questions, and got none; give some")
    adapter = adapter_for(model)
    check_masks(adapter, f"the settings of {method}")
    found = []
    for one in asked:
        inputs, labels = batch_of(model, processor, [one])
        visual, count = visual_of(adapter, inputs["input_ids"], 1)
        text = question_columns(visual, inputs["attention_mask"].bool(), labels)[0]
        found.append(Prompt(model, adapter, method, inputs, visual[0], text, count))
    if len({prompt.count for prompt in found}) > 1:
        raise UnsupportedError(
            f"pictures of {sorted({prompt.count for prompt in found})} visual tokens; give "
            "pictures of one size"
        )
    return found


CALIBRATED = ("fitprune", "adaptinfer")


def check_calibrated(method: str) -> None:
    """Raise unless a method has settings to find out."""
    one_of("method", method, CALIBRATED)


def spec_for(method: str, model: Any, processor: Any, asked: Sequence[Exercise], wanted: float) -> str:
    """The spec with the settings that were found; ``wanted`` is ``percent``, or ``count`` of the layers."""
    check_calibrated(method)
    if method == "fitprune":
        # Python prints spaces in a tuple: (3, 1) -> (3,1)
        return f"fitprune(schedule={fitprune_schedule(model, processor, asked, wanted)})".replace(" ", "")
    # 0.25 stands for any budget: the layers do not depend on it
    layers = adaptinfer_layers(model, processor, asked, int(wanted))
    return f"adaptinfer(layers={layers})@0.25".replace(" ", "")
