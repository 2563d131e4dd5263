# SPDX-License-Identifier: Apache-2.0
"""The four verbs as a user calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.core.method import Method
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, GridError, InvariantError, SpecError, UnsupportedError
from vlmprune.methods.baselines import Dense
from vlmprune.methods.fastervlm import FasterVLM
from vlmprune.spec import Budget
from vlmprune.testing.conformance import generate, shared_model
from vlmprune.testing.tiny import tiny_bundle, tiny_inputs, tiny_model


@dataclass(frozen=True)
class NoVerb(Method):
    """Says nothing of tokens."""

    budgeted: ClassVar[bool] = False


# --- prune and attach -----------------------------------------------------------------------------


def kept(model: Any, method: Any, **options: Any) -> list[int]:
    with vlmprune.prune(model, method, **options) as run, torch.no_grad():
        model(**tiny_inputs(images=(1,)))
    return run.last.keep[0].keep_idx.tolist()


def test_a_spec_an_object_and_a_parsed_spec_mean_the_same() -> None:
    model = shared_model("llava", None, None)
    want = kept(model, "fastervlm@9")
    assert len(want) == 9
    for method, keep in [
        (FasterVLM(), 9),
        ("fastervlm", 9),
        (vlmprune.parse("fastervlm@9"), None),
        (FasterVLM(), 0.25),
        ("fastervlm", "0.25"),
        (FasterVLM(), Budget(9)),
        ("fastervlm@0.25", None),
    ]:
        assert kept(model, method, keep=keep) == want, f"{method}, keep={keep}"
    assert vlmprune.prune(model, FasterVLM(), keep=9).spec == "fastervlm@9"
    assert vlmprune.prune(model, FasterVLM(), keep="9/crop").budget == Budget(9, "crop")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fastervlm@64", {"keep": 64}, "has a budget and keep=64 was given as well"),
        ("fastervlm", {}, "budget"),
        (FasterVLM(), {}, "fastervlm needs a budget: give keep=64"),
        (FasterVLM, {"keep": 9}, r"FasterVLM is a class; give an object, e.g. FasterVLM\(\)"),
        ("dense", {"keep": 9}, "budget"),
        (Dense(), {"keep": 9}, "dense takes no budget but keep=9 was given"),
        ("fastrvlm@9", {}, "fastervlm"),
        ("fastervlm@9", {"positions": "compct"}, "Did you mean 'compact'"),
        ("fastervlm@0", {}, "0"),
        ("fastervlm", {"keep": 1.5}, "1.5"),
        ("fastervlm", {"keep": True}, "True"),
    ],
)
def test_what_cannot_be_meant_is_refused(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        vlmprune.prune(shared_model("llava", None, None), method, **options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="retain"):
        vlmprune.attach(shared_model("llava", None, None), "fastervlm", retain=9)


def test_attach_takes_the_options_of_prune() -> None:
    model = shared_model("llava", None, None)
    with vlmprune.attach(model, "fastervlm", keep=9, positions="original", strict=True) as handle:
        assert handle.attached and (handle.positions, handle.strict, handle.budget) == (
            "original",
            True,
            Budget(9),
        )


def test_positions_default_to_what_the_method_declares() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    logits = {}
    for positions in (None, "compact", "original"):
        with vlmprune.prune(model, "fastervlm@9", positions=positions), torch.no_grad():
            logits[positions] = model(**inputs).logits[0, -1]
    assert FasterVLM.positions == "compact" and torch.equal(logits[None], logits["compact"])
    assert not torch.allclose(logits["compact"], logits["original"], atol=1e-3)


@pytest.mark.parametrize(("layer", "block"), [(None, 2), (-1, 3), (-2, 2), (1, 0)])
def test_the_layer_option_reads_that_layer(layer: int | None, block: int) -> None:
    twin = tiny_model("llava")
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        attention = twin.model.vision_tower(
            tiny_inputs(images=(1,))["pixel_values"], output_attentions=True
        ).attentions[block]
    want = attention[0, :, 0, 1:].mean(0).topk(9).indices.sort().values.tolist()
    assert kept(shared_model("llava", None, None), FasterVLM(layer=layer), keep=9) == want


@pytest.mark.parametrize("family", ["llava", "llava_next", "vipllava"])
def test_replay_cuts_the_same_tokens(family: str) -> None:
    model, inputs = shared_model(family, None, None), tiny_inputs(family, images=(1,))
    with vlmprune.prune(model, "fastervlm@9") as run, torch.no_grad():
        want, answer = model(**inputs).logits, generate(model, inputs)
    with vlmprune.prune(model, run.last.keep[0].replay) as again, torch.no_grad():
        assert torch.equal(model(**inputs).logits, want) and torch.equal(generate(model, inputs), answer)
    assert again.last.method == "replay" and again.last.realised_tokens == [9]
    with vlmprune.prune(model, run.last.keep[0].replay, keep=4), pytest.raises(InvariantError):
        model(**inputs)


def test_an_answer_to_a_real_picture_through_a_processor() -> None:
    from vlmprune.models.loading import encode
    from vlmprune.testing.tiny import picture

    model, processor = tiny_bundle("llava")
    inputs = encode(model, processor, picture(), "What is it?")
    with vlmprune.prune(model, "fastervlm@9") as run:
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 3 and run.last.realised_tokens == [9]
    assert (
        vlmprune.score(model, inputs, "fastervlm")[0].keep(9).keep_idx.tolist()
        == run.last.keep[0].keep_idx.tolist()
    )


# --- score ----------------------------------------------------------------------------------------


SCORED = [
    ("clip", "fastervlm", -2),
    ("siglip", "fastervlm(cls=mean)", -2),
    ("clip", "fastervlm(cls=mean,layer=-1)", -1),
]


@pytest.mark.parametrize(("tower", "spec", "layer"), SCORED)
def test_scores_equal_the_attention_of_an_eager_twin(tower: str, spec: str, layer: int) -> None:
    model, inputs = shared_model("llava", tower, None), tiny_inputs(images=(1, 2))
    twin = tiny_model("llava", tower)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        attention = twin.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[layer]
    first = 1 if tower == "clip" else 0
    want = (attention.mean(2) if "mean" in spec else attention[:, :, 0]).mean(1)[:, first:]
    maps = vlmprune.score(model, inputs, spec)
    found = [(one.index, one.frame, one.grid, one.method, one.view) for one in maps]
    assert found == [(i, None, (6, 6), spec, "center") for i in range(3)]
    torch.testing.assert_close(torch.stack([one.scores for one in maps]), want, rtol=0, atol=1e-6)


def test_scoring_leaves_the_model_alone_and_works_while_attached() -> None:
    from vlmprune.testing.checks_model import snapshot

    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    generate(model, inputs)
    before = snapshot(model)
    want = vlmprune.score(model, inputs, "fastervlm@9")[0].scores  # a budget is fine and not used
    assert snapshot(model) == before
    with vlmprune.prune(model, "uniform@9") as run:
        answer = generate(model, inputs)
        assert torch.equal(vlmprune.score(model, inputs, "fastervlm")[0].scores, want)
        assert torch.equal(generate(model, inputs), answer) and run.last.realised_tokens == [9]
    assert snapshot(model) == before


def test_kept_by_prune_are_the_best_of_score() -> None:
    model, inputs = shared_model("llava_next", None, None), tiny_inputs("llava_next", images=(1, 0, 2))
    with vlmprune.prune(model, "fastervlm@9") as run, torch.no_grad():
        model(**inputs)
    for one, other in zip(vlmprune.score(model, inputs, "fastervlm"), run.last.keep, strict=True):
        assert one.keep(9).keep_idx.tolist() == other.keep_idx.tolist() and one.grids == other.grids


def test_scores_that_cannot_be_had_are_refused() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    for spec in ("uniform", "pool", "divprune"):
        with pytest.raises(UnsupportedError, match=r"read run\.last\.keep"):
            vlmprune.score(model, inputs, spec)
    with pytest.raises(
        SpecError, match=r"expected one of \['pixel_values'\], got \['attention_mask', 'input_ids'\]"
    ):
        vlmprune.score(model, tiny_inputs(images=(0,)), "fastervlm")
    with pytest.raises(UnsupportedError, match="cls='mean'"):
        vlmprune.score(shared_model("llava", "siglip", None), inputs, "fastervlm")
    with pytest.raises(CaptureError, match="size zero"):
        vlmprune.score(model, {**inputs, "pixel_values": torch.empty(0, 3, 84, 84)}, "fastervlm")


# --- select ---------------------------------------------------------------------------------------


def attention(batch: int = 2, heads: int = 3, n: int = 12) -> Tensor:
    return torch.rand(batch, heads, n, generator=torch.Generator().manual_seed(3))


def test_select_gives_ascending_int64_of_every_row() -> None:
    a = attention()
    idx = vlmprune.select("fastervlm", keep=4, cls_attention=a)
    assert idx.dtype == torch.int64 and idx.shape == (2, 4)
    assert idx.tolist() == [sorted(row.topk(4).indices.tolist()) for row in a.mean(1)]
    assert torch.equal(vlmprune.select("fastervlm@4", cls_attention=a), idx)
    assert torch.equal(vlmprune.select(FasterVLM(), 4, cls_attention=a), idx)


def test_select_reads_two_axes_of_attention_as_one_head() -> None:
    a = attention(heads=1)
    assert torch.equal(
        vlmprune.select("fastervlm@4", cls_attention=a[:, 0]), vlmprune.select("fastervlm@4", cls_attention=a)
    )


@pytest.mark.parametrize("keep", [12, 13, 1.0])
@pytest.mark.parametrize("method", ["fastervlm", "random", "uniform"])
def test_select_keeps_all_where_the_budget_allows(method: str, keep: int | float) -> None:
    idx = vlmprune.select(method, keep=keep, cls_attention=attention(), grid=(3, 4))
    assert idx.tolist() == [list(range(12))] * 2
    idx[0, 0] = 5  # rows are the caller's own
    assert idx[1, 0] == 0


@pytest.mark.parametrize(("keep", "count"), [(0.3, 3), (0.01, 1), (0.99, 11), (1, 1)])
def test_select_floors_fractions_to_at_least_one(keep: float, count: int) -> None:
    assert vlmprune.select("fastervlm", keep=keep, cls_attention=attention()).shape == (2, count)


def test_select_takes_one_grid_or_several() -> None:
    features = torch.randn(1, 20, 4)
    one = vlmprune.select("uniform@4", features=features, grid=(4, 5))
    assert torch.equal(one, vlmprune.select("uniform@4", features=features, grid=[(4, 5)]))
    two = vlmprune.select("uniform@4", features=features, grid=((2, 5), (2, 5)))
    assert one.shape == two.shape == (1, 4) and (two < 10).sum() == 2


def test_select_of_a_merging_method_gives_the_slots_of_its_rows() -> None:
    idx = vlmprune.select("pool@4", features=torch.randn(2, 16, 4), grid=(4, 4))
    assert idx.tolist() == [[0, 2, 8, 10]] * 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"method": "fastervlm@4", "cls_atention": attention()}, SpecError, "Did you mean 'cls_attention'"),
        (
            {"method": "fastervlm@4", "features": torch.randn(2, 12, 3)},
            CaptureError,
            "needs 'cls_attention'; given were",
        ),
        ({"method": "fastervlm@4"}, CaptureError, "pass at least one of"),
        (
            {"method": "fastervlm@4", "cls_attention": attention(), "grid": (3, 5)},
            SpecError,
            "15 tokens; the tensors hold 12",
        ),
        ({"method": "fastervlm@4", "cls_attention": attention(), "grid": (0, 12)}, SpecError, "empty side"),
        (
            {"method": "fastervlm@4", "cls_attention": attention(), "grid": 12},
            SpecError,
            r"expected \(rows, cols\)",
        ),
        (
            {"method": "fastervlm@4", "cls_attention": attention(), "grid": ()},
            SpecError,
            r"expected \(rows, cols\)",
        ),
        (
            {"method": "fastervlm@4", "cls_attention": attention(), "features": torch.randn(2, 11, 3)},
            SpecError,
            "disagree",
        ),
        ({"method": "fastervlm@4", "cls_attention": attention(batch=0)}, SpecError, "batch 0"),
        ({"method": "fastervlm@4", "cls_attention": attention(n=0)}, SpecError, "tokens 0"),
        (
            {"method": "fastervlm@4", "cls_attention": attention().tolist()},
            SpecError,
            "expected a torch tensor",
        ),
        ({"method": "fastervlm@4", "cls_attention": torch.rand(12)}, SpecError, "expected 2 or 3 axes"),
        ({"method": "fastervlm@4", "cls_attention": attention() * torch.nan}, InvariantError, "not finite"),
        ({"method": "fastervlm", "cls_attention": attention()}, SpecError, "budget"),
        ({"method": "fastervlm@4", "keep": 4, "cls_attention": attention()}, SpecError, "give one of them"),
    ],
)
def test_select_refuses_what_it_cannot_read(
    call: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vlmprune.select(**call)


@pytest.mark.parametrize("verb", [vlmprune.select, vlmprune.reduce])
@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        *(
            (name, SpecError, f"'{name}' needs a budget here")
            for name in ("fastv", "pyramiddrop", "sparsevlm")
        ),
        ("dyvte(exit=2)", UnsupportedError, r"'dyvte\(exit=2\)' says while a model runs"),
        (NoVerb(), SpecError, "NoVerb overrides none of score, select, merge"),
    ],
)
def test_plain_tensors_are_not_kept_whole_where_nobody_says_how_many(
    verb: Any, method: Any, error: type[Exception], message: str
) -> None:
    given = {"features": torch.rand(1, 12, 8), "text_attention": torch.rand(1, 2, 3, 12)}
    with pytest.raises(error, match=message):
        verb(method, **given)
    whole = verb("dense", features=given["features"])
    assert whole.shape[1] == 12 if isinstance(whole, Tensor) else torch.equal(whole.rows, given["features"])


@pytest.mark.parametrize(
    ("spec", "units", "grid", "message"),
    [
        ("divprune@8/crop", 1, [(3, 6), (3, 6)], "a unit has 2 crops here; give each crop as a unit"),
        ("divprune@8/total", 2, (6, 6), "there are 2 units here; give all pictures as one unit"),
    ],
)
def test_a_budget_is_spent_on_a_unit_or_refused(spec: str, units: int, grid: Any, message: str) -> None:
    features = torch.randn(units, 36, 16)
    for verb in (vlmprune.select, vlmprune.reduce):
        with pytest.raises(SpecError, match=message):
            verb(spec, features=features, grid=grid)
        verb(spec, features=features[:1], grid=(6, 6))


def of_layer(rows: int = 3, batch: int = 2, width: int = 8) -> dict[str, Tensor]:
    """What DART reads of a layer: 12 tokens of two units and ``rows`` words."""
    keys = {"lm_keys": torch.rand(2, 12, 2, 4), "text_keys": torch.rand(batch, rows, 2, 4)}
    return keys | {"lm_states": torch.rand(2, 12, 8), "text_states": torch.rand(batch, rows, width)}


@pytest.mark.parametrize(
    ("method", "tensors", "message"),
    [
        ("dart", of_layer(batch=1), "expected .batch, words, heads, width. with batch 2"),
        ("dart", of_layer(width=9), "text_states has width 9, lm_states 8"),
        ("dart", of_layer() | {"text_keys": torch.rand(2, 4, 2, 4)}, "tensors disagree on the words"),
        ("dart", of_layer() | {"text_keys": torch.rand(2, 3, 8)}, "text_keys has shape .*expected 4 axes"),
        ("dart", of_layer() | {"text_states": [1]}, "text_states is a list"),
        ("dart", of_layer() | {"query_mask": torch.ones(2, 4) > 0}, "query_mask is .*bool of shape .2, 3"),
        ("random", {"layer_inputs": torch.rand(2, 12)}, "layer_inputs has shape .*expected 3 axes"),
        ("random", {"features": torch.rand(2, 12, 8), "layer_inputs": torch.rand(2, 11, 8)}, "disagree"),
        ("random", {"layer_inputs": torch.rand(1, 12, 8), "text_inputs": torch.rand(1, 3, 7)}, "width 7"),
        *(
            (name, {"text_attention": torch.rand(2, 1, 3, 12), "text_to_text": torch.rand(shape)}, message)
            for name in ("sparsevlm", "adaptinfer")
            for shape, message in [((2, 1, 4, 4), "on the words"), ((1, 1, 3, 3), "with batch 2")]
        ),
    ],
)
def test_text_of_a_layer_is_checked(method: str, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        vlmprune.select(method, 4, **tensors)


class Uncompared(Tensor):
    """A tensor that no == may touch."""

    def __eq__(self, other: object) -> Any:
        raise AssertionError("compared")

    __hash__ = Tensor.__hash__


def test_a_field_is_looked_up_without_comparing_its_values() -> None:
    rows = torch.rand(1, 4, 2).as_subclass(Uncompared)
    assert VisualTokens(features=rows).need("features") is rows
    with pytest.raises(CaptureError, match="needs 'keys'"):
        VisualTokens(features=rows).need("keys")
    with pytest.raises(GridError, match="needs 'grids'"):
        VisualTokens(features=rows).need("grids")


def test_text_of_a_layer_that_fits_is_read() -> None:
    mask = torch.tensor([[True, True, False], [True] * 3])
    assert vlmprune.select("dart", 4, **of_layer(), query_mask=mask).shape == (2, 4)
