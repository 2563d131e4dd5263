# SPDX-License-Identifier: Apache-2.0
"""Queries, keys, values and mask of one attention module, taken where the model hands them to its attention
function.

Rotation, head norms, scaling, soft caps, sinks, shared key heads and latent attention are the model's own, so
no rule of any backbone is written a second time. The module stays on SDPA or FlashAttention: its ``config``
is replaced by a view of it that names an attention function of ours, which calls the model's and shows the
call to whoever listens.

Letters: B prompts (or crops), H heads, Hk key heads, n queries of this call, S keys (earlier ones included),
d width of a head.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..core.deferred import NOW, Checks
from ..errors import UnsupportedError

_PREFIX = "vlmprune|"  # of our attention functions; the name of the model's own follows
# relative error of a recomputed output row: right formulas stay below 1e-6 in float32, wrong ones are above
# 0.5
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_HALF = 5e-2
_SLOTS_AT_ONCE = 128  # keys or values cast to float32 at a time


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of an attention function.

    Args:
        module: the attention module.
        queries: (B, H, n, d), as the function gets them: normalised and rotated.
        keys, values: (B, Hk, S, d), those of earlier calls included.
        mask: what the model gave: None, a tensor (B or 1, 1 or H, n, S or more), for FlashAttention (B, S),
            or a flex BlockMask.
        options: keyword arguments of the function.
        flash: whether the function is a FlashAttention, which counts causality from the last key; SDPA counts
            from the first.
    """

    module: nn.Module
    queries: Tensor
    keys: Tensor
    values: Tensor
    mask: Any
    options: Mapping[str, Any]
    flash: bool = False

    @property
    def scaling(self) -> float:
        """Factor of the logits."""
        given = self.options.get("scaling")
        return self.queries.shape[-1] ** -0.5 if given is None else given

    def logits(self, rows: Tensor) -> Tensor:
        """(B, H, R, S) logits in float32 of the queries at ``rows`` (B, R), -inf where masked."""
        width = self.queries.shape[-1]
        at = rows[:, None, :, None].expand(-1, self.queries.shape[1], -1, width)
        groups = self.queries.shape[1] // self.keys.shape[1]  # query heads that share a key head
        queries = (
            self.queries.gather(2, at).float().unflatten(1, (-1, groups)).flatten(2, 3)
        )  # (B, Hk, groups * R, d)
        folded = torch.cat([queries @ keys.float().transpose(2, 3) for keys in _in_parts(self.keys)], dim=-1)
        logits = folded.unflatten(2, (groups, -1)).flatten(1, 2) * self.scaling
        softcap = self.options.get("softcap")
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return self._masked(logits, rows)

    def _masked(self, logits: Tensor, rows: Tensor) -> Tensor:
        mask = self.mask
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.is_floating_point():
            return logits + self._rows_of(mask, rows).float()
        visible = self.visible(rows)
        return logits.masked_fill(~(visible if visible.ndim == 4 else visible[:, None]), -torch.inf)

    def _rows_of(self, mask: Tensor, rows: Tensor) -> Tensor:
        """(B, 1 or H, R, S) of a mask over all queries."""
        mask = mask[..., : self.keys.shape[2]].expand(rows.shape[0], -1, -1, -1)
        return mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))

    def visible(self, rows: Tensor) -> Tensor:
        """(B, R, S) bool, or (B, 1 or H, R, S) where the model gave one mask for every query: keys that a row
        attends to.
        """
        mask, held = self.mask, self.keys.shape[2]
        slots = torch.arange(held, device=rows.device)
        if isinstance(mask, Tensor) and mask.ndim == 4:
            mask = self._rows_of(mask, rows)
            return mask if mask.dtype == torch.bool else mask >= 0
        if hasattr(mask, "mask_mod"):  # flex attention
            batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
            return mask.mask_mod(batch, torch.zeros_like(batch), rows[..., None], slots[None, None])
        fed = self.queries.shape[2]
        at = (rows + held - fed if self.flash or fed == 1 else rows)[
            ..., None
        ]  # (B, R, 1), the key of every query itself
        seen = (
            slots <= at
            if self._causal
            else torch.ones(*rows.shape, held, dtype=torch.bool, device=rows.device)
        )
        window = self.options.get("sliding_window")
        if window is not None:
            seen = seen & (slots > at - window)
        if isinstance(mask, Tensor):
            seen = seen & mask[:, None, :held].bool()
        return seen

    @property
    def _causal(self) -> bool:
        given = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if given is None else given)

    def attention(self, rows: Tensor) -> Tensor:
        """(B, H, R, S) softmaxed attention of the rows in float32; with sinks (GPT-OSS) a row sums to less
        than 1.
        """
        logits = self.logits(rows)
        sinks = self.options.get("s_aux")
        if sinks is None:
            return logits.softmax(dim=-1)
        column = sinks.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]

    def weigh(self, weights: Tensor) -> Tensor:
        """(B, R, H, d) values summed with weights (B, H, R, S), in float32."""
        parts = _in_parts(self.values)
        weights_of = weights.unflatten(1, (self.values.shape[1], -1)).flatten(2, 3)  # (B, Hk, groups * R, S)
        shares = weights_of.split([part.shape[2] for part in parts], dim=-1)
        folded = sum(
            share @ part.float() for share, part in zip(shares, parts, strict=True)
        )  # (B, Hk, groups * R, d)
        return folded.unflatten(2, (-1, weights.shape[2])).flatten(1, 2).transpose(1, 2)

    def received(self, rows: int = 16) -> Tensor:
        """(B, S) attention that each key receives, mean over heads and the queries that see it; no n x S map
        is held.
        """
        call = self if self.keys.dtype == torch.float32 else replace(self, keys=self.keys.float())
        batch, heads, count = self.queries.shape[:3]
        total = torch.zeros(batch, self.keys.shape[2], device=self.keys.device)
        seen = torch.zeros_like(total)
        for some in torch.arange(count, device=self.keys.device).split(rows):
            at = some.expand(batch, -1)
            total += call.attention(at).sum(dim=(1, 2))
            if self.mask is not None:
                visible = self.visible(at)
                seen += (visible if visible.ndim == 3 else visible.any(dim=1)).sum(dim=1)
        return total / (heads * (count if self.mask is None else seen.clamp_min(1)))

    def segments(self) -> list[AttentionCall]:
        """One call per segment of a packed sequence, where FlashAttention was told where they end; else this
        call alone.
        """
        ends = self.options.get("cu_seq_lens_q")
        if ends is None or ends.shape[0] <= 2:
            return [self]
        lengths = ends.diff().tolist()
        parts = zip(
            *(states.split(lengths, dim=2) for states in (self.queries, self.keys, self.values)), strict=True
        )
        return [replace(self, queries=q, keys=k, values=v) for q, k, v in parts]

    def biased(self, bias: Tensor | None, function: str) -> AttentionCall:
        """The call with a bias (B, 1 or H, 1, S) on its logits, as the attention function of that name takes
        it.
        """
        if bias is None:
            return self
        if function not in ("sdpa", "eager"):
            raise UnsupportedError(
                f"attn_implementation={function!r} of {type(self.module).__name__} takes no bias on its logits; "
                "load the model with attn_implementation='sdpa'"
            )
        if self.mask is not None:
            raise UnsupportedError(f"{type(self.module).__name__} has a mask of its own, which a bias would hide")
        bias = bias.to(self.queries.dtype).expand(-1, -1, self.queries.shape[2], -1)
        return replace(self, mask=bias)

    def check(
        self, rows: Tensor, real: Tensor | None, attention: Tensor, output: Tensor, checks: Checks = NOW
    ) -> None:
        """Require that the ``attention`` (B, H, R, S) of ``rows`` (B, R) gives what the model itself computed
        for them.

        Args:
            real: (B, R) bool, rows to compare, the others are filling; None: all.
            output: (B, n, H, d), what the attention function returned.
        """
        if self.options.get("dropout"):
            return  # the model drops weights at random: its output is of another attention
        at = rows[..., None, None].expand(-1, -1, *output.shape[2:])
        given, made = output.detach().gather(1, at).float(), self.weigh(attention)
        if real is not None:
            keep = real[..., None, None]
            given, made = given.where(keep, 0.0), made.where(keep, 0.0)
        bound = _TOLERANCE.get(output.dtype, _TOLERANCE_HALF)
        error = (made - given).abs().amax() / given.abs().amax().clamp_min(1e-20)
        overflow = given.isnan().any()  # of the model itself: what is captured is checked for that
        checks.require(
            (error <= bound) | overflow,
            lambda: UnsupportedError(
                f"attention rows of {type(self.module).__name__} were recomputed with an error of "
                f"{float(error):.2g} (at most {bound:g} is rounding): it attends by a rule that is not known "
                "here; use a method that reads no attention of it, e.g. 'divprune@64'"
            ),
        )


