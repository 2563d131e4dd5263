# SPDX-License-Identifier: Apache-2.0
"""VisualTokens: all that a method may look at, for a batch of units with the same number of tokens.

A *unit* is what one budget is spent on: an image (default), a crop (tile or frame), or all images of a
sample. B counts units, N the tokens of a unit (patches only: newline and [CLS] embeddings are never tokens),
H attention heads, D the width of the language model, C the width of the vision encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import torch
from torch import Tensor

from ..errors import CaptureError, GridError, SpecError
from .deferred import NOW, Checks, Explain

if TYPE_CHECKING:
    from .method import Need

T = TypeVar("T", bound="VisualTokens")

_TensorField = Literal[
    "features",
    "cls_attention",
    "received_attention",
    "encoder_features",
    "keys",
    "wide_keys",
    "wide_attention",
    "pooling_attention",
    "frame_vectors",
    "cls_features",
    "text_embeds",
    "text_attention",
    "text_to_text",
    "lm_received",
    "lm_keys",
    "lm_states",
    "text_keys",
    "text_states",
    "layer_inputs",
    "text_inputs",
]


class LayerFields(TypedDict, total=False):
    """Fields of ``VisualTokens`` that are read of a layer of the language model."""

    text_attention: Tensor
    text_to_text: Tensor
    lm_received: Tensor
    lm_keys: Tensor | None
    lm_states: Tensor
    text_keys: Tensor | None
    text_states: Tensor
    layer_inputs: Tensor
    text_inputs: Tensor


# name -> ranks it may have; (B, N) attention is read as one head
_RANKS = {
    "features": (3,),
    "cls_attention": (2, 3),
    "received_attention": (2,),
    "encoder_features": (3,),
    "keys": (3,),
    "wide_keys": (3,),
    "wide_attention": (2,),
    "pooling_attention": (2,),
    "cls_features": (3,),
    "text_embeds": (3,),
    "text_attention": (4,),
    "lm_received": (2,),
    "lm_keys": (4,),
    "lm_states": (3,),
    "frame_vectors": (3,),
    "text_to_text": (4,),
    "text_keys": (4,),
    "text_states": (3,),
    "layer_inputs": (3,),
    "text_inputs": (3,),
}
_ONE_A_PATCH = ("received_attention", "wide_attention", "pooling_attention")
# name -> axes, of those that hold no row per token
_APART = {
    "cls_features": "(batch, crops, width)",
    "text_embeds": "(batch, words, width)",
    "frame_vectors": "(batch, frames, width)",
    "text_to_text": "(batch, heads, words, words)",
    "text_keys": "(batch, words, heads, width)",
    "text_states": "(batch, words, width)",
    "text_inputs": "(batch, words, width)",
}
# text of a layer -> tokens of it that are as wide
_OF_LAYER = {"text_keys": "lm_keys", "text_states": "lm_states", "text_inputs": "layer_inputs"}
_AS_WIDE = {"text_embeds": "features", **_OF_LAYER}
# axes with the words that query that layer
_QUERIES = {"text_attention": (2,), "text_to_text": (2, 3), **dict.fromkeys(_OF_LAYER, (1,))}


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Captured tensors of B units of N tokens; a field that was not captured is ``None``.

    Args:
        features: (B, N, D) tokens as the language model would get them (after the projector).
        cls_attention: (B, H, N) softmaxed attention of [CLS] to the patches, [CLS] entry removed, not
            renormalised.
        received_attention: (B, N) attention received by each patch, mean over queries and heads.
        encoder_features: (B, N, C) patches as the projector takes them, or (B, r * N, C) where it merges r of
            them to a token.
        keys: (B, N, d) attention keys of the feature layer, mean over heads, unscaled.
        wide_keys: (B, N, C) attention keys of all heads side by side, unscaled.
        wide_attention: (B, N) softmaxed attention of [CLS] with all heads read as one of their full width C,
            [CLS] entry removed, not renormalised.
        pooling_attention: (B, N) softmaxed attention of the probe of a pooling head to the patches, mean over
            heads.
        cls_features: (B, T, C) [CLS] rows of the T crops of a unit as the projector would take them (T = 0
            without [CLS]).
        projector: maps (..., C) to (..., D).
        text_embeds: (B, R, D) embeddings of the text that a unit is asked about, R = 0 without text.
        text_attention: (B, H, R, N) softmaxed attention of R text queries to the tokens, normalised over the
            whole sequence.
        text_to_text: (B, H, R, R) attention of these queries to each other, of the same layer.
        lm_received: (B, N) what the tokens of the same picture give each token in that layer, summed over
            them; between two tokens the largest attention of any head counts.
        lm_keys, text_keys: (B, N, Hk, d) and (B, R, Hk, d) keys of that layer, rotated where the model does.
        lm_states, text_states: (B, N, D) and (B, R, D) hidden states where the language model is cut, through
            its final norm; ``features`` has them without.
        layer_inputs, text_inputs: (B, N, D) hidden states where it is cut, through the norm of that layer,
            and those (B, R, D) of the text without any.
        query_mask: (B, R) bool, queries or words that are real; shorter units repeat their last query, and
            have anything for the words they lack.
        query_positions, positions: (B, R) and (B, N) position ids.
        rotary_frequencies: (d / 2,) angle per position of each pair of a head of width d.
        cut: number of the cut inside the language model.
        grids: the rectangular blocks (rows, cols) that the N tokens form one after the other, in raster
            order.
        frames: whether these blocks are all frames of one clip.
        frame_vectors: (B, T, C) one vector for each of the T frames of a clip: the output of the pooling head
            of a tower, or what else the caller has.
        ordinal: (B,) index of the unit inside its sample, so that seeded methods differ between images; on
            the CPU.
        size: (B, N), for methods that need no tensor at all.
        like: any tensor on the device of the tokens, for such methods.
        of_layers: what was captured of a named layer of the tower, by need.
        checks: where ``require`` leaves its checks.
    """

    features: Tensor | None = None
    cls_attention: Tensor | None = None
    received_attention: Tensor | None = None
    encoder_features: Tensor | None = None
    keys: Tensor | None = None
    wide_keys: Tensor | None = None
    wide_attention: Tensor | None = None
    pooling_attention: Tensor | None = None
    cls_features: Tensor | None = None
    projector: Callable[[Tensor], Tensor] | None = None
    grids: tuple[tuple[int, int], ...] = ()
    ordinal: Tensor | None = None
    text_embeds: Tensor | None = None
    text_attention: Tensor | None = None
    text_to_text: Tensor | None = None
    lm_received: Tensor | None = None
    lm_keys: Tensor | None = None
    lm_states: Tensor | None = None
    text_keys: Tensor | None = None
    text_states: Tensor | None = None
    layer_inputs: Tensor | None = None
    text_inputs: Tensor | None = None
    query_mask: Tensor | None = None
    query_positions: Tensor | None = None
    positions: Tensor | None = None
    rotary_frequencies: Tensor | None = None
    cut: int = 0
    frames: bool = False
    frame_vectors: Tensor | None = None
    size: tuple[int, int] | None = None
    like: Tensor | None = None
    of_layers: Mapping[Need, Tensor] = field(default_factory=dict)
    checks: Checks = NOW

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _RANKS if getattr(self, name) is not None}
        for name, value in given.items():
            _check_tensor(name, value)
        if self.cls_attention is not None and self.cls_attention.ndim == 2:
            object.__setattr__(self, "cls_attention", self.cls_attention[:, None])
        shapes = {
            name: (value.shape[0], _count(name, value)) for name, value in given.items() if name not in _APART
        }
        if "encoder_features" in shapes and len(shapes) > 1:
            batch, patches = shapes.pop("encoder_features")
            units, tokens = next(iter(shapes.values()))
            # a merging projector reads r patches per token
            if batch != units or patches < tokens or patches % max(tokens, 1):
                shapes["encoder_features"] = (batch, patches)
        if len(set(shapes.values())) > 1:
            raise SpecError(
                f"tensors disagree on (batch, tokens): {shapes}; give them all for the same units"
            )
        self._check_apart(given, bool(shapes))
        widths = {
            name: given[name].shape[-1] for name in ("encoder_features", "cls_features") if name in given
        }
        if len(set(widths.values())) > 1:
            raise SpecError(
                f"tensors disagree on the width of the encoder: {widths}; give both as the projector takes "
                "them"
            )
        if self.projector is not None and not callable(self.projector):
            raise SpecError(
                f"projector={self.projector!r}; expected a module or a function from (..., C) to (..., D)"
            )
        ordinal = self.ordinal
        numbers = isinstance(ordinal, Tensor) and ordinal.dtype == torch.int64
        if ordinal is not None and shapes and not (numbers and ordinal.shape == (self.batch,)):
            raise SpecError(
                f"ordinal={ordinal!r}; expected int64 of shape {(self.batch,)}, counting the units of a "
                "sample"
            )
        if self.grids and shapes and sum(r * c for r, c in self.grids) != self.count:
            raise SpecError(
                f"grid {self.grids} holds {sum(r * c for r, c in self.grids)} tokens; the tensors hold "
                f"{self.count}"
            )

    def _check_apart(self, given: Mapping[str, Tensor], counted: bool) -> None:
        """What holds no row per token: of the same units, of one text, as wide as the tokens."""
        for name, axes in _APART.items():
            if name in given and counted and given[name].shape[0] != self.batch:
                shape = tuple(given[name].shape)
                raise SpecError(f"{name} has shape {shape}; expected {axes} with batch {self.batch}")
        vectors, text, mask = self.frame_vectors, self.text_embeds, self.query_mask
        if vectors is not None and tuple(vectors.shape[:2]) != (self.batch, len(self.grids)):
            raise SpecError(
                f"frame_vectors has shape {tuple(vectors.shape)}; expected (batch, frames, width) with batch "
                f"{self.batch} and {len(self.grids)} frames, one for each block of the grid"
            )
        words = {
            name: tuple(given[name].shape[axis] for axis in axes)
            for name, axes in _QUERIES.items()
            if name in given
        }
        if len({number for numbers in words.values() for number in numbers}) > 1:
            raise SpecError(f"tensors disagree on the words: {words}; give them all for the same text")
        for name, other in _AS_WIDE.items():
            if name in given and other in given and given[name].shape[2:] != given[other].shape[2:]:
                one, two = (" x ".join(map(str, given[held].shape[2:])) for held in (name, other))
                raise SpecError(
                    f"{name} has width {one}, {other} {two}; expected both as the language model reads them"
                )
        if mask is None or (text is None and not words):
            return
        first = next(iter(words), "")
        shape = (given[first].shape[0], words[first][0]) if text is None else tuple(text.shape[:2])
        if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == shape):
            held = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise SpecError(f"query_mask is {held}; expected bool of shape {shape}, True for words")

    def _any(self) -> tuple[str, Tensor]:
        for name in _RANKS:
            value = getattr(self, name)
            if value is not None and name not in _APART:
                return name, value
        raise CaptureError(
            "no token tensor was given: pass at least one of "
            + ", ".join(n for n in _RANKS if n not in _APART)
        )

    @property
    def batch(self) -> int:
        """B, the number of units."""
        return self._any()[1].shape[0] if self.size is None else self.size[0]

    @property
    def count(self) -> int:
        """N, the number of tokens of each unit."""
        return _count(*self._any()) if self.size is None else self.size[1]

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.like.device if self.like is not None else self._any()[1].device

    @classmethod
    def of(cls: type[T], captured: Mapping[Need, Tensor], ordinals: Sequence[int], **others: Any) -> T:
        """Tokens from what was captured, patches first; the caller made these tensors, so that nothing is
        checked again.

        Args:
            captured: with (B, N, H) of [CLS] attention and (B, N, 1) of received attention, see
                ``patches_first``.
            ordinals: of the units.
            others: further fields.
        """
        tokens = object.__new__(cls)
        further: dict[Need, Tensor] = {}
        values: dict[str, Any] = {"ordinal": torch.tensor(list(ordinals)), "of_layers": further, **others}
        for need, value in captured.items():
            value = patches_last(need.what, value)
            values.setdefault(need.what, value)  # the first one of its kind is the field
            if need.layer is not None:
                further[need] = value
        for one in fields(cls):
            default = {} if one.default is MISSING else one.default
            object.__setattr__(tokens, one.name, values.get(one.name, default))
        return tokens

    def require(self, ok: Tensor, explain: Explain) -> None:
        """Raise the error unless ``ok``, a bool tensor with one element; on a device, once the host waits."""
        self.checks.require(ok, explain)

    def require_finite(self, values: Tensor, explain: Explain) -> None:
        """Raise the error where a value is NaN or infinite; on a device, once the host waits."""
        self.checks.finite(values, explain)

    @overload
    def need(self, name: _TensorField, layer: int | float | None = None) -> Tensor: ...
    @overload
    def need(self, name: Literal["projector"]) -> Callable[[Tensor], Tensor]: ...
    @overload
    def need(self, name: Literal["grids"]) -> tuple[tuple[int, int], ...]: ...
    @overload
    def need(self, name: str) -> Any: ...

    def need(self, name: str, layer: int | float | None = None) -> Any:
        """A captured field, of one ``layer`` of the tower where given; raises naming what is missing."""
        if layer is not None:
            return self._of_layer(name, layer)
        value = getattr(self, name)
        # an empty tuple; == with a tensor would go through torch
        empty = isinstance(value, tuple) and not value
        if name == "grids" and empty:
            raise GridError(
                "this method needs 'grids', the rows and columns that tokens form, and they are not known "
                "here; pass grid=..., or use a method that reads features only, e.g. 'divprune@64'"
            )
        if value is None or empty:
            given = {one.name: getattr(self, one.name) for one in fields(self)}
            have = [name for name, held in given.items() if isinstance(held, Tensor) or callable(held)]
            raise CaptureError(
                f"this method needs {name!r}; given were {have}. Pass {name}=..., or declare it in the "
                "method's needs"
            )
        return value

    def _of_layer(self, name: str, layer: int | float) -> Tensor:
        for need, tensor in self.of_layers.items():
            if (need.what, need.layer) == (name, layer):
                return tensor
        raise CaptureError(
            f"this method needs {name!r} of layer {layer} of the tower; given were of layers "
            f"{[str(need) for need in self.of_layers]}. Pass of_layers={{vlmprune.core.method.Need({name!r}, "
            f"{layer}): ...}}, or declare it in the method's needs"
        )


