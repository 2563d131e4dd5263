# SPDX-License-Identifier: Apache-2.0
"""SparseVLM inside a model equals layers called one by one on what is left, without a cache."""

from __future__ import annotations

import copy
from itertools import groupby

import pytest
import torch

import vlmprune
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.sparsevlm import SparseVLM
from vlmprune.methods.sparsevlm.recycling import pick, recycle
from vlmprune.testing.conformance import generate
from vlmprune.testing.reference import merged_embeddings, placeholder_columns
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row

# patches kept of 36 at keep=20: a third of the way from the published row of 192 to 576, over 16
KEPT = (24, 20, 17)
READ = {"v1.5": [36, 25, 21, 18], "plus": [36, 24, 20, 17]}  # one cluster more in every cut of v1.5


class ByHand:
    """One sample with 36 patches per picture; layers 0, 1 and 2 of 4 rank what they hand on."""

    def __init__(self, model, row, version):
        self.model, self.version, self.method = model, version, SparseVLM(version=version)
        self.embeds = merged_embeddings(model, row)[0]
        columns = placeholder_columns(model, row["input_ids"], self.embeds[None])[0]
        self.owner = [columns.index(i) // 36 if i in columns else -1 for i in range(len(self.embeds))]
        end = max(columns) + 1
        self.raters = [False] * end + self.method.raters(self.embeds[end:], self.embeds[columns]).tolist()

    @torch.no_grad()
    def logits(self, new):
        """(n, V) logits after the prompt and ``new`` (t, D) embeddings."""
        lm, hidden = self.model.model.language_model, torch.cat([self.embeds, new])
        owner, raters, numbers = (
            self.owner + [-1] * len(new),
            self.raters + [False] * len(new),
            list(range(len(hidden))),
        )
        for index, layer in enumerate(lm.layers):
            mask = torch.full((1, 1, len(hidden), len(hidden)), torch.finfo(torch.float32).min).triu(1)
            given = {
                "position_embeddings": lm.rotary_emb(hidden[None], torch.tensor([numbers])),
                "attention_mask": mask,
            }
            maps = layer.self_attn(hidden_states=layer.input_layernorm(hidden[None]), **given)[1]
            out = layer(hidden[None], **given)
            hidden = (out[0] if isinstance(out, tuple) else out)[0]
            if index < 3:
                hidden, owner, raters, numbers = self.cut(KEPT[index], hidden, owner, raters, numbers, maps)
        return self.model.lm_head(lm.norm(hidden))

    def cut(self, kept, hidden, owner, raters, numbers, maps):
        rows, left, rate, places = [], [], [], []
        queries = [i for i, rates in enumerate(raters) if rates]
        for picture, block in groupby(range(len(hidden)), key=owner.__getitem__):
            at = list(block)
            if picture < 0:
                rows.append(hidden[at])
                left, rate, places = (
                    left + [-1] * len(at),
                    rate + [raters[i] for i in at],
                    places + [numbers[i] for i in at],
                )
                continue
            tokens = VisualTokens(
                text_attention=maps[:, :, queries][..., at],
                query_positions=torch.tensor([[numbers[q] for q in queries]]),
                positions=torch.tensor([[numbers[i] for i in at]]),
                rotary_frequencies=self.model.model.language_model.rotary_emb.inv_freq,
            )
            reduce = recycle if self.version == "v1.5" else pick
            made = reduce(hidden[None, at], self.method.score(tokens), kept)
            count = made.slots.shape[1]
            rows.append(made.features[0])
            left, rate = left + [picture] * count, rate + [False] * count
            places += [numbers[at[slot]] if slot >= 0 else -1 for slot in made.slots[0].tolist()]
        return torch.cat(rows), left, rate, list(range(len(left))) if self.version == "v1.5" else places

    def greedy(self, steps):
        ids, new = [], self.embeds[:0]
        for _ in range(steps):
            logits = self.logits(new)[-1]
            logits[self.model.generation_config.suppress_tokens] = -torch.inf
            ids.append(int(logits.argmax()))
            new = self.model.get_input_embeddings()(torch.tensor(ids)).detach()
        return ids


@pytest.fixture(scope="module")
def model():
    found = tiny_model("llava")
    found.set_attn_implementation("eager")
    return found


@pytest.mark.parametrize("version", READ)
def test_rows_of_a_ragged_batch_answer_as_by_hand(model, version):
    images = (1, 2, 0, 1)
    batch = tiny_inputs("llava", images=images, text_len=8)
    with vlmprune.prune(model, SparseVLM(version=version), keep=20) as run, torch.no_grad():
        answers = generate(model, batch, max_new_tokens=3)
        assert (run.last.tokens_per_layer, run.last.realised_tokens) == (
            READ[version],
            [READ[version][-1]] * 4,
        )
        logits = [model(**tiny_row(batch, "llava", i, images)).logits[0, -1] for i in range(4)]
    for i in (0, 1, 3):
        twin = ByHand(model, tiny_row(batch, "llava", i, images), version)
        torch.testing.assert_close(logits[i], twin.logits(twin.embeds[:0])[-1], rtol=1e-4, atol=2e-5)
        assert answers[i].tolist() == twin.greedy(3)


@pytest.mark.parametrize("version", READ)
def test_beams_static_caches_and_second_turns(model, version):
    images = (1, 2)
    batch = tiny_inputs("llava", images=images)
    with vlmprune.prune(model, SparseVLM(version=version), keep=20), torch.no_grad():
        first = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(
            generate(model, batch, max_new_tokens=3, cache_implementation="static"), first.sequences[:, -3:]
        )
        beams = generate(model, batch, num_beams=3)
        for i in range(2):
            assert torch.equal(generate(model, tiny_row(batch, "llava", i, images), num_beams=3)[0], beams[i])
        ids = torch.cat([first.sequences, torch.full((2, 4), 7)], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 7, dtype=torch.long)], dim=1)
        held = copy.deepcopy(first.past_key_values)
        again = generate(model, {"input_ids": ids, "attention_mask": mask}, cache=first.past_key_values)
        alone = [held_row(held, ids, mask, model, i) for i in range(2)]
    assert [row.tolist() for row in again] == alone


def held_row(held, ids, mask, model, row):
    """Answer of one row of a conversation, from its own copy of the cache with that row repeated."""
    cache = copy.deepcopy(held)
    cache.reorder_cache(torch.tensor([row, row]))
    turn = {"input_ids": ids[[row, row]], "attention_mask": mask[[row, row]]}
    return generate(model, turn, cache=cache)[0].tolist()


@pytest.mark.parametrize("version", READ)
def test_a_full_budget_is_the_dense_model_bit_for_bit(model, version):
    batch = tiny_inputs("llava")
    with torch.no_grad():
        dense = model(**batch).logits
        with vlmprune.prune(model, SparseVLM(version=version), keep=1.0):
            assert torch.equal(model(**batch).logits, dense)