def _in_parts(states: Tensor) -> tuple[Tensor, ...]:
    """Keys or values (B, Hk, S, d) in parts along S, so that no float32 copy of all of them is held in half
    precision.
    """
    return (states,) if states.dtype == torch.float32 else states.split(_SLOTS_AT_ONCE, dim=2)


def over_slots(weights: Tensor, slots: int) -> Tensor:
    """(..., S) over the keys of a call -> (..., slots) over all slots of a layer.

    A static cache has empty keys behind the slots; a sliding window has forgotten the first ones, whose
    weight is 0.
    """
    held = weights.shape[-1]
    return weights[..., :slots] if held >= slots else nn.functional.pad(weights, (slots - held, 0))


def over_keys(mask: Tensor, held: int) -> Tensor:
    """(B, slots) bool over all slots of a layer -> (B, S) over the ``held`` keys of a call:
    :func:`over_slots` turned round.
    """
    slots = mask.shape[-1]
    return nn.functional.pad(mask, (0, held - slots)) if held >= slots else mask[:, slots - held :]


# --- the tap --------------------------------------------------------------------------------------

# what a listener gets: the call and the function's output (B, n, H, d); it returns another output, or None to
# leave it
Listener = Callable[[AttentionCall, Tensor], Tensor | None]
# added to the logits of a call: (B, 1 or H, 1, S), or None
Bias = Callable[[AttentionCall], Tensor | None]


