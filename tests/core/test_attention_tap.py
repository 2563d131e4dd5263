# SPDX-License-Identifier: Apache-2.0
"""Attention rows taken at the attention function equal those of eager attention, on every kind of decoder
layer.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

import vlmprune
from vlmprune.errors import UnsupportedError
from vlmprune.hooks.attention_call import AttentionCall, over_keys, over_slots
from vlmprune.hooks.attention_tap import AttentionTap, TappedConfig, find_attention, probe, tap, walk
from vlmprune.testing.backbones import BACKBONES, RECURRENT
from vlmprune.testing.tiny import tiny_inputs, tiny_model

LAYER = 1  # whose rows rank: hybrids have attention here and in the next layer


def available(name: str) -> bool:
    import transformers

    return hasattr(transformers, BACKBONES[name][0] + "Config")


REFUSED = ("falcon_h1",)  # layers of a kind whose masks cannot be made again
NAMES = [name for name in BACKBONES if available(name)]


def eager_maps(name: str, inputs: dict[str, Tensor]) -> Tensor:
    """(B, H, L, L) attention of layer ``LAYER`` as the model's own eager attention has it."""
    model = tiny_model("llava", text=name)
    model.set_attn_implementation("eager")
    maps: list[Tensor] = []
    layer = model.model.language_model.layers[LAYER]
    attention = find_attention(layer)
    handle = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    return maps[0]


def kept_of(model: nn.Module, inputs: dict[str, Tensor], spec: str) -> list[list[int]]:
    with vlmprune.prune(model, spec) as run, torch.no_grad():
        model(**inputs)
    return [keep.keep_idx.tolist() for keep in run.last.keep]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_cuts_inside_rank_by_the_attention_that_the_backbone_has(name: str) -> None:
    inputs = tiny_inputs("llava", images=(1, 1), seed=3)
    model = tiny_model("llava", text=name)
    maps = eager_maps(name, inputs)
    visual = inputs["input_ids"] == model.config.image_token_id
    want = []
    for row in range(2):
        scores = (
            maps[row, :, -1, visual[row]].float().mean(0)
        )  # the last token of the prompt, mean over heads
        want.append(
            scores.sort(descending=True, stable=True).indices[:9].sort().values.tolist()
        )  # ties: lower index
    # FastV reads the layer before the cut, which has run; PyramidDrop the layer itself, which has not
    assert kept_of(model, inputs, f"fastv(layer={LAYER + 1})@9") == want
    assert kept_of(model, inputs, f"pyramiddrop(layers=[{LAYER}],shares=[0.25])") == want


@pytest.mark.parametrize(
    "name", ["llama", "gpt_oss", "qwen3", "deepseek_v3", "gemma3_text", "mistral_sliding", "smollm3"]
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_of_a_later_turn_include_what_the_cache_holds(name: str, implementation: str) -> None:
    if name == "gpt_oss" and implementation == "sdpa":
        pytest.skip("transformers has no SDPA for it")
    model = tiny_model("llava", text=name).model.language_model
    model.set_attn_implementation(implementation)
    first, second = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0)).split([8, 4], dim=1)
    cache, whole = DynamicCache(config=model.config), torch.cat([first, second], dim=1)
    seen: dict[str, Tensor] = {}
    rows = torch.tensor([[3, 0], [3, 1]])
    layer = model.layers[LAYER]

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        keyword = "cache" if "cache" in kwargs else "past_key_values"
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if kwargs.get(keyword) is not None:
            seen["probed"] = probe(layer, hidden, kwargs, keyword, 8).attention(rows)

    def listen(call: AttentionCall, output: Tensor) -> None:
        at = rows if call.queries.shape[2] == 4 else rows + 8
        seen["cached" if call.queries.shape[2] == 4 else "whole"] = call.attention(at)
        call.check(at, None, call.attention(at), output)

    with torch.no_grad():
        model(inputs_embeds=first, past_key_values=cache)
        watching = AttentionTap(find_attention(layer), listen)
        watching.install()
        model(inputs_embeds=whole, use_cache=False)
        handle = layer.register_forward_pre_hook(before, with_kwargs=True)
        model(inputs_embeds=second, past_key_values=cache)
        handle.remove()
        watching.remove()
    for way in ("probed", "cached"):
        torch.testing.assert_close(over_slots(seen[way], 12), seen["whole"], atol=2e-6, rtol=1e-4)
    assert cache.get_seq_length() == 12, "the probe wrote to the cache"


