# SPDX-License-Identifier: Apache-2.0
"""Report: what really happened in a call; counts are realised, never announced."""

from __future__ import annotations

from dataclasses import dataclass, field

from .keepmap import KeepMap


@dataclass(repr=False)
class Report:
    """The last call that read images or began a prompt; decode steps that continue it are counted in ``decode_steps``.

    Args:
        method: spec of what was attached.
        keep: one KeepMap per image, one per frame of a clip; expanded beams are listed once.
        dense_tokens: visual tokens per image (or clip) without pruning, newline and [CLS] slots not counted.
        realised_tokens: visual tokens per image that the language model read.
        layer_tokens: visual tokens of every image in each decoder layer.
        sequence: (dense, realised) padded length of the sequence that the decoder layers read.
        firings: how often each hook did its work in this call: encode, enter, exit.
        seconds: host seconds in score + select + reassemble; on an accelerator launches only, not their completion.
        note: why nothing was pruned, where that is so ("no images in this call", "disabled").
    """

    method: str
    keep: list[KeepMap] = field(default_factory=list)
    dense_tokens: list[int] = field(default_factory=list)
    realised_tokens: list[int] = field(default_factory=list)
    layer_tokens: list[list[int]] = field(default_factory=list)
    sequence: tuple[int, int] = (0, 0)
    firings: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    decode_steps: int = 0
    note: str = ""

    @property
    def tokens_per_layer(self) -> list[float]:
        """Mean visual tokens per image in each decoder layer."""
        return [sum(layer) / len(layer) for layer in zip(*self.layer_tokens, strict=True)]

    @property
    def pruned(self) -> bool:
        """Whether any visual token was removed."""
        return self.realised_tokens != self.dense_tokens

    def fire(self, hook: str) -> None:
        self.firings[hook] = self.firings.get(hook, 0) + 1

    def __repr__(self) -> str:
        return f"Report({self})"

    def _repr_html_(self) -> str:
        from ..viz.notebook import facts

        layers = [f"{tokens:g}" for tokens in self.tokens_per_layer]
        rows = {
            "visual tokens of each image": f"{self.realised_tokens} of {self.dense_tokens}",
            "visual tokens in each layer": ", ".join(layers) or "-",
            "sequence": f"{self.sequence[1]} of {self.sequence[0]}",
            "decode steps": self.decode_steps,
            "hooks fired": ", ".join(f"{name} {times}" for name, times in self.firings.items()) or "-",
        }
        return facts(str(self), rows)

    def __str__(self) -> str:
        dense, realised = sum(self.dense_tokens), sum(self.realised_tokens)
        images = f"{len(self.dense_tokens)} image{'' if len(self.dense_tokens) == 1 else 's'}"
        detail = f" ({self.note})" if self.note else ""
        return f"{self.method}: {realised} of {dense} visual tokens in {images}, {self.seconds * 1e3:.1f} ms to choose{detail}"