def reads_interface(module: nn.Module) -> bool:
    """Whether a module hands queries and keys to a function that it looks up by name, as transformers models
    do.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def find_attention(layer: nn.Module) -> nn.Module | None:
    """The attention module of a layer, None where its queries and keys cannot be taken or where it has
    none."""
    return next((module for module in layer.modules() if reads_interface(module)), None)


class TappedConfig:
    """A view of a module's config that names our attention function; everything else is the config's own,
    also when it changes.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._listeners: list[Listener] = []
        self._biases: list[Bias] = []
        self._local = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    @property
    def _attn_implementation(self) -> str:
        base = self._config._attn_implementation or "eager"
        return base if getattr(self._local, "inside", False) else register_name(base)

    def __deepcopy__(self, memo: dict) -> None:
        raise UnsupportedError("a model cannot be copied while pruning is attached; detach first")


class AttentionTap:
    """Shows every call of one attention module to a listener, and adds a bias to its logits where there is one.

    Several taps may watch one module.
    """

    def __init__(self, module: nn.Module, listener: Listener, bias: Bias | None = None) -> None:
        self.module, self.listener, self.bias = module, listener, bias

    def install(self) -> None:
        config = self.module.config
        if not isinstance(config, TappedConfig):
            config = TappedConfig(config)
            self.module.config = config
        config._listeners.append(self.listener)
        if self.bias is not None:
            config._biases.append(self.bias)

    def remove(self) -> None:
        """Give the module its own config back once nobody listens; harmless when called again."""
        config = self.module.config
        if isinstance(config, TappedConfig) and self.listener in config._listeners:
            config._listeners.remove(self.listener)
            if self.bias is not None:
                config._biases.remove(self.bias)
            if not config._listeners:
                self.module.config = config._config


