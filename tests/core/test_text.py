# SPDX-License-Identifier: Apache-2.0
"""The text that a picture is asked about: which words a method reads, and whose picture it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from given_decoder import attach_to_decoder, given_decoder
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import vlmprune
from vlmprune.core.method import Method, Need
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, SpecError
from vlmprune.methods.baselines import Uniform
from vlmprune.testing.processors import BOS_ID, EOS_ID
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row

FAMILIES = ("llava", "llava_next", "qwen2_vl", "gemma3")


@dataclass(frozen=True)
class Asked(Method):
    """Scores tokens by their likeness to the text, and notes what it was given."""

    text: str = "question"
    seen: list[VisualTokens] = field(default_factory=list)

    query_aware: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return Need("features"), Need("text_embeds", text=self.text)

    def score(self, tokens: VisualTokens) -> Tensor:
        self.seen.append(tokens)
        return (tokens.need("features") @ tokens.need("text_embeds").mean(1, keepdim=True).mT)[..., 0]


def kept(run: Any) -> list[list[int]]:
    return [one.keep_idx.tolist() for one in run.last.keep]


def forward(model: Any, method: Asked, inputs: dict[str, Tensor], keep: int = 7) -> list[list[int]]:
    with vlmprune.prune(model, method, keep=keep) as run, torch.no_grad():
        model(**inputs)
    return kept(run)


def words_of(ids: Tensor, model: Any, last: int) -> Tensor:
    """(R, D) embeddings of the ids behind column ``last``, without those with a name."""
    ids = torch.tensor([one for one in ids[last + 1 :].tolist() if one not in (0, BOS_ID, EOS_ID)])
    return model.get_input_embeddings()(ids).detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_question_is_what_follows_the_last_picture(family: str) -> None:
    model, method = tiny_model(family), Asked()
    inputs = tiny_inputs(family, images=(2,))
    forward(model, method, inputs)
    image = model.config.image_token_id
    columns = (inputs["input_ids"][0] == image).nonzero()[:, 0]
    behind = inputs["input_ids"][0, int(columns[-1]) + 1 :].tolist()
    named = {value for name, value in vars(model.config).items() if name.endswith("_token_id")}
    text = torch.tensor([one for one in behind if one not in named | {0, BOS_ID, EOS_ID}])
    want = model.get_input_embeddings()(text).detach()
    assert len(text) >= 5
    for tokens in method.seen:
        for row in tokens.need("text_embeds"):
            torch.testing.assert_close(row, want, rtol=0, atol=0)
        assert tokens.query_mask is None


def test_the_prompt_is_all_words_without_the_token_it_begins_with() -> None:
    model, method = tiny_model("llava"), Asked("prompt")
    inputs = tiny_inputs("llava", images=(2,))
    forward(model, method, inputs)
    ids = inputs["input_ids"][0]
    want = words_of(ids[ids != model.config.image_token_id], model, -1)
    torch.testing.assert_close(method.seen[0].need("text_embeds")[0], want, rtol=0, atol=0)


def test_a_named_token_in_the_question_is_no_word() -> None:
    model, method = tiny_model("llava"), Asked()
    model.generation_config.eos_token_id = [EOS_ID]
    inputs = tiny_inputs("llava", images=(1,))
    plain = forward(model, method, inputs)
    inputs["input_ids"][0, -1] = EOS_ID
    forward(model, method, inputs)
    assert [one.need("text_embeds").shape[1] for one in method.seen] == [5, 4]
    assert plain  # and the call before kept something


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["image", "crop", "total"])
def test_a_row_of_a_batch_is_chosen_for_as_it_is_alone(family: str, scope: str) -> None:
    model, images = tiny_model(family), (1, 2, 0, 1)
    inputs, keep = tiny_inputs(family, images=images), vlmprune.spec.Budget(5, scope)
    together = forward(model, Asked(), inputs, keep)
    alone = []
    for i, count in enumerate(images):
        if count:
            alone += forward(model, Asked(), tiny_row(inputs, family, i, images), keep)
    assert together == alone


def decoder() -> Any:
    """A small decoder that takes one picture for several rows."""
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"vocab_size": 9, "bos_token_id": 2}
    torch.manual_seed(0)
    model = given_decoder(config, LlamaForCausalLM(LlamaConfig(**config)).state_dict())
    model.config = model.language_model.config
    return model


def shown_together(model: Any, method: Method, embeds: Tensor, mask: Tensor | None = None) -> Any:
    """Rows (B, L, D) with a picture of 8 tokens at columns 2 to 9, encoded once."""
    ids = torch.tensor([[3, 4] + [1] * 8 + [5, 6, 7]]).repeat(len(embeds), 1)
    ids[:, -1] = torch.arange(len(embeds)) + 4  # each asks something else
    if mask is not None:
        ids[:] = ids[:1].clone()
    with attach_to_decoder(model, method, keep=3) as run, torch.no_grad():
        model(ids, embeds, [embeds[0, 2:10]], attention_mask=mask)
    return run


def test_a_picture_with_two_questions_is_two_pictures() -> None:
    model, embeds = decoder(), torch.randn(2, 13, 16, generator=torch.Generator().manual_seed(3))
    embeds[1, :10] = embeds[0, :10]
    together = kept(shown_together(model, Asked(), embeds))
    alone = [kept(shown_together(model, Asked(), row[None]))[0] for row in embeds]
    assert together == alone and together[0] != together[1]
    assert len(kept(shown_together(model, Uniform(), embeds))) == 1  # the text is no matter there


def test_the_same_words_behind_other_padding_are_another_prompt() -> None:
    model, embeds = decoder(), torch.randn(1, 13, 16, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 13, dtype=torch.long)
    assert len(kept(shown_together(model, Asked(), embeds.repeat(2, 1, 1), mask))) == 1
    mask[1, 0] = 0
    assert len(kept(shown_together(model, Asked(), embeds.repeat(2, 1, 1), mask))) == 2


def test_rows_of_one_prompt_share_their_picture() -> None:
    model, inputs = tiny_model("llava"), tiny_inputs("llava", images=(1, 1))
    method = Asked()
    with vlmprune.prune(model, method, keep=7) as run, torch.no_grad():
        model.generate(**inputs, num_beams=3, max_new_tokens=3, do_sample=False)
    assert [tokens.batch for tokens in method.seen] == [1, 1]  # two texts of different length
    assert kept(run) == forward(model, Asked(), inputs)


def test_embeddings_in_place_of_ids_are_read_alike() -> None:
    model, inputs = tiny_model("llava"), tiny_inputs("llava", images=(1, 2))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {name: value for name, value in inputs.items() if name != "input_ids"} | {"inputs_embeds": embeds}
    assert forward(model, Asked("prompt"), given) == forward(model, Asked("prompt"), inputs)


@pytest.mark.parametrize("beams", [1, 2])
def test_what_was_generated_is_no_part_of_the_question(beams: int) -> None:
    model, inputs, method = tiny_model("llava"), tiny_inputs("llava", images=(1,)), Asked()
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    with vlmprune.prune(model, method, keep=7), torch.no_grad():
        cached = model.generate(**inputs, **options)
        again = model.generate(**inputs, use_cache=False, **options)
    assert torch.equal(cached, again)
    assert {tokens.need("text_embeds").shape[1] for tokens in method.seen} == {5}


def test_gradients_flow_through_rows_and_not_through_the_choice() -> None:
    model, inputs, method = tiny_model("llava"), tiny_inputs("llava", images=(1,)), Asked()
    with vlmprune.prune(model, method, keep=7):
        model(**inputs).logits.sum().backward()
    assert not method.seen[0].need("text_embeds").requires_grad


# --- plain tensors --------------------------------------------------------------------------------


def test_plain_tensors_with_text() -> None:
    x, text = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    assert vlmprune.select(Asked(), keep=2, features=x, text_embeds=text).shape == (2, 2)
    tokens = VisualTokens(features=x, text_embeds=text, query_mask=torch.ones(2, 3, dtype=torch.bool))
    assert (tokens.batch, tokens.count) == (2, 6)
    empty = VisualTokens(features=x, text_embeds=text[:, :0])
    assert empty.need("text_embeds").shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_embeds": torch.randn(3, 3, 4)}, r"text_embeds has shape \(3, 3, 4\).*batch 2"),
        ({"text_embeds": torch.randn(2, 3, 5)}, "text_embeds has width 5, features 4"),
        ({"text_embeds": torch.randn(3, 4)}, r"text_embeds has shape \(3, 4\); expected 3 axes"),
        ({"text_embeds": torch.ones(2, 3, 4).long()}, "text_embeds .*int64.* expected a dense tensor"),
        (
            {"text_embeds": torch.randn(2, 3, 4), "query_mask": torch.ones(2, 4, dtype=torch.bool)},
            r"query_mask is torch.bool of shape \(2, 4\); expected bool of shape \(2, 3\)",
        ),
        (
            {"text_embeds": torch.randn(2, 3, 4), "query_mask": torch.ones(2, 3)},
            "query_mask is torch.float32",
        ),
    ],
)
def test_text_that_does_not_fit_is_refused(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        vlmprune.select(Asked(), keep=2, features=torch.randn(2, 6, 4), **given)


def test_a_missing_text_is_named() -> None:
    with pytest.raises(CaptureError, match="needs 'text_embeds'"):
        vlmprune.select(Asked(), keep=2, features=torch.randn(2, 6, 4))
