# SPDX-License-Identifier: Apache-2.0
"""AttentionCall: what an attention module handed to its attention function, and rows computed from it.

Rotation, head norms, scaling, soft caps, sinks, shared key heads and latent attention are the model's own, so
no rule of any backbone is written a second time.

Letters: B prompts (or crops), H heads, Hk key heads, n queries of this call, S keys (earlier ones included),
R rows asked for, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..core.deferred import NOW, Checks, magnitude
from ..errors import UnsupportedError

# relative error of a recomputed output row: right formulas stay below 1e-6 in float32, wrong ones exceed 0.5
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_HALF = 5e-2
_SLOTS_AT_ONCE = 128  # keys or values cast to float32 at a time
Form = tuple[Any, ...]  # of a call: one rule of attention, whatever the values
_Forms = WeakKeyDictionary[nn.Module, set[Form]]
_COMPARED: _Forms = WeakKeyDictionary()
_WAITING: WeakKeyDictionary[Checks, _Forms] = WeakKeyDictionary()


def compared_forms(call: AttentionCall, checks: Checks) -> set[Form]:
    """Forms of calls of a module whose rows were compared with its own output.

    They outlive a session, since the rule of a module does not change when hooks are put on it again. On a
    device the answer is read later, or never where an error comes first: then they live with the checks, as
    they do where the checks say so.
    """
    outlive = checks.lasting and call.keys.device.type == "cpu"
    forms = _COMPARED if outlive else _WAITING.setdefault(checks, WeakKeyDictionary())
    return forms.setdefault(call.module, set())


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
    def form(self) -> Form:
        """All that decides by which rule its module attends in this call, but for values."""
        mask, window = self.mask, self.options.get("sliding_window")
        per_head = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1
        masked = (mask.dtype, mask.ndim, per_head) if isinstance(mask, Tensor) else type(mask)
        fed, held = self.queries.shape[2], self.keys.shape[2]
        options = (self.options.get("softcap"), self.options.get("is_causal"), window)
        sizes = (fed == 1, fed == held, window is not None and held > window)
        function = getattr(getattr(self.module, "config", None), "_attn_implementation", None)
        # a forward of the instance by its number: it would keep the module alive in the memory of its forms
        forward = (getattr(type(self.module), "forward", None), id(vars(self.module).get("forward")))
        return (*forward, function, self.queries.dtype, self.flash, masked, options, sizes)

    @property
    def scaling(self) -> float:
        """Factor of the logits."""
        given = self.options.get("scaling")
        return self.queries.shape[-1] ** -0.5 if given is None else given

    def logits(self, rows: Tensor) -> Tensor:
        """(B, H, R, S) logits in float32 of the queries at ``rows`` (B, R), -inf where they may not look."""
        width = self.queries.shape[-1]
        at = rows[:, None, :, None].expand(-1, self.queries.shape[1], -1, width)
        groups = self.queries.shape[1] // self.keys.shape[1]  # query heads that share a key head
        asked = self.queries if self.queries.shape[2] == rows.shape[1] == 1 else self.queries.gather(2, at)
        queries = asked.float().unflatten(1, (-1, groups)).flatten(2, 3)  # (B, Hk, groups * R, d)
        each, folded = queries.flatten(0, 1), []
        for keys in _in_parts(self.keys):
            turned = keys.float().flatten(0, 1).transpose(1, 2)  # (B * Hk, d, s)
            # a plain matmul with a factor is several operations on a device
            folded.append(torch.baddbmm(each[..., :1], each, turned, beta=0, alpha=self.scaling))
        whole = folded[0] if len(folded) == 1 else torch.cat(folded, dim=-1)  # (B * Hk, groups * R, S)
        logits = whole.unflatten(1, (groups, -1)).unflatten(0, queries.shape[:2]).flatten(1, 2)
        softcap = self.options.get("softcap")
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return self._masked(logits, rows)

    def _masked(self, logits: Tensor, rows: Tensor) -> Tensor:
        mask = self.mask
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.is_floating_point():
            return logits + self._rows_of(mask, rows).float()
        if mask is None and self._causal and self.options.get("sliding_window") is None:
            if self.queries.shape[2] == 1:
                return logits  # one query sees all keys
            slots = torch.arange(self.keys.shape[2], device=rows.device)
            return logits.masked_fill((slots > self._own_keys(rows)[..., None])[:, None], -torch.inf)
        visible = self.visible(rows)
        return logits.masked_fill(~(visible if visible.ndim == 4 else visible[:, None]), -torch.inf)

    def _rows_of(self, mask: Tensor, rows: Tensor) -> Tensor:
        """(B, 1 or H, R, S) of a mask over all queries."""
        mask = mask[..., : self.keys.shape[2]].expand(rows.shape[0], -1, -1, -1)
        return mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))

    def visible(self, rows: Tensor) -> Tensor:
        """(B, R, S) bool, keys that a row attends to; (B, 1 or H, R, S) where the mask was given in full."""
        mask, held = self.mask, self.keys.shape[2]
        slots = torch.arange(held, device=rows.device)
        if isinstance(mask, Tensor) and mask.ndim == 4:
            mask = self._rows_of(mask, rows)
            return mask if mask.dtype == torch.bool else mask >= 0
        if hasattr(mask, "mask_mod"):  # flex attention
            batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
            return mask.mask_mod(batch, torch.zeros_like(batch), rows[..., None], slots[None, None])
        at = self._own_keys(rows)[..., None]
        everything = torch.ones(*rows.shape, held, dtype=torch.bool, device=rows.device)
        seen = slots <= at if self._causal else everything
        window = self.options.get("sliding_window")
        if window is not None:
            seen = seen & (slots > at - window)
        if isinstance(mask, Tensor):
            seen = seen & mask[:, None, :held].bool()
        return seen

    def _own_keys(self, rows: Tensor) -> Tensor:
        """(B, R), the key of every query itself."""
        held, fed = self.keys.shape[2], self.queries.shape[2]
        return rows + held - fed if (self.flash or fed == 1) and held != fed else rows

    @property
    def _causal(self) -> bool:
        given = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if given is None else given)

    def attention(self, rows: Tensor) -> Tensor:
        """(B, H, R, S) softmaxed attention in float32; with sinks (GPT-OSS) a row sums to less than 1."""
        return self.weights(self.logits(rows))

    def weights(self, logits: Tensor) -> Tensor:
        """Attention of these logits (B, H, R, S)."""
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
        # (B, Hk, groups * R, d)
        made = [
            torch.bmm(share.flatten(0, 1), part.float().flatten(0, 1))  # a plain matmul is two operations
            for share, part in zip(shares, parts, strict=True)
        ]
        folded = reduce(torch.add, made).unflatten(0, self.values.shape[:2])
        return folded.unflatten(2, (-1, weights.shape[2])).flatten(1, 2).transpose(1, 2)

    def received(self, rows: int = 16) -> Tensor:
        """(B, S) attention that each key receives, mean over heads and the queries that see it.

        Computed some rows at a time: no n x S map is held. A query whose own key is masked is padding.
        """
        call = self if self.keys.dtype == torch.float32 else replace(self, keys=self.keys.float())
        batch, heads, count = self.queries.shape[:3]
        total = torch.zeros(batch, self.keys.shape[2], device=self.keys.device)
        seen = torch.zeros_like(total)
        for some in torch.arange(count, device=self.keys.device).split(rows):
            at = some.expand(batch, -1)
            if self.mask is None:
                total += call.attention(at).sum(dim=(1, 2))
                continue
            visible = self.visible(at)
            visible = visible if visible.ndim == 3 else visible.any(dim=1)  # (B, R, S)
            real = visible.gather(2, at[..., None])  # (B, R, 1)
            total += (call.attention(at) * real[:, None]).sum(dim=(1, 2))
            seen += (visible & real).sum(dim=1)
        return total / (heads * (count if self.mask is None else seen.clamp_min(1)))

    def given(self, queries: Tensor, rows: int = 16) -> tuple[Tensor, Tensor]:
        """What some queries (B, n) bool give each key: the sum (B, H, S) of their attention, and the number
        (B, S) of those that see it. Computed some rows at a time, as ``received`` is.
        """
        call = self if self.keys.dtype == torch.float32 else replace(self, keys=self.keys.float())
        batch, heads, count = self.queries.shape[:3]
        total = torch.zeros(batch, heads, self.keys.shape[2], device=self.keys.device)
        seen = torch.zeros(batch, self.keys.shape[2], dtype=torch.int64, device=self.keys.device)
        for some in torch.arange(count, device=self.keys.device).split(rows):
            at = some.expand(batch, -1)
            real = queries[:, some]  # (B, r)
            # rows of padding may be NaN
            total += call.attention(at).where(real[:, None, :, None], 0.0).sum(dim=2)
            visible = self.visible(at)
            visible = visible if visible.ndim == 3 else visible.any(dim=1)
            seen += (visible & real[..., None]).sum(dim=1)
        return total, seen

    def of_last(self) -> AttentionCall:
        """The call of the last query alone, where that sees every key: its row takes few launches."""
        plain = self.mask is None and self.options.get("sliding_window") is None
        if plain and (self.flash or self.queries.shape[2] == self.keys.shape[2]):
            return replace(self, queries=self.queries[:, :, -1:])
        return self

    def of_heads(self, heads: Tensor) -> AttentionCall:
        """The call of some query heads (h,) alone, each with the key head that it shares."""
        shared = heads // (self.queries.shape[1] // self.keys.shape[1])
        options, mask, sinks = dict(self.options), self.mask, self.options.get("s_aux")
        if sinks is not None:
            options["s_aux"] = sinks[heads]
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, heads]
        return AttentionCall(
            self.module,
            self.queries[:, heads],
            self.keys[:, shared],
            self.values[:, shared],
            mask,
            options,
            self.flash,
        )

    def segments(self) -> list[AttentionCall]:
        """One call per segment of a sequence packed for FlashAttention; else this call alone."""
        ends = self.options.get("cu_seq_lens_q")
        if ends is None or ends.shape[0] <= 2:
            return [self]
        lengths = ends.diff().tolist()
        parts = zip(
            *(states.split(lengths, dim=2) for states in (self.queries, self.keys, self.values)), strict=True
        )
        return [replace(self, queries=q, keys=k, values=v) for q, k, v in parts]

    def biased(self, bias: Tensor | None, function: str) -> AttentionCall:
        """The call with a bias (B, 1 or H, 1, S) on its logits, as the named attention function takes it."""
        if bias is None:
            return self
        if function not in ("sdpa", "eager"):
            raise UnsupportedError(
                f"attn_implementation={function!r} of {type(self.module).__name__} takes no bias on its "
                "logits; load the model with attn_implementation='sdpa'"
            )
        if self.mask is not None:
            name = type(self.module).__name__
            raise UnsupportedError(f"{name} has a mask of its own, which a bias would hide")
        bias = bias.to(self.queries.dtype).expand(-1, -1, self.queries.shape[2], -1)
        return replace(self, mask=bias)

    def check(
        self,
        rows: Tensor,
        real: Tensor | None,
        attention: Tensor,
        output: Tensor,
        checks: Checks = NOW,
        known: set[Form] | None = None,
        whole: Form | None = None,
    ) -> None:
        """Require that ``attention`` (B, H, R, S) of ``rows`` (B, R) gives what the model itself computed.

        Args:
            real: (B, R) bool, rows to compare, the others are filling; None: all.
            output: (B, n, H, d), what the attention function returned.
            known: forms of this module that were checked before; that of this call joins them until its check
                fails.
            whole: form of the packed call that this is a segment of; every segment is compared.
        """
        known, form = set() if known is None else known, self.form if whole is None else whole
        if self.options.get("dropout"):
            return  # a model that drops weights at random gives the output of another attention
        if whole is None and form in known:
            return
        known.add(form)
        at = rows[..., None, None].expand(-1, -1, *output.shape[2:])
        given, made = output.detach().gather(1, at).float(), self.weigh(attention)
        if real is not None:
            keep = real[..., None, None]
            given, made = given.where(keep, 0.0), made.where(keep, 0.0)
        bound = _TOLERANCE.get(output.dtype, _TOLERANCE_HALF)
        wrong, largest = magnitude(made - given), magnitude(given)
        overflow = largest != largest  # NaN of the model itself: what is captured is checked for that

        def explain() -> UnsupportedError:
            known.discard(form)
            return UnsupportedError(
                f"attention rows of {type(self.module).__name__} were recomputed with an error of "
                f"{float(wrong / largest.clamp_min(1e-20)):.2g} (at most {bound:g} is rounding): it attends "
                "by a rule that is not known here; use a method that reads no attention of it, e.g. "
                "'divprune@64'"
            )

        checks.require((wrong <= bound * largest) | overflow, explain)


def _in_parts(states: Tensor) -> tuple[Tensor, ...]:
    """Keys or values (B, Hk, S, d) in parts along S: no float32 copy of all of them in half precision."""
    return (states,) if states.dtype == torch.float32 else states.split(_SLOTS_AT_ONCE, dim=2)


def over_slots(weights: Tensor, slots: int) -> Tensor:
    """(..., S) over the keys of a call -> (..., slots) over all slots of a layer.

    A static cache has empty keys behind the slots; a sliding window has forgotten the first ones, whose
    weight is 0.
    """
    held = weights.shape[-1]
    return weights[..., :slots] if held >= slots else nn.functional.pad(weights, (slots - held, 0))


def over_keys(mask: Tensor, held: int) -> Tensor:
    """(..., slots) marks over all slots of a layer -> (..., S) over the ``held`` keys of a call."""
    slots = mask.shape[-1]
    return nn.functional.pad(mask, (0, held - slots)) if held >= slots else mask[..., slots - held :]
