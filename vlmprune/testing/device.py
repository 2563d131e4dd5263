# SPDX-License-Identifier: Apache-2.0
"""A pretended device: counts what a forward would ask of a GPU, on a machine without one.

Tensors say that they live elsewhere (on "meta") while the CPU computes them. Every operation counts as a
launch; every place where the host would wait for the device (item, tolist, nonzero, boolean masks, copies to
the host) as a wait; every transfer of host data as an upload. An operation that mixes devices raises, as it
does on a GPU. Counts do not depend on the machine, so a table of them can be held by a test.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from ..core.tokens import VisualTokens

Phase = Literal["prefill", "decode"]
AWAY = torch.device("meta")
# operations whose result has a size that only the device knows
_WAITS = frozenset(
    {
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
    }
)
# results of a known size, unless the index is a mask
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})


class MixedDevices(RuntimeError):
    """An operation was given tensors of the host and of the device."""


@dataclass
class Counts:
    """What a piece of work asks of a device.

    Args:
        launches: operations started.
        waits: times the host waits until the device is done.
        uploads: transfers from the host.
        bytes: read and written by the operations.
        sites: "wait file:line" or "upload file:line" -> how often.
    """

    launches: int = 0
    waits: int = 0
    uploads: int = 0
    bytes: int = 0
    sites: Counter[str] = field(default_factory=Counter)

    def minus(self, other: Counts) -> Counts:
        """What this asks beyond ``other``."""
        return Counts(
            self.launches - other.launches,
            self.waits - other.waits,
            self.uploads - other.uploads,
            self.bytes - other.bytes,
            self.sites - other.sites,
        )

    def numbers(self) -> dict[str, int]:
        """Without the sites."""
        return {name: value for name, value in asdict(self).items() if name != "sites"}


class Pretended(Tensor):
    """A tensor that says it is away; ``here`` holds its values on the CPU."""

    here: Tensor
    device_of: PretendedDevice

    @staticmethod
    def __new__(cls, here: Tensor, device: PretendedDevice) -> Pretended:
        # the same shape and strides, and no memory
        shell = torch.empty_strided(here.size(), here.stride(), dtype=here.dtype, device=AWAY)
        made = torch.Tensor._make_subclass(cls, shell, False)
        made.here, made.device_of = here, device
        return made

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """No: it has values, as a tensor on a device has."""
        return False

    def tolist(self) -> Any:
        self.device_of.wait("tolist")
        return self.here.tolist()

    def item(self) -> Any:
        self.device_of.wait("item")
        return self.here.item()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __len__(self) -> int:
        return self.here.shape[0]

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("a tensor on a device has no numpy(); move it to the CPU first")

    # torch gives its own no types
    def __repr__(self, *args: Any, **options: Any) -> str:  # type: ignore[override]
        return f"Pretended({tuple(self.here.shape)}, {self.here.dtype})"

    # torch's own is a C function that says "none", which mypy takes for a method of instances
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Pretended)]
        return tensors[0].device_of.run(op, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """Runs operations on the CPU and counts what they would ask of a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def take(self) -> Counts:
        """What was counted since the last time."""
        counts, self.counts = self.counts, Counts()
        return counts

    def away(self, value: Tensor) -> Pretended:
        """A tensor of the CPU as one of this device; not counted."""
        with _disable_current_modes():  # also while this device is pretended
            return Pretended(value.detach(), self)

    def wait(self, what: str) -> None:
        """Count a wait at the line that asks for it."""
        self.counts.waits += 1
        self.counts.sites[f"wait {what} {site()}"] += 1

    def upload(self, what: str) -> None:
        """Count an upload at the line that makes it."""
        self.counts.uploads += 1
        self.counts.sites[f"upload {what} {site()}"] += 1

    def launch(self, *values: Any) -> None:
        """Count a launch that reads and writes these values."""
        self.counts.launches += 1
        tensors = [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
        self.counts.bytes += sum(value.numel() * value.element_size() for value in tensors)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return self.run(op, args, kwargs or {})

    def run(self, op: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """One operation, on the CPU, counted where it touches the device."""
        name = op._schema.name.split("::")[1]
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        away = [one for one in tensors if isinstance(one, Pretended)]
        asked = kwargs.get("device")
        to_away = asked is not None and torch.device(asked).type == AWAY.type
        if name == "copy_":
            return self._copy(args[0], args[1])
        if name == "_to_copy":
            return self._moved(op, args, kwargs, bool(away), to_away if asked is not None else bool(away))
        # nothing of the device takes part
        if not away and not to_away:
            return op(*args, **kwargs)
        self._refuse_mixed(name, tensors)
        if name == "_fused_sdp_choice":
            return 0  # the plain kernel: attention is one launch of its own either way
        kwargs = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
        by_mask = name in _INDEXING and any(one.dtype == torch.bool for one in _indices(args))
        # repeat_interleave of counts alone makes as many rows as they sum up to
        by_value = torch.Tag.data_dependent_output in op.tags  # a number or a truth value: equal, allclose
        if name in _WAITS or by_value or by_mask or (name == "repeat_interleave" and len(args) == 1):
            self.wait(name)
        result = op(*tree_map(_here, args), **tree_map(_here, dict(kwargs)))
        is_view = any(one.alias_info is not None for one in op._schema.returns) and not op._schema.is_mutable
        if not is_view and name != "_unsafe_view":  # which is a view, though its schema does not say so
            self.launch(tensors, result)
        # in place: the caller goes on with the tensor that it gave
        if op._schema.is_mutable and name.endswith("_"):
            return args[0]
        # an input that is given back stays the same object
        known = {id(one.here): one for one in away}
        return tree_map(lambda one: self._back(one, known), result)

    def _back(self, value: Any, known: Mapping[int, Pretended]) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known.get(id(value)) or Pretended(value, self)

    def _copy(self, target: Tensor, source: Tensor) -> Tensor:
        if isinstance(source, Pretended) and not isinstance(target, Pretended):
            self.wait("copy to host")
        elif isinstance(target, Pretended) and not isinstance(source, Pretended):
            self.upload("copy")
        _here(target).copy_(_here(source))
        if isinstance(target, Pretended):
            self.launch(target, source)
        return target

    def _moved(self, op: Any, args: tuple, kwargs: Mapping[str, Any], away: bool, to_away: bool) -> Any:
        """A conversion or a move of the first argument."""
        kwargs = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else dict(kwargs)
        result = op(*tree_map(_here, args), **kwargs)
        if away and not to_away:
            self.wait("copy to host")
        if not to_away:
            return result
        if not away:
            self.upload("copy")
        self.launch(args[0], result)
        return Pretended(result, self)

    def _refuse_mixed(self, name: str, tensors: list[Tensor]) -> None:
        """Single numbers may come from the host, and so may indices, which are uploaded."""
        for one in tensors:
            if isinstance(one, Pretended) or one.ndim == 0 or one.numel() == 0:
                continue
            if name not in _INDEXING:
                raise MixedDevices(
                    f"{name}: a tensor of shape {tuple(one.shape)} on the CPU meets the device at {site()}"
                )
            self.upload("index")


class _Factories(TorchFunctionMode):
    """``torch.tensor`` on the device is an upload; without this its values would be lost."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if (
            func in (torch.tensor, torch.as_tensor)
            and asked is not None
            and torch.device(asked).type == AWAY.type
        ):
            self.device.upload("tensor")
            return Pretended(func(*args, **{**kwargs, "device": "cpu"}), self.device)
        return func(*args, **kwargs)


def _here(value: Any) -> Any:
    return value.here if isinstance(value, Pretended) else value


def _indices(args: tuple) -> list[Tensor]:
    given = args[1] if len(args) > 1 else ()
    return [one for one in given if isinstance(one, Tensor)] if isinstance(given, list | tuple) else []


def site() -> str:
    """The innermost line of this project or of transformers that is running."""
    for frame in reversed(traceback.extract_stack(limit=80)):
        for package in ("/vlmprune/", "/transformers/"):
            if package in frame.filename and "/testing/device" not in frame.filename:
                return f"{frame.filename.rsplit(package, 1)[1]}:{frame.lineno}"
    return "elsewhere"


@contextlib.contextmanager
def pretending(device: PretendedDevice) -> Iterator[None]:
    """Run code on the device: for tests and counts only, since names of torch are replaced meanwhile."""
    # torch has no autocast for this device
    autocast: Callable[..., Any] = torch.autocast

    def cast(device_type: str, *args: Any, **options: Any) -> Any:
        return (
            contextlib.nullcontext() if device_type == AWAY.type else autocast(device_type, *args, **options)
        )

    # shells look like meta tensors, which VisualTokens refuses
    checked = mock.patch.object(VisualTokens, "__post_init__", lambda self: None)
    with torch.no_grad(), device, _Factories(device), mock.patch.object(torch, "autocast", cast), checked:
        yield


def moved(model: nn.Module, device: PretendedDevice) -> nn.Module:
    """The model with its parameters and buffers on the device, in place."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            named: dict[str, Any] = {
                name: device.away(value) for name, value in table.items() if value is not None
            }
            table.update(named)
    return model


def count(
    make: Callable[[], nn.Module],
    inputs: Mapping[str, Any],
    spec: str | None,
    steps: int = 2,
    options: Mapping[str, Any] | None = None,
) -> dict[Phase, Counts]:
    """What ``generate`` asks of a device for a prompt and for one more token; spec None: without pruning.

    Args:
        make: gives a model of its own, which is moved to the device.
        inputs: of one prompt, on the CPU.
        steps: decode steps; the last one is counted, since the first may read what the prefill left.
        options: more keyword arguments of ``generate``.
    """
    from ..api import prune

    device, passes = PretendedDevice(), []
    model: Any = moved(make(), device)
    given = {
        name: device.away(value) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    words = {
        "max_new_tokens": steps + 1,
        "min_new_tokens": steps + 1,
        "do_sample": False,
        **(options or {}),
    }
    attached: Any = contextlib.nullcontext() if spec is None else prune(model, spec)
    with pretending(device), attached:
        model.generate(**given, **words)  # what is made once is not counted
        handle = model.register_forward_hook(lambda *call: passes.append(device.take()))
        device.take()  # counted from here on
        model.generate(**given, **words)
        handle.remove()
    return {"prefill": passes[0], "decode": passes[-1]}
