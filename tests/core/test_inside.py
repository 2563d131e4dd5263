# SPDX-License-Identifier: Apache-2.0
"""Cuts between decoder layers: against the slow twin where models differ, by numbers written out where they
do not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from given_decoder import attach_to_decoder, given_decoder
from transformers import LlamaConfig, LlamaForCausalLM

import vlmprune
from vlmprune.core.method import CutPoint, Merged, Method
from vlmprune.methods.fastv import FastV
from vlmprune.methods.pyramiddrop import PyramidDrop
from vlmprune.spec import Budget
from vlmprune.testing.checks_inside import eager_model, twins
from vlmprune.testing.conformance import RAGGED, generate, shared_model
from vlmprune.testing.reference import kept_by_hand
from vlmprune.testing.reference_inside import Twin
from vlmprune.testing.tiny import tiny_inputs, tiny_model


@dataclass(frozen=True)
class Steps(Method):
    """Cuts at neighbouring layers, each ranked by the layer before or by its own; all text after the picture
    is asked.
    """

    own: bool = False

    slot: ClassVar[str] = "inside_lm"
    positions: ClassVar[str] = "original"
    needs: ClassVar[tuple[str, ...]] = ("text_attention",)

    def cuts(self, depth, budget, count):
        return tuple(
            CutPoint(layer, count // layer // 2, layer if self.own else layer - 1) for layer in (1, 2, 3)
        )

    def raters(self, text, visual):
        return torch.arange(text.shape[0]) != 1  # rows of a batch have unlike numbers of them

    def score(self, tokens):
        asked = tokens.text_attention * tokens.query_mask[:, None, :, None]
        near = 1 / (1 + tokens.query_positions[:, -1:] - tokens.positions)  # (B, N)
        return asked.sum(2).mean(1) + 0.01 * near + 0.001 * tokens.features[..., 0].sigmoid()


@dataclass(frozen=True)
class Folds(Steps):
    """The same with two rows of their own per picture: means of what is cut."""

    def merge(self, tokens, k):
        order = self.score(tokens).sort(dim=1, descending=True, stable=True).indices
        kept, cut = order[:, : k - 2].sort(dim=1).values, order[:, k - 2 :]
        rows = tokens.features.gather(1, cut[..., None].expand(-1, -1, tokens.features.shape[-1]))
        means = torch.stack([rows[:, ::2].mean(1), rows[:, 1::2].mean(1)], dim=1)
        whole = tokens.features.gather(1, kept[..., None].expand(-1, -1, means.shape[-1]))
        return Merged(
            torch.cat([whole, means], 1), torch.cat([kept, kept.new_full((kept.shape[0], 2), -1)], 1)
        )


def subject(method, keep=None, family="llava"):
    budget = None if keep is None else Budget(keep)
    return SimpleNamespace(family=family, tower=None, text=None, method=method, budget=budget)


def attached(method, keep, model, **options):
    """Like prune, for methods that need no budget of their own."""
    if isinstance(method, Steps):
        keep = 1.0 if keep is None else keep
    return vlmprune.prune(model, method, keep=keep, **options)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize(
    ("method", "keep", "family"),
    [
        (Steps(), None, "llava"),
        (Steps(own=True), None, "llava_next"),
        (Folds(), None, "llava_next"),
        (Folds(own=True), None, "llava"),
        (FastV(layer=1), 50, "llava_onevision"),
        (PyramidDrop(layers=(1, 3)), 0.4, "llava_next"),
    ],
    ids=str,
)
def test_every_row_answers_as_the_twin(method, keep, family, positions):
    """Among the pictures of llava_onevision with keep = 50 only the tiled one is cut: the others hold 36
    tokens.
    """
    model, inputs = shared_model(family, None, None), tiny_inputs(family, images=RAGGED)
    with attached(method, keep, model, positions=positions) as run:
        ids = generate(model, inputs)
        counts = run.last.dense_tokens
    for got, twin in zip(ids, twins(subject(method, keep, family), inputs, counts, positions), strict=True):
        assert got.tolist() == twin.greedy(5)


def test_all_kept_columns_have_the_twins_logits_and_cut_ones_repeat_the_last_kept():
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    with vlmprune.prune(model, "fastv@9") as run, torch.no_grad():
        logits = model(**inputs).logits[0]
    twin = twins(subject(FastV(), 9), inputs, run.last.dense_tokens, "original")[0]
    want, kept = twin.logits(), twin.kept[2]
    torch.testing.assert_close(logits[kept], want, atol=1e-4, rtol=1e-4)
    for column in sorted(set(range(len(logits))) - set(kept)):
        assert torch.equal(logits[column], logits[max(c for c in kept if c < column)])


def test_hidden_states_are_dense_up_to_the_cut_and_of_full_length_after_it():
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1, 2))
    with torch.no_grad():
        dense = model(**inputs, output_hidden_states=True).hidden_states
        with vlmprune.prune(model, "fastv(layer=2)@9"):
            cut = model(**inputs, output_hidden_states=True).hidden_states
    assert [h.shape for h in cut] == [h.shape for h in dense]
    kept = inputs["attention_mask"].bool()
    assert torch.equal(cut[1][kept], dense[1][kept]) and not torch.allclose(cut[3][kept], dense[3][kept])


def test_pictures_below_the_budget_leave_the_call_alone():
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1, 2))
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, "fastv@36") as run:
            assert torch.equal(model(**inputs).logits, dense)
    assert not run.last.pruned and "stage" not in run.last.firings


def test_the_report_tells_tokens_of_every_layer():
    model = shared_model("llava", None, None)
    with vlmprune.prune(model, "pyramiddrop(layers=[1,3],shares=[0.5,0.25])") as run, torch.no_grad():
        model(**tiny_inputs(images=(1, 0, 2)))
    report = run.last
    assert report.tokens_per_layer == [36.0, 18.0, 18.0, 9.0]
    assert report.realised_tokens == [9, 9, 9] and [len(one) for one in report.keep] == [9, 9, 9]
    assert report.firings == {"encode": 1, "stage": 2, "exit": 1}
    dense, realised = report.sequence
    assert dense - realised == 2 * (36 - 9)  # the longest row has two pictures


def test_frames_of_a_clip_share_one_budget_and_have_a_map_each():
    model = shared_model("llava_onevision", None, None)
    with vlmprune.prune(model, "fastv@9") as run, torch.no_grad():
        model(**tiny_inputs("llava_onevision", images=(0,), video=True))
    assert run.last.dense_tokens == [27] and [one.frame for one in run.last.keep] == [0, 1, 2]
    assert sum(len(one) for one in run.last.keep) == 9


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_cut_before_the_language_model_comes_first(positions):
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1, 2))
    with vlmprune.prune(model, "fastervlm@18", positions=positions) as run:
        generate(model, inputs)
        maps = run.last.keep
    with vlmprune.prune(model, "fastervlm@18+fastv@9", positions=positions) as run:
        ids = generate(model, inputs)
    assert run.last.realised_tokens == [9, 9, 9]
    eager = eager_model("llava", None, None)
    for row, kept in enumerate(kept_by_hand(eager, inputs, maps, positions)):
        first = 1 + 5 + row  # [BOS] and words before the first picture
        spans = [
            list(range(first + n * (18 + 5 + row), first + n * (18 + 5 + row) + 18)) for n in range(row + 1)
        ]
        text = list(range(spans[-1][-1] + 1, kept.embeds.shape[1]))
        twin = Twin(eager, FastV(), Budget(9), positions, kept, spans, text)
        assert ids[row].tolist() == twin.greedy(5)


def test_a_prompt_read_in_two_calls_is_cut_as_in_one():
    """Text before the picture is cached already: rows read the cached keys."""
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    head = {name: inputs[name][:, :4] for name in ("input_ids", "attention_mask")}
    for spec in ("fastv@9", "pyramiddrop(layers=[1,2])@0.4"):
        with vlmprune.prune(model, spec) as run, torch.no_grad():
            want = model(**inputs).logits[:, -1]
            kept = run.last.keep[0].keep_idx.tolist()
            cache = model(**head, use_cache=True).past_key_values
            tail = {"input_ids": inputs["input_ids"][:, 4:], "pixel_values": inputs["pixel_values"]}
            got = model(**tail, attention_mask=inputs["attention_mask"], past_key_values=cache).logits[:, -1]
        assert run.last.keep[0].keep_idx.tolist() == kept
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_new_image_in_turn_two_is_ranked_by_the_last_token_of_that_turn():
    """Layers before the cut read everything, so that the choice can be made by hand on the whole dialogue."""
    model = shared_model("llava", None, None)
    first, second = tiny_inputs(images=(1,)), tiny_inputs(images=(1,), seed=1)
    whole = {name: torch.cat([first[name], second[name]], 1) for name in ("input_ids", "attention_mask")}
    whole["pixel_values"] = torch.cat([first["pixel_values"], second["pixel_values"]])
    with vlmprune.prune(model, "fastv@9") as run, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        dropped = set(range(36)) - set(run.last.keep[0].keep_idx.tolist())
        turn = {**second, "attention_mask": whole["attention_mask"]}
        got = model(**turn, past_key_values=cache).logits[0, -1]
        held, seen = [cache.get_seq_length(layer) for layer in range(4)], cache.get_seq_length()
    n = whole["input_ids"].shape[1]
    assert held == [n, n, n - 54, n - 54] and seen == n
    twin = twins(subject(FastV(), 9), whole, [36, 36], "original")[0]
    old = twin.pictures.pop(0)
    twin.logits()  # chooses in the second picture
    twin.kept[2] = [c for c in twin.kept[2] if c not in {old[i] for i in dropped}]
    torch.testing.assert_close(got, twin.logits()[-1], atol=1e-4, rtol=1e-4)


def test_slots_held_and_seen_follow_the_schedule_and_decoding_counts_on():
    """Positions 0..9 with a picture at 2..7; two of six tokens go on from layer 1, one from layer 2."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 9,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    state = {
        name: torch.randn(value.shape)
        for name, value in LlamaForCausalLM(LlamaConfig(**sizes)).state_dict().items()
    }
    model, embeds, method = (
        given_decoder(sizes, state),
        torch.randn(1, 10, 16),
        PyramidDrop(layers=(1, 2), shares=(0.34, 0.17)),
    )
    for policy, numbers in (("compact", ([10], [6], [5])), ("original", ([10], [10], [10]))):
        asked, turned = [], []

        def turn(module, args, kwargs, turned=turned):
            turned.append(kwargs["position_embeddings"])

        def ask(module, args, kwargs, asked=asked):
            asked.append(args[1] if len(args) > 1 else kwargs["position_ids"])

        handle = model.language_model.rotary_emb.register_forward_pre_hook(ask, with_kwargs=True)
        with torch.no_grad(), attach_to_decoder(model, method, positions=policy) as run:
            spy = model.language_model.layers[2].register_forward_pre_hook(turn, with_kwargs=True)
            cache = model.read(embeds, [(2, 8)]).past_key_values
            spy.remove()
            assert [cache.get_seq_length(layer) for layer in range(3)] == [
                10,
                6,
                5,
            ] and cache.get_seq_length() == 10
            kept = [2 + i for i in run.last.keep[0].keep_idx.tolist()]
            places = [0, 1, 2, 3, 4] if policy == "compact" else [0, 1, *kept, 8, 9]
            want = model.language_model.rotary_emb(embeds, torch.tensor([places]))
            assert all(torch.equal(got, one) for got, one in zip(turned[0], want, strict=True))
            asked.clear()
            model.step(torch.randn(1, 1, 16), cache)
        handle.remove()
        # of all groups of layers at once, where their positions are as many
        assert {n for p in asked for n in p.flatten().tolist()} == {n for one in numbers for n in one}


