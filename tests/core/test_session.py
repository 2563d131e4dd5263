# SPDX-License-Identifier: Apache-2.0
"""Life of a session: attaching, switching, copies, faulty methods; after each error the model is what it
was."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vlmprune
from vlmprune.core.method import Merged, Method
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, InvariantError, UnsupportedError, VlmPruneError
from vlmprune.testing.checks_model import snapshot
from vlmprune.testing.conformance import generate, shared_model
from vlmprune.testing.tiny import tiny_inputs, tiny_model

Answer = Callable[[VisualTokens], Any]


class Boom(Exception):
    pass


@dataclass(frozen=True)
class Scores(Method):
    """Scores that a test writes down."""

    answer: Answer = field(compare=False)
    needs: ClassVar[tuple[str, ...]] = ("features",)

    def score(self, tokens: VisualTokens) -> Tensor:
        return self.answer(tokens)


@dataclass(frozen=True)
class Chosen(Method):
    """Indices that a test writes down."""

    answer: Answer = field(compare=False)
    needs: ClassVar[tuple[str, ...]] = ("features",)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        return self.answer(tokens)


@dataclass(frozen=True)
class Rows(Method):
    """Rows that a test writes down."""

    answer: Answer = field(compare=False)
    needs: ClassVar[tuple[str, ...]] = ("features",)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        return self.answer(tokens)


@pytest.fixture
def model() -> Iterator[Any]:
    """The shared llava; every test must leave it as it was, with the same answer."""
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    dense = generate(model, inputs)
    before = snapshot(model)
    yield model
    assert snapshot(model) == before and torch.equal(generate(model, inputs), dense)


def boom(tokens: VisualTokens) -> Any:
    raise Boom


def nan_at(place: int, value: float) -> Answer:
    return lambda tokens: torch.ones(tokens.batch, tokens.count).index_fill_(1, torch.tensor(place), value)


FOUR = torch.arange(4)[None]
FAULTS: list[tuple[str, Method, type[Exception], str | None]] = [
    ("nan", Scores(nan_at(3, torch.nan)), InvariantError, "not finite"),
    ("infinite", Scores(nan_at(3, torch.inf)), InvariantError, "not finite"),
    (
        "too few scores",
        Scores(lambda t: torch.ones(t.batch, 35)),
        InvariantError,
        r"expected a floating point number per token, of shape \(1, 36\)",
    ),
    ("scores of one unit", Scores(lambda t: torch.ones(36)), InvariantError, r"\(1, 36\)"),
    ("ranks", Scores(lambda t: torch.arange(36)[None]), InvariantError, "returned torch.int64 .* floating"),
    ("a mask", Scores(lambda t: t.features.sum(-1) > 0), InvariantError, "returned torch.bool .* floating"),
    ("no tensor", Scores(lambda t: None), InvariantError, "NoneType"),
    ("raises in score", Scores(boom), Boom, None),
    ("raises in select", Chosen(boom), Boom, None),
    ("raises in merge", Rows(boom), Boom, None),
    ("repeated index", Chosen(lambda t: torch.tensor([[0, 1, 2, 2]])), InvariantError, r"repeated \[2\]"),
    (
        "index out of range",
        Chosen(lambda t: torch.tensor([[0, 1, 2, 36]])),
        InvariantError,
        r"out of range \[36\]",
    ),
    (
        "too many indices",
        Chosen(lambda t: torch.tensor([[0, 1, 2, 3, 4]])),
        InvariantError,
        r"shape \(1, 4\)",
    ),
    ("float indices", Chosen(lambda t: torch.tensor([[0.0, 1, 2, 3]])), InvariantError, "int64"),
    (
        "rows that are nan",
        Rows(lambda t: Merged(t.features[:, :4] * torch.nan, FOUR)),
        InvariantError,
        "not finite",
    ),
    (
        "rows of another width",
        Rows(lambda t: Merged(torch.ones(1, 4, 3), FOUR)),
        InvariantError,
        r"\(1, 4, 64\)",
    ),
    ("rows at one slot", Rows(lambda t: Merged(t.features[:, :4], 0 * FOUR)), InvariantError, "repeated"),
]


@pytest.mark.parametrize(
    ("method", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in FAULTS]
)
def test_faulty_methods_are_named_and_the_session_survives(
    model: Any, method: Method, error: type[Exception], message: str | None
) -> None:
    inputs = tiny_inputs(images=(1,))
    with vlmprune.prune(model, method, keep=4) as run:
        for _ in range(2):
            with pytest.raises(error, match=message) as caught:
                generate(model, inputs)
            assert error is Boom or type(method).__name__.lower() in str(caught.value).lower(), (
                "the message names the method"
            )
        assert run.last is None and run.state is None
        text = tiny_inputs(images=(0,))
        assert generate(model, text).shape == (1, 5) and run.last.note == "no images in this call"


def test_not_attached_until_entered_and_detached_for_good(model: Any) -> None:
    before = snapshot(model)
    run = vlmprune.prune(model, "random@9")
    assert snapshot(model) == before and not run.attached and "detached" in repr(run)
    with run as entered:
        assert (
            entered is run
            and run.attached
            and "random@9 on LlavaForConditionalGeneration, attached" in repr(run)
        )
    run.detach()
    run.detach()
    assert snapshot(model) == before and not run.attached


def test_a_session_can_be_attached_again(model: Any) -> None:
    inputs = tiny_inputs(images=(1,))
    run = vlmprune.attach(model, "fastervlm@9")
    first = generate(model, inputs)
    run.detach()
    with run:
        assert torch.equal(generate(model, inputs), first)
    with vlmprune.attach(model, "fastervlm@9") as run:
        assert torch.equal(generate(model, inputs), first)
    assert not run.attached


def test_an_exception_in_the_block_detaches(model: Any) -> None:
    with pytest.raises(Boom), vlmprune.prune(model, "random@9"):
        raise Boom


def test_a_method_that_needs_what_the_tower_lacks_is_refused_before_any_hook() -> None:
    model = shared_model("llava", "siglip", None)
    before = snapshot(model)
    for spec in ("fastervlm@9", "visionzip@9"):
        with pytest.raises(UnsupportedError, match="cls='mean'"):
            vlmprune.attach(model, spec)
    with pytest.raises(UnsupportedError, match=r"layers -4..-1"):
        vlmprune.attach(shared_model("llava", None, None), "fastervlm(layer=9)@9")
    assert snapshot(model) == before


def test_an_attached_model_cannot_be_copied_or_pickled(model: Any) -> None:
    inputs = tiny_inputs(images=(1,))
    with vlmprune.prune(model, "fastervlm@9") as run:
        want = generate(model, inputs)
        for whole in (model, model.model, run):
            with pytest.raises(UnsupportedError, match="detach first"):
                copy.deepcopy(whole)
        with pytest.raises(UnsupportedError, match="detach first"):
            torch.save(model.model.get_image_features, io.BytesIO())
        assert torch.equal(generate(model, inputs), want)
    twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, inputs), generate(model, inputs))


def test_weights_of_an_attached_model_are_its_own(model: Any) -> None:
    names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    with vlmprune.prune(model, "fastervlm@9"):
        assert (list(model.state_dict()), [name for name, _ in model.named_modules()]) == names


def test_switched_off_is_dense_and_says_so(model: Any) -> None:
    inputs = tiny_inputs(images=(1,))
    dense = generate(model, inputs)
    with vlmprune.prune(model, "fastervlm@9") as run:
        pruned = generate(model, inputs)
        run.enabled = False
        assert (
            torch.equal(generate(model, inputs), dense)
            and run.last.note == "disabled"
            and not run.last.pruned
        )
        run.enabled = True
        assert torch.equal(generate(model, inputs), pruned) and run.last.pruned and run.last.note == ""


def test_two_models_have_two_sessions(model: Any) -> None:
    other, inputs = tiny_model("llava", seed=1), tiny_inputs(images=(1,))
    alone = []
    for one, spec in ((model, "fastervlm@9"), (other, "uniform@4")):
        with vlmprune.prune(one, spec):
            alone.append(generate(one, inputs))
    with vlmprune.prune(model, "fastervlm@9") as first, vlmprune.prune(other, "uniform@4") as second:
        assert torch.equal(generate(model, inputs), alone[0]) and torch.equal(
            generate(other, inputs), alone[1]
        )
        assert first.last.realised_tokens == [9] and second.last.realised_tokens == [4]
        assert (first.last.decode_steps, second.last.decode_steps) == (4, 4)


def test_a_detached_session_is_garbage(model: Any) -> None:
    with vlmprune.prune(model, "fastervlm@9") as run:
        output = model(**tiny_inputs(images=(1,)), use_cache=True)
    gone = weakref.ref(run)
    del run
    gc.collect()
    assert gone() is None, "a cut cache or a hook keeps the session alive"
    with pytest.raises(InvariantError, match="detached"):
        output.past_key_values.get_seq_length()


def test_another_session_cannot_continue_a_cut_cache(model: Any) -> None:
    with vlmprune.prune(model, "fastervlm@9"), torch.no_grad():
        cache = model(**tiny_inputs(images=(1,)), use_cache=True).past_key_values
    with vlmprune.prune(model, "fastervlm@9") as run:
        with pytest.raises(InvariantError, match="detached"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        assert run.state is None


def test_a_wrapped_encoder_is_not_wrapped_twice() -> None:
    model = tiny_model("llava")
    model.model.get_image_features = model.model.get_image_features
    before = snapshot(model)
    with pytest.raises(InvariantError, match="replaced on the instance already"):
        vlmprune.attach(model, "random@9")
    assert snapshot(model) == before


@torch.no_grad()
def test_features_encoded_ahead() -> None:
    """Under the session they carry what it needs; from before, from another session or switched off they are
    refused.
    """
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    if "mm_encoder_outputs" not in inspect.signature(model.model.forward).parameters:
        pytest.skip("forward of this transformers takes no mm_encoder_outputs")
    pixels, call = inputs["pixel_values"], {name: inputs[name] for name in ("input_ids", "attention_mask")}
    dense = model.model.get_image_features(pixels)
    with (
        pytest.raises(InvariantError, match="no forward of LlavaModel placed them"),
        vlmprune.prune(model, "uniform@9"),
    ):
        other = model.model.get_image_features(pixels)
    with vlmprune.prune(model, "fastervlm@9") as run:
        want = model(**inputs).logits
        ahead = model.model.get_image_features(pixels)
        for _ in range(2):
            assert torch.equal(model(**call, mm_encoder_outputs={"image": ahead}).logits, want)
        run.enabled = False
        switched_off = model.model.get_image_features(pixels)
        assert torch.equal(model(**call, mm_encoder_outputs={"image": dense}).logits, model(**inputs).logits)
        run.enabled = True
        for wrong in (dense, other, switched_off):
            with pytest.raises(CaptureError):
                model(**call, mm_encoder_outputs={"image": wrong})


def test_prompts_read_in_chunks_are_refused(model: Any) -> None:
    inputs = tiny_inputs(images=(1,))
    try:
        right = torch.equal(generate(model, inputs, prefill_chunk_size=8), generate(model, inputs))
    except (ValueError, RuntimeError):
        right = False
    if not right:
        pytest.skip("this transformers cannot read a prompt with images in chunks, also without pruning")
    with vlmprune.prune(model, "fastervlm@9"), pytest.raises(VlmPruneError, match="prefill_chunk_size"):
        generate(model, inputs, prefill_chunk_size=8)


def test_strict_refuses_budgets_that_cannot_be_met(model: Any) -> None:
    inputs = tiny_inputs(images=(1,))
    refused = pytest.raises(InvariantError, match="keep=37 tokens but unit 0 holds 36")
    with vlmprune.prune(model, "fastervlm@37", strict=True), refused:
        generate(model, inputs)
    with vlmprune.prune(model, "fastervlm@37") as run:
        generate(model, inputs)
        assert run.last.realised_tokens == [36]
    with vlmprune.prune(model, "fastervlm@36", strict=True) as run:
        generate(model, inputs)
        assert run.last.realised_tokens == [36]


def test_embeddings_merged_by_hand_are_an_error_and_no_dense_answer(model: Any) -> None:
    """Whoever encodes while attached wants the result pruned: a forward that cannot see the pictures must not
    pass.
    """
    inputs = tiny_inputs(images=(1,))
    with vlmprune.prune(model, "fastervlm@9"), torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        embeds[inputs["input_ids"] == model.config.image_token_id] = torch.cat(list(features))
        with pytest.raises(InvariantError, match="merged by hand cannot be pruned"):
            model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=2)
        with pytest.raises(InvariantError, match="merged by hand cannot be pruned"):  # as remote code does it
            model.model.language_model(inputs_embeds=embeds)
        assert generate(model, inputs).shape == (1, 5)  # placed: all is well again
        model.model.language_model(inputs_embeds=embeds)


def test_a_text_prompt_after_encoding_by_hand_is_no_error(model: Any) -> None:
    inputs, text = tiny_inputs(images=(1,)), tiny_inputs(images=(0,))
    with vlmprune.prune(model, "fastervlm@9") as run, torch.no_grad():
        model.model.get_image_features(pixel_values=inputs["pixel_values"])
        generate(model, text)
        assert run.last.note == "no images in this call"


@pytest.mark.parametrize(
    "spec", ["fastervlm@9", "fastv(layer=2)@9", "pyramiddrop", "var(dims=[3,11],tau=3)+fastervlm@9"]
)
@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupt_closes_the_call_as_every_other_exit_does(model: Any, spec: str, step: int) -> None:
    """torch runs no hook after a KeyboardInterrupt."""
    inputs, calls = tiny_inputs(images=(1,)), [0]
    language_model = model.model.language_model
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        bare = language_model(inputs_embeds=embeds).last_hidden_state

    def interrupt(module: Any, args: Any) -> None:
        calls[0] += 1
        if calls[0] == step:
            raise KeyboardInterrupt

    with vlmprune.prune(model, spec) as run:
        want = generate(model, inputs)
        handle = language_model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs)
        handle.remove()
        assert run.state is None
        with torch.no_grad():
            assert torch.equal(language_model(inputs_embeds=embeds).last_hidden_state, bare)
        assert torch.equal(generate(model, inputs), want)


def test_a_turn_may_be_repeated_after_an_interrupt(model: Any) -> None:
    """Stopped before any layer wrote to the cache, the same turn on the same cache gives the same answer."""
    inputs, layer = tiny_inputs(images=(1,)), model.model.language_model.layers[0]

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    with vlmprune.prune(model, "fastervlm@9"):
        cache = DynamicCache(config=model.config)
        answer = generate(model, inputs, cache)
        ids = torch.cat([inputs["input_ids"], answer, torch.tensor([[5, 6, 7]])], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        want = generate(model, turn, copy.deepcopy(cache))
        handle = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(model, turn, cache)
        handle.remove()
        assert torch.equal(generate(model, turn, cache), want)


@pytest.mark.parametrize(
    "spec",
    ["fastv(layer=2)@9", "pyramiddrop", "sparsevlm@0.25", "var(dims=[3,11],tau=3)+fastv@9", "fastervlm@9"],
)
@pytest.mark.parametrize("images", [(1,), (1, 0, 2)])
def test_decoding_without_a_cache_equals_decoding_with_one(
    model: Any, spec: str, images: tuple[int, ...]
) -> None:
    """What was chosen for the prompt stays chosen, though every step reads the prompt again."""
    for seed in range(4):
        inputs = tiny_inputs(images=images, seed=seed)
        with vlmprune.prune(model, spec):
            assert torch.equal(generate(model, inputs, use_cache=False), generate(model, inputs))


def test_scoring_a_longer_text_without_a_cache_is_no_decoding(model: Any) -> None:
    """Another encoding of the picture is another prompt: its own last token ranks."""
    inputs = tiny_inputs(images=(1,))
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[9, 10, 11]])], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    with vlmprune.prune(model, "fastv(layer=2)@9") as run, torch.no_grad():
        model(**longer, use_cache=False)
        want = run.last.keep[0].keep_idx
        model(**inputs, use_cache=False)
        other = run.last.keep[0].keep_idx
        model(**{**longer, "pixel_values": longer["pixel_values"].clone()}, use_cache=False)
        assert torch.equal(run.last.keep[0].keep_idx, want) and not torch.equal(want, other)


def test_attention_maps_of_a_cut_sequence_are_refused() -> None:
    model, inputs = tiny_model(), tiny_inputs(images=(1,))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        dense = model(**inputs, output_attentions=True).attentions
        for spec in ("fastervlm@9", "fastv(layer=2)@9"):
            with vlmprune.prune(model, spec), pytest.raises(UnsupportedError, match="output_attentions"):
                model(**inputs, output_attentions=True)
        with vlmprune.prune(model, "fastervlm@36"):  # nothing is cut
            kept = model(**inputs, output_attentions=True).attentions
    assert all(torch.equal(one, other) for one, other in zip(dense, kept, strict=True))


def test_layers_that_ran_without_their_hooks_are_an_error(model: Any) -> None:
    """As a graph that was compiled before does it: dense in silence, were it not for the count."""
    inputs = tiny_inputs(images=(1,))
    for spec in ("fastv(layer=2)@9", "var(dims=[3,11],tau=3)"):
        with vlmprune.prune(model, spec):
            hooks = model.model.language_model.layers[2]._forward_pre_hooks
            held = dict(hooks)
            hooks.clear()
            with pytest.raises(
                InvariantError, match=r"acts at decoder layers \[2.*\], but these ran without its hooks"
            ):
                generate(model, inputs)
            hooks.update(held)


@torch.no_grad()
def test_the_last_block_of_a_session_detaches(model: Any) -> None:
    inputs = tiny_inputs(images=(1,))
    session = vlmprune.prune(model, "divprune@9")
    with session:
        want = model(**inputs).logits
        with session:
            assert torch.equal(model(**inputs).logits, want)
        assert session.attached and torch.equal(model(**inputs).logits, want)
    assert not session.attached
    with session, pytest.raises(ZeroDivisionError), session:
        raise ZeroDivisionError
    assert not session.attached
    run = vlmprune.attach(model, "divprune@9")
    with run:
        pass
    assert not run.attached, "a block ends what was attached by hand before it"


@torch.no_grad()
def test_a_lost_handle_can_be_taken_off(model: Any) -> None:
    inputs = tiny_inputs(images=(1,))
    dense = model(**inputs).logits
    vlmprune.attach(model, "fastervlm@9")
    with pytest.raises(InvariantError, match="attached already; detach it first"):
        vlmprune.attach(model, "divprune@9")
    vlmprune.detach(model)
    assert torch.equal(model(**inputs).logits, dense)
    vlmprune.detach(model)  # nothing is attached
    with vlmprune.prune(model, "divprune@9") as run:
        assert not torch.equal(model(**inputs).logits, dense) and run.attached