def _check_tensor(name: str, value: object) -> None:
    """Refuse what is no dense tensor of floats with the axes of this field."""
    if not isinstance(value, Tensor):
        raise SpecError(f"{name} is a {type(value).__name__}; expected a torch tensor")
    if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        held = f"{value.dtype}, {value.layout}, on {value.device}"
        raise SpecError(f"{name} of shape {tuple(value.shape)} is {held}; expected a dense tensor of floats")
    if value.ndim not in _RANKS[name]:
        axes = " or ".join(map(str, _RANKS[name]))
        raise SpecError(f"{name} has shape {tuple(value.shape)}; expected {axes} axes, batch first")


def patches_first(what: str, value: Tensor) -> Tensor:
    """Captured attention with patches before channels: (T, H, n) -> (T, n, H), (T, n) -> (T, n, 1)."""
    if what == "cls_attention":
        return value.transpose(1, 2)
    return value[..., None] if what in _ONE_A_PATCH else value


def patches_last(what: str, value: Tensor) -> Tensor:
    """The same back, as methods read it."""
    if what == "cls_attention":
        return value.transpose(1, 2)
    return value[..., 0] if what in _ONE_A_PATCH else value


def _count(name: str, value: Tensor) -> int:
    """Tokens of a field: attention ends in them, all else has them second."""
    return value.shape[-1] if name.endswith("attention") else value.shape[1]