def test_drafts_after_the_prompt_do_not_rank():
    """Assisted decoding appends them to the prompt and asks for their logits: the token before them is the
    last of the prompt.
    """
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[7, 8, 9]])], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    with vlmprune.prune(model, "fastv@9") as run, torch.no_grad():
        want = model(**inputs).logits[0, -1]
        kept = run.last.keep[0].keep_idx.tolist()
        got = model(**longer, logits_to_keep=4).logits[0, 0]
        assert run.last.keep[0].keep_idx.tolist() == kept
        model(**longer)
        assert run.last.keep[0].keep_idx.tolist() != kept  # without drafts the last token is another one
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_text_gradients_equal_those_of_masking():
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    with vlmprune.prune(model, "fastv@9") as run:
        model(**inputs).logits[0, -1].square().sum().backward()
        got = (
            model.lm_head.weight.grad.clone(),
            model.model.language_model.layers[3].mlp.up_proj.weight.grad.clone(),
        )
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    eager.zero_grad()
    twin = twins(subject(FastV(), 9), inputs, run.last.dense_tokens, "original")[0]
    twin.model = eager
    twin.logits()
    Twin.logits.__wrapped__(twin)[-1].square().sum().backward()
    want = eager.lm_head.weight.grad, eager.model.language_model.layers[3].mlp.up_proj.weight.grad
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_switched_off_between_turns_the_cut_cache_is_still_read_right():
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    with vlmprune.prune(model, "pyramiddrop@0.5") as run, torch.no_grad():
        want = generate(model, inputs)
        output = model(**inputs, use_cache=True)
        run.enabled = False
        ids = [int(output.logits[0, -1, :256].argmax())]
        for _ in range(4):
            output = model(
                input_ids=torch.tensor([ids[-1:]]), past_key_values=output.past_key_values, use_cache=True
            )
            ids.append(int(output.logits[0, -1, :256].argmax()))
        assert ids == want[0].tolist()