def tap(layer: nn.Module, index: int, method: str, listener: Listener) -> AttentionTap:
    """Install a tap on the attention of a decoder layer, or say why ``method`` cannot read it."""
    module = find_attention(layer)
    if module is None:
        raise UnsupportedError(
            f"{method} reads the attention of decoder layer {index}, a {type(layer).__name__} without "
            "attention whose queries and keys could be taken; choose another layer, or a method before the "
            "language model, e.g. 'fastervlm@64'"
        )
    made = AttentionTap(module, listener)
    made.install()
    return made


def register_name(base: str) -> str:
    """The name of our attention function around the model's own, which transformers looks up by this name."""
    name = (
        _PREFIX + base
    )  # holds "flash" where the model's own does: vision towers choose their packing by that
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, _tapped)
    return name


def _tapped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of tapped modules."""
    config = module.config
    if not isinstance(config, TappedConfig):  # removed while the model ran, by another thread
        return _own_function(module, config._attn_implementation)(
            module, query, key, value, attention_mask, **options
        )
    base = config._config._attn_implementation or "eager"
    call = AttentionCall(module, query, key, value, attention_mask, options, "flash" in base)
    if getattr(_probing, "active", False):
        raise Probed(call)
    for bias in list(config._biases):
        call = call.biased(bias(call), base)
    own = _own_function(module, base)
    config._local.inside = True  # FlashAttention looks its kernel up by the name in the config
    try:
        output, weights = own(module, query, key, value, call.mask, **options)
    finally:
        config._local.inside = False
    for listener in list(config._listeners):
        changed = listener(call, output)
        output = output if changed is None else changed
    return output, weights


def _own_function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that a module would use; eager ones stand beside the class."""
    for cls in type(module).__mro__:
        names = vars(sys.modules[cls.__module__])
        if "ALL_ATTENTION_FUNCTIONS" in names:
            return (
                names["eager_attention_forward"]
                if name == "eager"
                else names["ALL_ATTENTION_FUNCTIONS"][name]
            )
    raise UnsupportedError(f"{type(module).__name__} has no table of attention functions")


# --- rows of a layer that has not run yet ---------------------------------------------------------

_probing = threading.local()


class Probed(BaseException):
    """Ends a forward that was started only to see what its attention is given; never leaves :func:`probe`."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call


@torch.no_grad()
def probe(
    layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], cache_keyword: str | None, past: int
) -> AttentionCall:
    """What the attention of a decoder layer would be given for ``hidden`` (B, n, D); the cache is read and
    not written.
    """
    kwargs = dict(kwargs)
    if cache_keyword is not None:
        kwargs[cache_keyword] = ReadOnlyCache(kwargs[cache_keyword], past)
    _probing.active = True
    try:
        layer.forward(hidden, **kwargs)  # not the module itself: its hooks are for the real run
    except Probed as stop:
        return _as_masked(stop.call)
    finally:
        _probing.active = False
    raise UnsupportedError(
        f"{type(layer).__name__} ran without calling its attention function; its attention cannot be read"
    )


def _as_masked(call: AttentionCall) -> AttentionCall:
    """The call with the keys that its mask speaks of: a full sliding window drops the first ones as it takes
    new ones.
    """
    surplus = call.keys.shape[2] - call.mask.shape[-1] if isinstance(call.mask, Tensor) else 0
    if surplus <= 0:
        return call
    return replace(call, keys=call.keys[:, :, surplus:], values=call.values[:, :, surplus:])


class ReadOnlyCache:
    """A KV cache that answers an update as the real one would and keeps nothing of it."""

    def __init__(self, cache: Any, past: int) -> None:
        self._cache, self._past = cache, past

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layers = self._cache.layers
        layer = layers[layer_idx] if layer_idx < len(layers) else None
        if self._past == 0 or layer is None or layer.keys is None:
            return keys, values
        held = layer.keys.shape[2]
        if held < self._past and not getattr(layer, "is_sliding", False):
            raise UnsupportedError(
                f"layer {layer_idx} shows {held} of the {self._past} earlier slots (a quantised cache), so "
                "its attention rows cannot be recomputed; use the default cache, or prune before the "
                "language model, e.g. with 'fastervlm@64'"
            )
        earlier = [states[:, :, : self._past] for states in (layer.keys, layer.values)]
        return torch.cat([earlier[0], keys], dim=2), torch.cat([earlier[1], values], dim=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