def test_a_row_sees_what_the_mask_of_its_call_lets_it_see() -> None:
    states = (
        torch.zeros(1, 1, 4, 2),
        torch.zeros(1, 1, 6, 2),
        torch.zeros(1, 1, 6, 2),
    )  # two slots held, four fed
    rows = torch.tensor([[0, 3]])

    def seen(mask: Tensor | None, flash: bool = True, **options: object) -> list:
        return AttentionCall(nn.Module(), *states, mask, options, flash).visible(rows).int().tolist()

    assert seen(None) == [[[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]]
    assert seen(None, flash=False) == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    ]  # a static cache in its first turn
    assert seen(None, is_causal=False) == [[[1] * 6, [1] * 6]]
    assert seen(None, sliding_window=3) == [[[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]]
    padding = torch.tensor([[0, 1, 1, 1, 1, 1]])  # as FlashAttention gets it
    assert seen(padding, sliding_window=4) == [[[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]]
    whole = torch.eye(4, 8).bool()[None, None]  # a static cache has empty keys behind
    assert seen(whole, sliding_window=1) == [[[[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]]]


def test_queries_of_padding_give_no_attention_to_the_keys_of_a_picture() -> None:
    """SigLIP 2 fills pictures up to one length: keys of the filling are masked, its queries look all the
    same.
    """
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    mask = (torch.arange(6) < 4)[None, None, None].expand(1, 1, 6, 6)
    filled = AttentionCall(nn.Module(), queries, keys, keys, mask, {"is_causal": False}).received(rows=4)
    part = (states[:, :, :4] for states in (queries, keys, keys))
    alone = AttentionCall(nn.Module(), *part, None, {"is_causal": False}).received()
    torch.testing.assert_close(filled[:, :4], alone)
    assert filled[0, 4:].tolist() == [0, 0]


def test_additive_masks_may_hold_a_bias() -> None:
    queries = torch.zeros(1, 1, 1, 2)
    bias = torch.tensor([[[[0.0, 1.0, torch.finfo(torch.float32).min]]]])
    call = AttentionCall(nn.Module(), queries, torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), bias, {})
    torch.testing.assert_close(
        call.attention(torch.tensor([[0]]))[0, 0, 0], torch.tensor([0.0, 1.0, -1e30]).softmax(-1)
    )


def test_weights_over_keys_and_over_slots_turn_into_each_other() -> None:
    five = torch.arange(5.0)[None]
    assert over_slots(five, 3).tolist() == [[0, 1, 2]]
    assert over_slots(five, 7).tolist() == [[0, 0, 0, 1, 2, 3, 4]]
    mask = torch.tensor([[True, False, True]])
    assert over_keys(mask, 5).tolist() == [[True, False, True, False, False]]
    assert over_keys(mask, 2).tolist() == [[False, True]]


@pytest.mark.parametrize("spec", ["fastv(layer=2)@9", "pyramiddrop(layers=[2],shares=[0.25])"])
def test_an_attention_rule_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    """A backbone whose attention function does more than its arguments say."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava")
    monkeypatch.setattr(AttentionCall, "scaling", property(lambda call: 0.9 * call.queries.shape[-1] ** -0.5))
    with pytest.raises(UnsupportedError, match="LlamaAttention were recomputed with an error of"):
        kept_of(model, inputs, spec)


def test_rows_are_compared_once_for_each_form_of_call_and_again_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[AttentionCall] = []
    weigh, scaling = AttentionCall.weigh, AttentionCall.scaling
    monkeypatch.setattr(
        AttentionCall, "weigh", lambda call, weights: compared.append(call) or weigh(call, weights)
    )
    model, one, padded = tiny_model("llava"), tiny_inputs("llava"), tiny_inputs("llava", images=(1, 2))
    with vlmprune.prune(model, "fastv(layer=2)@9"), torch.no_grad():
        for inputs, want in ((one, 1), (one, 1), (padded, 2), (one, 2), (padded, 2)):
            model(**inputs)
            assert len(compared) == want
        model.set_attn_implementation("eager")
        monkeypatch.setattr(AttentionCall, "scaling", property(lambda call: 0.9 * scaling.fget(call)))
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="were recomputed with an error of"):
                model(**one)


def test_half_precision_is_within_the_bound_of_the_check() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_model("llava", dtype=dtype)
        inputs = {
            k: v.to(dtype) if v.is_floating_point() else v
            for k, v in tiny_inputs("llava", images=(1, 1)).items()
        }
        assert [len(kept) for kept in kept_of(model, inputs, "fastv(layer=2)@9")] == [9, 9]


def test_a_tap_leaves_nothing_behind_and_several_may_watch_one_module() -> None:
    model = tiny_model("llava").model.language_model
    attention = find_attention(model.layers[0])
    own, counts = attention.config, [0, 0]

    def count(number: int) -> AttentionTap:
        def listen(call: AttentionCall, output: Tensor) -> None:
            counts[number] += 1

        return AttentionTap(attention, listen)

    first, second = count(0), count(1)
    first.install()
    second.install()
    assert isinstance(attention.config, TappedConfig) and attention.config.hidden_size == own.hidden_size
    hidden = torch.randn(1, 3, 64)
    with torch.no_grad():
        model(inputs_embeds=hidden)
        first.remove()
        first.remove()
        model(inputs_embeds=hidden)
        with pytest.raises(UnsupportedError, match="cannot be copied"):
            copy.deepcopy(attention)
        second.remove()
    assert counts == [1, 2] and attention.config is own


def test_the_implementation_may_change_while_a_tap_is_installed() -> None:
    model = tiny_model("llava").model.language_model
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    made = tap(model.layers[0], 0, "mine", lambda call, output: None)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        assert find_attention(model.layers[0]).config._attn_implementation.endswith("eager")
        eager = model(inputs_embeds=hidden).last_hidden_state
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(inputs_embeds=hidden).last_hidden_state, eager, atol=1e-5, rtol=1e-4)
    made.remove()


@pytest.mark.parametrize("name", [name for name in REFUSED if name in NAMES])
def test_layers_whose_masks_cannot_be_made_again_are_refused(name: str) -> None:
    with pytest.raises(
        UnsupportedError, match=r"fastv cuts inside the language model, but layer 2 of this .* is of kind"
    ):
        vlmprune.prune(tiny_model("llava", text=name), "fastv(layer=2)@9")


@pytest.mark.parametrize("name", [name for name in RECURRENT if name in NAMES and name not in REFUSED])
def test_layers_without_attention_are_refused_by_name(name: str) -> None:
    model, inputs = tiny_model("llava", text=name), tiny_inputs("llava")
    with pytest.raises(
        UnsupportedError, match=r"fastv reads the attention of decoder layer 0, a .* without attention"
    ):
        kept_of(model, inputs, "fastv(layer=1)@9")


def test_modules_are_walked_as_torch_walks_them():
    shared = nn.Linear(1, 1)
    module = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    module.add_module("itself", module)
    assert list(walk(module)) == list(module.modules())


class Products(TorchFunctionMode):
    """Counts the columns that each matrix is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: dict[int, int] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is nn.functional.linear:
            self.columns[id(args[1])] = args[0].shape[-2]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3", "deepseek_v3", "gemma3_text", "smollm3"])
def test_a_probe_computes_only_what_ranks(name: str) -> None:
    """No values, and on request one query: the row of the last token is that of the whole call."""
    model = tiny_model("llava", text=name).model.language_model
    hidden, layer = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0)), model.layers[LAYER]
    attention, rows = find_attention(layer), torch.full((2, 1), 11)
    seen: dict[str, Tensor] = {}
    watching, products = AttentionTap(attention, lambda call, output: None), Products()

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else kwargs.pop("hidden_states")
        seen["whole"] = probe(layer, given, kwargs, None, 0).attention(rows)
        with products:
            seen["last"] = probe(layer, given, kwargs, None, 0, last=True).attention(rows)

    watching.install()
    handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        model(inputs_embeds=hidden, use_cache=False)
    handle.remove()
    watching.remove()
    torch.testing.assert_close(seen["last"], seen["whole"], atol=1e-6, rtol=1e-5)
    columns = {
        part: products.columns.get(id(getattr(attention, part).weight))
        for part in ("q_proj", "k_proj", "v_proj")
        if getattr(attention, part, None) is not None
    }
    # latent attention keeps its matrices under other names
    assert columns == ({} if name == "deepseek_v3" else {"q_proj": 1, "k_proj": 12, "v_proj": None})


def test_a_copy_of_the_config_of_a_tapped_module_is_one_of_its_own_config() -> None:
    model = tiny_model("llava")
    attention = model.model.language_model.layers[1].self_attn
    own = attention.config
    with vlmprune.prune(model, "fastv(layer=2)@9"):
        assert attention.config is not own
        other = copy.copy(attention.config)
        assert type(other) is type(own) and other is not own
        assert other._attn_implementation == own._attn_implementation
