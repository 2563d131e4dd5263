# SPDX-License-Identifier: Apache-2.0
"""What stands in front of the attention of a decoder layer, whatever its model calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from available import available
from later_families import param
from torch import Tensor, nn

from vlmprune.errors import UnsupportedError
from vlmprune.hooks.slots.repairs import attention_norm
from vlmprune.models import adapter_for
from vlmprune.testing.backbones import BACKBONES
from vlmprune.testing.tiny import FAMILIES, tiny_inputs, tiny_model


def read_by_attention(model: Any, inputs: dict[str, Tensor]) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Per layer that attends: it, the hidden states (B, n, D) that enter it, and what its attention reads."""
    found: dict[int, list[Any]] = {}
    handles = []
    for index, layer in enumerate(adapter_for(model).language_model.layers):
        if getattr(layer, "self_attn", None) is None:  # of another kind
            continue
        found[index] = [layer]

        def note(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found[index].append((args[0] if args else kwargs["hidden_states"]).detach())

        for module in (layer, layer.self_attn):
            hook = lambda *call, index=index: note(index, *call)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return [tuple(one) for one in found.values()]


def check(model: Any, inputs: dict[str, Tensor]) -> None:
    read = read_by_attention(model, inputs)
    assert read
    for layer, enters, wanted in read:
        torch.testing.assert_close(attention_norm(layer)(enters), wanted)


@pytest.mark.parametrize("family", [param("attention norm", family, one_in=3) for family in FAMILIES])
def test_it_gives_what_attention_reads(family: str) -> None:
    model = available(family)
    if "inside_lm" in adapter_for(model).closed:
        pytest.skip("nothing acts inside this language model")
    check(model, tiny_inputs(family))


@pytest.mark.parametrize("text", sorted(BACKBONES))
def test_it_does_so_in_other_decoders(text: str) -> None:
    check(tiny_model("llava", text=text), tiny_inputs("llava"))


def test_a_layer_without_a_norm_of_a_known_name_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="use a method that ranks by attention"):
        attention_norm(nn.Linear(2, 2))
