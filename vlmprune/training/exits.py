# SPDX-License-Identifier: Apache-2.0
"""Training of DyVTE's gates: behind which layer does the answer stay what it was without the picture?

A gate behind layer i learns to say "leave" where the model, of which all visual tokens leave there, predicts
the tokens of the answer as the dense model does, with

    loss < 1.03 loss of the dense model + slack.

What a gate reads and what it should say do not depend on the gates. So both are found out once, before the
first step, and written down, a file for so many questions; an interrupted call goes on behind the last file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..api import prune
from ..errors import SpecError
from ..methods.dyvte import gate_features, gate_logits
from .data import NO_LOSS, Exercise, batch_of, question_columns, visual_of
from .frozen import OfFrozen

RATIO = 1.03  # of the losses, as published
SLACK = 0.02  # nats, ours: a share of next to nothing is nothing
AGREE = 0.99  # share of the tokens of an answer that have to be predicted alike
SAME = 0.98  # share of the other questions whose answer has to stay, by which the margin is chosen
MARGINS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
PART = 128  # questions in a file
FIELDS = ("features", "same", "loss", "dense")


@dataclass(frozen=True, eq=False)
class Looks:
    """What is known of n questions at G gates.

    Args:
        features: (n, G, 2D) what a gate reads.
        same: (n, G) bool, the answer without visual tokens behind the gate is the dense one.
        loss, dense: (n, G) and (n,) its loss, and that of the dense model.
    """

    features: Tensor
    same: Tensor
    loss: Tensor
    dense: Tensor

    @property
    def leave(self) -> Tensor:
        """(n, G) bool, what the gates should say."""
        return self.same & (self.loss < RATIO * self.dense[:, None] + SLACK)


class ExitTraining(OfFrozen):
    """What the loop trains for DyVTE.

    Args:
        model, processor: the model, which stays frozen.
        keep: no budget can be given: all visual tokens leave at once.
        width: of the gates; None: 2048 as published, or half the width of a small model.
        seed: of the first weights.
    """

    method = "dyvte"
    budgeted = False

    def __init__(self, model: Any, processor: Any, keep: int | None, width: int | None, seed: int) -> None:
        if keep is not None:
            raise SpecError(
                f"keep={keep}; dyvte takes no budget, since all its tokens leave at once; leave it out"
            )
        super().__init__(model, processor, seed)
        self.gates = list(range(self.adapter.depth - 1))  # behind the last layer there is nothing to save
        self.width = min(2048, self.wide // 2) if width is None else width
        shapes = {"w1": (self.width, 2 * self.wide), "w2": (2, self.width)}
        self.module = self.parameters(
            (f"gate.{gate}.{name}", nn.init.xavier_uniform_(torch.empty(shape)))
            for gate in self.gates
            for name, shape in shapes.items()
        )
        self.places: dict[Exercise, int] = {}
        self.looks: Looks | None = None
        self.layers = 1.0  # that read visual tokens, on average over questions

    @property
    def settings(self) -> dict[str, Any]:
        """What the file says of the training beside the settings of the loop."""
        return {"width": self.width, "ratio": RATIO, "slack": SLACK, "agree": AGREE, "same": SAME}

    def prepare(self, asked: Sequence[Exercise], folder: Path, batch: int) -> None:
        """Look at all questions, or read what was found out about them."""
        folder.mkdir(parents=True, exist_ok=True)
        parts = []
        for start in range(0, len(asked), PART):
            some = list(asked[start : start + PART])
            parts.append(self._part(folder / f"looks-{start:06d}.safetensors", some, batch))
        self.looks = Looks(*(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS))
        self.places = {one: place for place, one in enumerate(asked)}

    def _part(self, path: Path, asked: Sequence[Exercise], batch: int) -> Looks:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file

        told = json.dumps([self.gates, self.model_digest, [[one.question, one.answer] for one in asked]])
        digest = hashlib.sha256(told.encode()).hexdigest()
        if path.is_file():
            try:
                with safe_open(path, "pt") as held:
                    if (held.metadata() or {}).get("questions") == digest:
                        return Looks(**{name: held.get_tensor(name) for name in FIELDS})
            except (OSError, SafetensorError, TypeError) as error:
                raise SpecError(
                    f"{str(path)!r} cannot be read ({error}); delete it, or give another --out"
                ) from error
            raise SpecError(
                f"{str(path)!r} is about other questions, or another model; use the same, or give another "
                "--out"
            )
        found = [self.look(asked[start : start + batch]) for start in range(0, len(asked), batch)]
        whole = {name: torch.cat([getattr(one, name) for one in found]) for name in FIELDS}
        part = path.with_suffix(".part")  # there whole, or not at all
        save_file(whole, part, {"questions": digest})
        part.replace(path)
        return Looks(**whole)

    @torch.no_grad()
    def look(self, asked: Sequence[Exercise]) -> Looks:
        """The dense model, and then the model with each fixed exit, on a batch of questions."""
        inputs, labels = batch_of(self.model, self.processor, asked)
        visual, _ = visual_of(self.adapter, inputs["input_ids"], 0)
        question = question_columns(visual, inputs["attention_mask"].bool(), labels)
        features: list[list[Tensor]] = []

        def read(module: Any, args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # row by row: questions have different lengths
            rows = [gate_features(hidden[row, question[row]][None])[0] for row in range(len(hidden))]
            features.append(rows)

        layers = self.language_model.layers
        handles = [layers[gate].register_forward_hook(read) for gate in self.gates]
        try:
            dense = self.model(**inputs, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        said, loss = _answers(dense, labels)
        same, losses = [], []
        for gate in self.gates:
            with prune(self.model, f"dyvte(exit={gate})"):
                own, short = _answers(self.model(**inputs, use_cache=False).logits, labels)
            # own and said are (B, L - 1), so the labels are shifted too
            alike = ((own == said) & (labels[:, 1:] != NO_LOSS)).sum(dim=1) / (labels != NO_LOSS).sum(dim=1)
            same.append(alike > AGREE)
            losses.append(short)
        # (B, G, 2D); hooks ran in the order of the gates
        stacked = torch.stack([torch.stack(rows) for rows in features], dim=1)
        found = (stacked, torch.stack(same, dim=1), torch.stack(losses, dim=1), loss)
        return Looks(*(one.cpu() for one in found))

    def loss(self, asked: list[Exercise], progress: float) -> Tensor:
        """Cross entropy of what all gates say of questions that were looked at."""
        looks, places = self._known(asked)
        device = self.model.device
        wanted = looks.leave[places].long().to(device)  # (B, G)
        return F.cross_entropy(self.logits(looks.features[places].to(device)).flatten(0, 1), wanted.flatten())

    def logits(self, features: Tensor) -> Tensor:
        """(B, G, 2) what the gates say of features (B, G, 2D)."""
        w = self.tensors()
        said = [
            gate_logits(features[:, place], w[f"gate.{gate}.w1"], w[f"gate.{gate}.w2"])
            for place, gate in enumerate(self.gates)
        ]
        return torch.stack(said, dim=1)

    def _known(self, asked: Sequence[Exercise]) -> tuple[Looks, Tensor]:
        if self.looks is None:
            raise SpecError("no question was looked at yet; call prepare first")
        return self.looks, torch.tensor([self.places[one] for one in asked])

    def facts(self, asked: Sequence[Exercise] | None) -> dict[str, Any]:
        """Gates and margin: the lowest one that leaves enough answers of other questions as they were."""
        said: dict[str, Any] = {"gates": self.gates, "margin": 0.0}
        if asked is None:
            return said
        looks, places = self._known(asked)
        with torch.no_grad():
            z = self.logits(looks.features[places].to(self.model.device)).cpu()
        # how much "leave" is ahead of "stay", (n, G)
        ahead, same = z[..., 1] - z[..., 0], looks.same[places]
        table = [margin_row(ahead, same, self.gates, margin) for margin in MARGINS]
        # margins ascend: the first good one reads the fewest layers
        good = [row for row in table if row["same"] >= SAME]
        best = good[0] if good else table[-1]
        shares = looks.leave[places].float().mean(dim=0).tolist()
        self.layers = best["layers"]
        return {
            **said,
            "margin": best["margin"],
            "margins": table,
            "leave": [round(one, 4) for one in shares],
        }

    def rivals(self, keep: int | None) -> dict[str, str]:
        """Fixed exits at about as many layers with visual tokens: the one below, and the one above."""
        # an exit behind layer i means i + 1 layers
        below = min(max(int(self.layers) - 1, 0), self.gates[-1])
        exits = sorted({below, min(below + 1, self.gates[-1])})
        return {f"exit={layer}": f"dyvte(exit={layer})" for layer in exits}


def margin_row(ahead: Tensor, same: Tensor, gates: Sequence[int], margin: float) -> dict[str, float]:
    """Share of same answers, and mean layers that read visual tokens, at a margin; z_1 - z_0 is (n, G)."""
    leave = ahead > margin
    # argmax of ones and zeros is the first one, or 0 where there is none
    any_, first = leave.any(dim=1), leave.int().argmax(dim=1)
    kept = torch.where(any_, same.gather(1, first[:, None])[:, 0], True)
    # behind gate i, i + 1 layers have read them; without an exit all do, one more than gates
    layers = torch.where(any_, torch.tensor(gates)[first] + 1, gates[-1] + 2)
    return {
        "margin": margin,
        "same": round(float(kept.float().mean()), 4),
        "layers": round(float(layers.float().mean()), 4),
    }


def _answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L - 1) most likely next tokens, and (B,) mean loss of the answers, of logits (B, L, V)."""
    ahead, wanted = logits[:, :-1].float(), labels[:, 1:]
    loss = F.cross_entropy(ahead.transpose(1, 2), wanted, ignore_index=NO_LOSS, reduction="none")
    return ahead.argmax(dim=-1), loss.sum(dim=1) / (wanted != NO_LOSS).sum(dim=1)
