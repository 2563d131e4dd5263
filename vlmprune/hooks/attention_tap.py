# SPDX-License-Identifier: Apache-2.0
"""Watch one attention module where it hands queries, keys and values to its attention function.

The module stays on SDPA or FlashAttention: its ``config`` is replaced by a view of it that names an attention
function of ours, which calls the model's and shows the call to whoever listens.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from ..errors import UnsupportedError
from .attention_call import AttentionCall

_PREFIX = "vlmprune|"  # of our attention functions; the name of the model's own follows

# what a listener gets: the call and the function's output (B, n, H, d); it returns another output, or None to
# leave it
Listener = Callable[[AttentionCall, Tensor], Tensor | None]
# added to the logits of a call: (B, 1 or H, 1, S), or None
Bias = Callable[[AttentionCall], Tensor | None]


def reads_interface(module: nn.Module) -> bool:
    """Whether a module hands queries and keys to a function that it looks up by name."""
    # mypy takes the __hash__ of its objects for that of the class
    return _looks_up(type(module))  # type: ignore[arg-type]


@lru_cache  # every module of a model is asked whenever something is attached
def _looks_up(kind: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def walk(model: nn.Module, leaf: Callable[[nn.Module], bool] | None = None) -> Iterator[nn.Module]:
    """All modules, each before its parts, as ``modules()`` has them; that one costs most of an attachment.

    Args:
        leaf: whether a module stands for itself, and its parts are left out.
    """
    waiting: list[nn.Module | None] = [model]
    found: set[nn.Module] = set()
    while waiting:
        module = waiting.pop()
        if module is None or module in found:  # one may stand in several places, or hold what holds it
            continue
        found.add(module)
        yield module
        if module._modules and not (leaf is not None and leaf(module)):
            waiting += reversed(module._modules.values())


def find_attention(layer: nn.Module) -> nn.Module | None:
    """The attention module of a layer; None where there is none whose queries and keys can be taken."""
    return next((module for module in walk(layer) if reads_interface(module)), None)


class TappedConfig:
    """A view of a module's config that names our attention function; all else is the config's own."""

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
        if getattr(self._local, "inside", False):
            return base
        # holds "flash" where the model's own does: vision towers choose their packing by that
        name = _PREFIX + base
        if name not in AttentionInterface._global_mapping:
            AttentionInterface.register(name, _tapped)
        return name

    def __copy__(self) -> Any:
        return copy.copy(self._config)  # a copy belongs to no tapped module

    def __deepcopy__(self, memo: dict) -> None:
        raise UnsupportedError("a model cannot be copied while pruning is attached; detach first")


class AttentionTap:
    """Shows every call of one attention module to a listener, and adds a bias to its logits.

    Several taps may watch one module.
    """

    def __init__(self, module: nn.Module, listener: Listener, bias: Bias | None = None) -> None:
        self.module, self.listener, self.bias = module, listener, bias

    def install(self) -> None:
        # a module asks its config in every call, so that no method of it has to be replaced
        config: Any = self.module.config
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
            "language model, e.g. 'divprune@64'"
        )
    made = AttentionTap(module, listener)
    made.install()
    return made


def _tapped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of tapped modules."""
    config: Any = module.config
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


# per class of attention module, the names of its file
_NAMES: dict[type[nn.Module], dict[str, Any]] = {}


def _own_function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that a module would use; eager ones stand beside the class."""
    kind = type(module)
    if kind not in _NAMES:  # a graph cannot look for them
        tables = (vars(sys.modules[cls.__module__]) for cls in kind.__mro__)
        found = next((names for names in tables if "ALL_ATTENTION_FUNCTIONS" in names), None)
        if found is None:
            raise UnsupportedError(f"{kind.__name__} has no table of attention functions")
        _NAMES[kind] = found
    names = _NAMES[kind]
    if name == "eager":
        return names["eager_attention_forward"]
    return names["ALL_ATTENTION_FUNCTIONS"][name]


# --- rows of a layer that has not run yet ---------------------------------------------------------

_probing = threading.local()


class Probed(BaseException):
    """Ends a forward that was started only to see what its attention is given; never leaves :func:`probe`."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call


class OnlyWhatRanks(TorchFunctionMode):
    """Leaves out the products of an attention module that rows of its attention do not read: those with the
    matrix of its values, and if asked for, of all queries but the last.

    A mode of torch acts in its own thread alone, where another forward of the module would be another
    thread's. What stands in for a product has its shape, and no number of it is read. Modules that keep
    their matrices under other names, or in one, compute everything.
    """

    def __init__(self, module: nn.Module | None, last: bool) -> None:
        super().__init__()
        self.values: Any = getattr(getattr(module, "v_proj", None), "weight", None)
        self.queries: Any = getattr(getattr(module, "q_proj", None), "weight", None) if last else None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is nn.functional.linear and len(args) > 1 and args[0].ndim == 3:
            hidden, matrix = args[0], args[1]  # (B, n, D), (D', D)
            if matrix is self.values:
                return hidden[..., :1].expand(-1, -1, matrix.shape[0])
            if matrix is self.queries:
                return function(hidden[:, -1:], *args[1:]).expand(-1, hidden.shape[1], -1)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def probe(
    layer: nn.Module,
    hidden: Tensor,
    kwargs: Mapping[str, Any],
    cache_keyword: str | None,
    past: int,
    last: bool = False,
) -> AttentionCall:
    """What the attention of a decoder layer would be given for ``hidden`` (B, n, D), but for its values;
    writes no cache.

    Args:
        last: of the queries only the last one is read.
    """
    kwargs = dict(kwargs)
    if cache_keyword is not None:
        kwargs[cache_keyword] = ReadOnlyCache(kwargs[cache_keyword], past)
    _probing.active = True
    try:
        with OnlyWhatRanks(find_attention(layer), last):
            layer.forward(hidden, **kwargs)  # not the module itself: its hooks are for the real run
    except Probed as stop:
        return _as_masked(stop.call)
    finally:
        _probing.active = False
    raise UnsupportedError(
        f"{type(layer).__name__} ran without calling its attention function; its attention cannot be read"
    )


def _as_masked(call: AttentionCall) -> AttentionCall:
    """The call with the keys that its mask speaks of: a full sliding window drops the first ones."""
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
                "language model, e.g. with 'divprune@64'"
            )
        earlier = [states[:, :, : self._past] for states in (layer.keys, layer.values)]
        return torch.cat([earlier[0], keys], dim=2), torch.cat([earlier[1], values], dim=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
