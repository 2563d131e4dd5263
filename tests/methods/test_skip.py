# SPDX-License-Identifier: Apache-2.0
"""Words that do not rank: which tokens they are, and that their rows are left out of what methods read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlmprune
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.evaluation.leaderboard.config import load as load_config
from vlmprune.methods.adaptinfer import AdaptInfer
from vlmprune.methods.debias import Debias
from vlmprune.methods.sparsevlm import SparseVLM
from vlmprune.models.loading import prompt
from vlmprune.models.words import ENGLISH, stop_tokens


@pytest.fixture(scope="module")
def loaded():
    return vlmprune.load("tiny")


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, ...]]:
    """How many rows rank at each cut, per sample."""
    found: list[tuple[int, ...]] = []
    for method in (AdaptInfer, SparseVLM):
        own = method.score

        def score(self, tokens, own=own):
            attention, real = tokens.need("text_attention"), tokens.query_mask
            rows = [attention.shape[2]] * len(attention) if real is None else real.sum(dim=1).tolist()
            found.append(tuple(rows))
            return own(self, tokens)

        monkeypatch.setattr(method, "score", score)
    return found


def rows_of(loaded, seen, spec: str, *questions: str) -> tuple[int, ...]:
    """Rows that rank at the first cut."""
    model, processor = loaded
    picture = vlmprune.example()[0]
    texts = [prompt(processor, question) for question in questions]
    inputs = processor(images=[picture] * len(texts), text=texts, padding=True, return_tensors="pt")
    seen.clear()
    with torch.no_grad(), vlmprune.prune(model, spec):
        model(**inputs)
    return seen[0]


def test_words_of_the_bundled_tokenizer(loaded) -> None:
    tokenizer = loaded[1].tokenizer
    words = {tokenizer.convert_ids_to_tokens(number) for number in stop_tokens(loaded[1])}
    assert {"the", "is", "?"} <= words and not words & {"red", "circle", "what", "how", "not"}
    assert stop_tokens(tokenizer) == stop_tokens(loaded[1])
    assert set(tokenizer.all_special_ids) <= {*stop_tokens(tokenizer, ())}
    assert not ENGLISH & {"what", "which", "who", "where", "how", "no", "not", "many"}


def test_the_config_of_trained_methods_leaves_out_these_words(loaded) -> None:
    specs = load_config(Path(__file__).parents[2] / "configs" / "trained.yaml").specs
    # the placeholder, too, which is no text and so never ranks
    words = ",".join(map(str, sorted({*stop_tokens(loaded[1]), loaded[0].config.image_token_id})))
    assert [str(spec) for spec in specs if "skip" in str(spec)] == [
        f"{method}(skip=({words}))@36" for method in ("sparsevlm", "adaptinfer")
    ]


def test_of_marked_pieces_only_those_that_begin_a_word_are_words() -> None:
    pieces = ["<s>", "▁the", "the", "▁The", "▁theory", "▁,", "!", "▁", "▁red"]

    class Marked:
        all_special_ids = (0,)

        def __len__(self) -> int:
            return len(pieces)

        def convert_ids_to_tokens(self, ids):
            return [pieces[number] for number in ids]

    assert stop_tokens(Marked()) == (0, 1, 3, 5, 6)


@pytest.mark.parametrize("name", ["adaptinfer", "sparsevlm"])
def test_a_stop_word_more_changes_no_row_that_ranks(loaded, seen, name) -> None:
    skip = stop_tokens(loaded[1])
    short, long = "what is red ?", "what is the red ?"
    spec = f"{name}(skip={skip})@0.5"
    assert rows_of(loaded, seen, spec, short) == rows_of(loaded, seen, spec, long)
    if name == "adaptinfer":  # all text ranks
        (plain_short,) = rows_of(loaded, seen, "adaptinfer@0.5", short)
        (plain_long,) = rows_of(loaded, seen, "adaptinfer@0.5", long)
        assert plain_long == plain_short + 1 > rows_of(loaded, seen, spec, long)[0]
        (alone,) = rows_of(loaded, seen, spec, short)
        # in a padded batch every row leaves out its own words
        (more,) = rows_of(loaded, seen, spec, "what is the red circle in the picture ?")
        assert set(rows_of(loaded, seen, spec, short, "what is the red circle in the picture ?")) == {
            alone,
            more,
        }


def test_where_nothing_would_be_left_all_text_ranks(loaded, seen) -> None:
    every = tuple(range(len(loaded[1].tokenizer)))
    question = "what is red ?"
    plain = rows_of(loaded, seen, "adaptinfer@0.5", question)
    assert rows_of(loaded, seen, f"adaptinfer(skip={every})@0.5", question) == plain


def test_embeddings_have_no_words_to_skip(loaded) -> None:
    model, processor = loaded
    picture, question, _ = vlmprune.example()
    inputs = vlmprune.encode(model, processor, picture, question)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "pixel_values": inputs["pixel_values"]}
    refused = pytest.raises(UnsupportedError, match="inputs_embeds alone; give input_ids")
    with torch.no_grad(), vlmprune.prune(model, "adaptinfer(skip=(5,))@0.5"), refused:
        model(**given, attention_mask=inputs["attention_mask"])


def test_a_wrapper_skips_what_the_method_inside_does(loaded, seen) -> None:
    skip, question = stop_tokens(loaded[1]), "what is the red circle ?"
    inner = f"adaptinfer(skip={skip})@0.5"
    alone = rows_of(loaded, seen, inner, question)
    assert rows_of(loaded, seen, f"debias(trend=none)+{inner}", question) == alone
    assert rows_of(loaded, seen, "debias(trend=none)+adaptinfer@0.5", question) > alone
    assert Debias(SparseVLM(skip=skip), trend="none").skips == skip


@pytest.mark.parametrize("method", [AdaptInfer, SparseVLM])
def test_ids_are_checked(method) -> None:
    with pytest.raises(SpecError, match="expected token ids"):
        method(skip=(-1,))
