# SPDX-License-Identifier: Apache-2.0
"""Recomputed attention rows equal those of eager attention, on every kind of decoder layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache

from vlmprune.core.rows import LayerInput, rotate
from vlmprune.errors import UnsupportedError

TEXTS = {
    "llama": ("Llama", {}),
    "llama_full_heads": ("Llama", {"num_key_value_heads": 4}),
    "mistral_sliding": ("Mistral", {"sliding_window": 5}),
    "qwen2_bias": ("Qwen2", {}),
    "qwen2_hybrid": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3_head_norms": ("Qwen3", {"head_dim": 8}),
    "gemma2_softcap": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0},
    ),
    "phi_half_rotated": ("Phi3", {"partial_rotary_factor": 0.5, "pad_token_id": 0}),
}
SUPPORTED = [name for name in TEXTS if not name.startswith("phi")]


def decoder(name, layers=2):
    prefix, options = TEXTS[name]
    fields = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = getattr(transformers, prefix + "Config")(
        **{**fields, "num_key_value_heads": 2, **options}, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = getattr(transformers, prefix + "Model")(config).eval()
    for weight in model.parameters():  # the usual std of 0.02 makes every softmax flat
        torch.nn.init.normal_(weight, std=0.4)
    return model


def run(model, embeds, mask, cache=None):
    """Inputs of every layer as LayerInput, and the attention maps of every layer."""
    found, past = [], 0 if cache is None else cache.get_seq_length()

    def watch(index):
        def hook(module, args, kwargs):
            cos, sin = kwargs["position_embeddings"]
            hidden = args[0] if args else kwargs["hidden_states"]
            found.append(LayerInput(module, index, hidden.clone(), cos, sin, mask.bool(), kwargs.get("past_key_values")))

        return hook

    handles = [layer.register_forward_pre_hook(watch(i), with_kwargs=True) for i, layer in enumerate(model.layers)]
    numbers = torch.arange(past, past + embeds.shape[1])[None]
    with torch.no_grad():
        output = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=numbers,
            past_key_values=cache,
            use_cache=cache is not None,
            output_attentions=True,
        )
    for handle in handles:
        handle.remove()
    return found, output.attentions


@pytest.mark.parametrize("name", SUPPORTED)
def test_rows_equal_eager_attention(name):
    model = decoder(name)
    embeds, mask = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0  # left padding
    rows = torch.tensor([[8, 4], [8, 6]])
    for given, maps in zip(*run(model, embeds, mask), strict=True):
        with torch.no_grad():
            got = given.attention(rows)
        assert got.dtype == torch.float32
        for row in range(2):
            torch.testing.assert_close(got[row], maps[row][:, rows[row]], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3_head_norms"])
def test_rows_of_a_later_turn_take_earlier_keys_from_the_cache(name):
    model, cache = decoder(name), DynamicCache()
    random = torch.Generator().manual_seed(2)
    first, second = (torch.randn(1, n, 32, generator=random) for n in (7, 4))
    run(model, first, torch.ones(1, 7, dtype=torch.long), cache)
    seen = []

    def compare(module, args, kwargs):  # while earlier keys are all that the cache holds
        cos, sin = kwargs["position_embeddings"]
        hidden = args[0] if args else kwargs["hidden_states"]
        given = LayerInput(module, 0, hidden, cos, sin, torch.ones(1, 11, dtype=torch.bool), cache)
        assert given.past == 7
        seen.append((given.attention(torch.tensor([[3, 0]])), given.values().shape))

    handle = model.layers[0].register_forward_pre_hook(compare, with_kwargs=True)
    _, maps = run(model, second, torch.ones(1, 11, dtype=torch.long), cache)
    handle.remove()
    (rows, values) = seen[0]
    torch.testing.assert_close(rows[0], maps[0][0][:, [3, 0]], atol=1e-6, rtol=1e-4)
    assert values[2] == 11


def test_slots_that_a_sliding_window_forgot_are_an_error():
    model, cache = decoder("mistral_sliding"), DynamicCache(config=decoder("mistral_sliding").config)
    run(model, torch.randn(1, 9, 32), torch.ones(1, 9, dtype=torch.long), cache)
    given = LayerInput(
        model.layers[0], 0, torch.randn(1, 2, 32), torch.ones(1, 2, 8), torch.zeros(1, 2, 8), torch.ones(1, 11).bool(), cache
    )
    with pytest.raises(UnsupportedError, match=r"layer 0 holds \d of the 9 earlier slots \(a sliding window forgets them\)"):
        given.attention(torch.tensor([[1]]))


def test_a_fused_projection_is_refused():
    model = decoder("phi_half_rotated")
    given, _ = run(model, torch.randn(1, 4, 32), torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(UnsupportedError, match="Phi3Attention has no q_proj"):
        given[0].attention(torch.tensor([[3]]))


def test_a_row_sees_real_slots_up_to_itself_and_no_further_than_its_window():
    attention = SimpleNamespace(config=SimpleNamespace(), sliding_window=3, head_dim=2)
    layer = SimpleNamespace(self_attn=attention)
    valid = torch.tensor([[False, True, True, True, True, True]])  # two slots held, four fed
    given = LayerInput(layer, 0, torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), valid)
    assert given.visible(torch.tensor([[0, 3]])).int().tolist() == [[[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]]
    attention.sliding_window = None
    assert given.visible(torch.tensor([[0, 3]])).int().tolist() == [[[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]]]


def test_angles_narrower_than_a_head_rotate_its_first_part():
    states = torch.arange(6.0).view(1, 1, 1, 6)
    quarter = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)  # cos 0, sin 1
    assert rotate(states, *quarter).flatten().tolist() == [-2.0, -3.0, 0.0, 1.0, 4.0, 5.0]
