# SPDX-License-Identifier: Apache-2.0
"""Bad models, arguments and tensors: the error shows the type, name or shape that was given, and the model
stays as it was.
"""

from __future__ import annotations

import importlib.util
import math
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import strategies as st
from torch import nn

import vlmprune
from vlmprune.api import POSITIONS
from vlmprune.errors import UnsupportedError
from vlmprune.models import families
from vlmprune.registry import get

_spec = importlib.util.spec_from_file_location("bad_inputs", Path(__file__).with_name("test_bad_inputs.py"))
tools = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tools)
Bad, answer, inputs, misspelt, model, refused = (
    tools.Bad,
    tools.answer,
    tools.inputs,
    tools.misspelt,
    tools.model,
    tools.refused,
)

# --- models and arguments -------------------------------------------------------------------------


@cache
def wrong_models() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """What somebody may take for a model, and what the error must show."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    both = {"text_config": text, "vision_config": sizes | {"image_size": 28, "patch_size": 14}}
    good = model()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, num_key_value_heads=2))
    bert = transformers.BertModel(transformers.BertConfig(**text))
    blind = [llama, llama.model, bert, good.model.vision_tower, nn.Sequential(good)]
    things = [type(good), good.config, good.state_dict(), object()]
    return {
        **{
            type(found).__name__: (found, (type(found).__name__, "no vision tower", *families()))
            for found in blind
        },
        **{type(found).__name__: (found, (type(found).__name__, "from_pretrained")) for found in things},
        "clip": (transformers.CLIPModel(transformers.CLIPConfig(**both)), ("model type 'clip'", *families())),
        "siglip": (
            transformers.SiglipModel(transformers.SiglipConfig(**both)),
            ("model type 'siglip'", *families()),
        ),
        "inner": (good.model, ("LlavaModel", "ForConditionalGeneration")),
        "parallel": (nn.DataParallel(good), ("DataParallel", "one process per device")),
    }


def stranger(model_type: str) -> nn.Module:
    """A model of a family that does not exist."""
    found = nn.Module()
    found.config = SimpleNamespace(model_type=model_type, vision_config=SimpleNamespace())
    return found


REPLAY = vlmprune.KeepMap([1, 4], 36, ((6, 6),)).replay
ATTACHING = {"prune": vlmprune.prune, "attach": vlmprune.attach}
TAKING = ATTACHING | {"score": lambda found, method: vlmprune.score(found, inputs(), method)}
thing = (
    st.none()
    | st.text(string.ascii_letters, max_size=8)
    | st.integers()
    | st.binary(max_size=4)
    | st.just({})
)
wrong_family = misspelt(families()).filter(lambda pair: pair[0] not in families())
wrong_model = st.deferred(lambda: st.sampled_from(sorted(wrong_models())))
verbs, taking = st.sampled_from(sorted(ATTACHING)), st.sampled_from(sorted(TAKING))
layer = st.integers(5, 2**63 - 1) | st.integers(-(2**63) + 1, -5) | st.just(0)
not_positions = st.sampled_from([1, True, "", [], ("compact",), {}]).map(lambda given: (given, ""))
keyword = st.sampled_from(tools.DROP_WORDS) | misspelt(["positions", "strict"]).map(lambda pair: pair[0])
no_images = st.sets(st.sampled_from(["input_ids", "attention_mask", "pixel_value", "images", "image_sizes"]))


def taken(
    verb: str, what: object, found: Any, method: Any, shows: tuple[str, ...], near: str = "", **options: Any
) -> Any:
    return Bad(f"{verb}({what})", lambda: TAKING[verb](found, method, **options), shows, near)


def of_positions(verb: str, given: tuple[Any, str]) -> Any:
    return taken(
        verb, given[0], model(), "random@4", (repr(given[0]), *POSITIONS), given[1], positions=given[0]
    )


def of_keyword(verb: str, word: str) -> Any:
    """A keyword that does not exist: refused by Python itself."""
    return taken(verb, word, model(), "random@4", (repr(word),), **{word: 0.5})._replace(error=TypeError)


def of_inputs(given: Any, *shows: str) -> Any:
    return Bad(f"score {given!r}", lambda: vlmprune.score(model(), given, "random"), ("pixel_values", *shows))


bad_arguments = st.one_of(
    st.builds(
        lambda v, name: taken(v, name, wrong_models()[name][0], "dense", wrong_models()[name][1]),
        taking,
        wrong_model,
    ),
    st.builds(
        lambda v, t: taken(v, repr(t), t, "dense", (type(t).__name__, "from_pretrained")), taking, thing
    ),
    st.builds(
        lambda v, p: taken(v, p[0], stranger(p[0]), "dense", (repr(p[0]), "select", *families())),
        taking,
        wrong_family,
    ),
    st.builds(
        lambda v, i: taken(v, i, model(), f"fastervlm(layer={i})@4", (f"layer={i}", "-4..-1 and 1..4")),
        verbs,
        layer,
    ),
    st.builds(
        lambda v, k: taken(v, k, model(), get("dense")(), (f"keep={k}", "dense"), keep=k),
        verbs,
        st.integers(1, 9999),
    ),
    st.builds(
        lambda v, k: taken(v, k, model(), "random@4", (f"keep={k}", "'random@4'"), keep=k),
        verbs,
        st.integers(),
    ),
    st.builds(
        lambda name: taken("score", name, model(), name, (repr(name), "select(")),
        st.sampled_from(["divprune", "pool"]),
    ),
    st.builds(
        lambda v, m: taken(v, m, model(), get(m), (get(m).__name__, "is a class")),
        taking,
        st.sampled_from(tools.METHODS),
    ),
    st.builds(of_positions, verbs, misspelt(POSITIONS) | not_positions),
    st.builds(of_keyword, verbs, keyword),
    no_images.map(lambda names: of_inputs(dict.fromkeys(names, 1), *names)),
    thing.filter(lambda given: given != {}).map(lambda given: of_inputs(given, type(given).__name__)),
    st.builds(
        lambda v: taken(
            v, "Method()", model(), vlmprune.Method(), ("Method", "score, select, merge"), keep=4
        ),
        verbs,
    ),
)

# --- tensors for select ---------------------------------------------------------------------------

TENSORS = ("features", "cls_attention", "received_attention", "encoder_features", "keys", "cls_features")
FIELDS = (*TENSORS, "projector", "grid", "ordinal")
USED = [
    ("fastervlm", "cls_attention"),
    ("fastervlm(cls=mean)", "received_attention"),
    ("divprune", "features"),
    ("pool", "features"),
    ("visionzip", "cls_attention"),
    ("visionzip", "keys"),
    ("visionzip", "encoder_features"),
    ("visionzip", "features"),
]


def tensors(batch: int = 2, n: int = 12) -> dict[str, Any]:
    """Everything that any method reads, of two units of 3 x 4 tokens."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(batch, n, 8), (batch, 4, n), (batch, n), (batch, n, 6), (batch, n, 5), (batch, 1, 6)]
    found = {name: torch.rand(shape, generator=draw) for name, shape in zip(TENSORS, shapes, strict=True)}
    return found | {"projector": nn.Linear(6, 8), "grid": (3, 4), "ordinal": torch.arange(batch)}


def chosen(
    method: str,
    what: object,
    shows: tuple[str, ...],
    near: str = "",
    drop: tuple[str, ...] = (),
    **change: Any,
) -> Any:
    """``select`` with one argument changed, added or left out."""
    given = {name: value for name, value in (tensors() | change).items() if name not in drop}
    return Bad(
        f"{method} {[*change, *drop]} {what}", lambda: vlmprune.select(method, keep=4, **given), shows, near
    )


def remade(used: tuple[str, str], make: Callable[[torch.Tensor], Any]) -> Any:
    wrong = make(tensors()[used[1]])
    given = (
        (str(tuple(wrong.shape)), str(wrong.dtype))
        if isinstance(wrong, torch.Tensor)
        else (type(wrong).__name__, "")
    )
    return chosen(used[0], given, (used[1], given[0], "expected"), **{used[1]: wrong})


def of_count(used: tuple[str, str], shape: tuple[int, int]) -> Any:
    return chosen(used[0], shape, (used[1], str(shape), "(2, 12)"), **{used[1]: tensors(*shape)[used[1]]})


def of_none(used: tuple[str, str], shape: tuple[int, int]) -> Any:
    shows = ("no tokens", f"batch {shape[0]}", f"tokens {shape[1]}")
    return chosen(
        used[0], shape, shows, drop=("grid", "ordinal"), **{name: tensors(*shape)[name] for name in TENSORS}
    )


def with_one(used: tuple[str, str], place: int, number: float) -> Any:
    wrong = tensors()[used[1]]
    wrong.view(-1)[place % wrong.numel()] = number
    return chosen(used[0], (place % wrong.numel(), number), ("not finite",), **{used[1]: wrong})


used = st.sampled_from(USED)
other_rank = st.sampled_from(
    [lambda v: v[0, 0], torch.sum, lambda v: v[None, None], lambda v: v[..., None, None]]
)
method = st.sampled_from([name for name, _ in USED])
side = st.integers(1, 12)
thin = st.tuples(st.integers(-3, 0), side)
other_grid = st.tuples(side, side).filter(lambda g: g[0] * g[1] != 12)
# int() would read some of these
NO_GRIDS = [
    12,
    "34",
    (3.5, 4),
    (3, 4, 1),
    (),
    ((3, 4), (1,)),
    (None, 12),
    ((2.5, 4), (1, 2)),
    (3, "4"),
    {},
    {"rows": 3},
]
MORE = [
    {"projector": 3},
    {"projector": "linear"},
    {"ordinal": [0, 1]},
    {"ordinal": "x"},
    {"ordinal": torch.arange(3)},
    {"ordinal": torch.zeros(2)},
    {"ordinal": torch.tensor(0)},
    {"cls_features": torch.rand(3, 1, 6)},
    {"cls_features": torch.rand(2, 1, 7)},
    {"cls_features": torch.rand(2, 6)},
    {"cls_features": [1]},
]

bad_tensors = st.one_of(
    st.builds(remade, used, other_rank),
    st.builds(
        remade, used, st.sampled_from([torch.Tensor.tolist, torch.Tensor.numpy, str, len, lambda v: (v,)])
    ),
    st.builds(
        remade,
        used,
        st.sampled_from([torch.Tensor.long, torch.Tensor.bool, torch.Tensor.byte, torch.Tensor.cfloat]),
    ),
    st.builds(of_count, used, st.tuples(side, side).filter(lambda shape: shape != (2, 12))),
    st.builds(of_none, used, st.sampled_from([(0, 12), (2, 0), (0, 0)])),
    st.builds(with_one, used, st.integers(0, 95), st.sampled_from([math.nan, math.inf, -math.inf])),
    st.builds(lambda m, g: chosen(m, g, (repr(g), str(g[0] * g[1]), "12"), grid=g), method, other_grid),
    st.builds(
        lambda m, g: chosen(m, g, (repr(g), "expected positive"), grid=g),
        method,
        thin | thin.map(lambda g: g[::-1]),
    ),
    st.builds(
        lambda m, g: chosen(m, g, (repr(g), "(rows, cols)"), grid=g), method, st.sampled_from(NO_GRIDS)
    ),
    st.builds(
        lambda m, p: chosen(m, p[0], (repr(p[0]), *FIELDS), p[1], **{p[0]: 1}), method, misspelt(FIELDS)
    ),
    st.builds(lambda u: chosen(u[0], "left out", (repr(u[1]), f"{u[1]}="), drop=(u[1],)), used),
    st.builds(
        lambda m: chosen(m, "left out", ("'grids'", "grid="), drop=("grid",)),
        st.sampled_from(["uniform", "pool"]),
    ),
    st.builds(lambda m: chosen(m, "nothing", ("no token tensor", "features"), drop=FIELDS), method),
    st.builds(lambda m, c: chosen(m, c, tuple(c), **c), method, st.sampled_from(MORE)),
)

# --- inputs of the model --------------------------------------------------------------------------

REFUSED_BY_TRANSFORMERS = (ValueError, RuntimeError)


def call(family: str, how: str, change: dict[str, Any]) -> Any:
    """Run the model under pruning, or score, with some inputs changed."""
    given = {name: value for name, value in (inputs(family) | change).items() if value is not None}
    if how == "score":
        return vlmprune.score(model(family), given, "fastervlm(cls=mean)")
    with vlmprune.prune(model(family), "divprune@4"), torch.no_grad():
        return (
            model(family)(**given) if how == "forward" else model(family).generate(**given, max_new_tokens=2)
        )


def ran(
    family: str,
    how: str,
    what: object,
    shows: tuple[str, ...],
    error: Any = vlmprune.VlmPruneError,
    **change: Any,
) -> Any:
    return Bad(
        f"{family} {how} {[*change]} {what}", lambda: call(family, how, change), shows, "", error, family
    )


def of_pixels(family: str, how: str, make: Callable[[torch.Tensor], Any]) -> Any:
    wrong = make(inputs(family)["pixel_values"])
    shown = str(tuple(wrong.shape)) if isinstance(wrong, torch.Tensor) else type(wrong).__name__
    return ran(family, how, shown, ("pixel_values", shown), pixel_values=wrong)


def with_nan(family: str, how: str, place: int, number: float) -> Any:
    wrong = inputs(family)["pixel_values"].clone()
    wrong.view(-1)[place % wrong.numel()] = number
    return ran(family, how, (place, number), ("finite",), pixel_values=wrong)


def placeholders(family: str, how: str, count: int) -> Any:
    """More or fewer image tokens than the images have: refused by transformers."""
    ids, token = inputs(family)["input_ids"].clone(), model(family).config.image_token_id
    places = ((ids[0] == token) if count < 0 else (ids[0] != token)).nonzero()[: abs(count), 0]
    ids[0, places] = token if count > 0 else 5
    return ran(family, how, count, ("tokens", "features"), REFUSED_BY_TRANSFORMERS, input_ids=ids)


def mask(family: str, how: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    wrong = make(inputs(family)["attention_mask"])
    if how == "generate":  # refused by transformers, which wants two axes
        return ran(
            family, how, wrong.shape, ("attention_mask", "2D"), REFUSED_BY_TRANSFORMERS, attention_mask=wrong
        )
    return ran(family, how, wrong.shape, ("attention_mask", str(tuple(wrong.shape))), attention_mask=wrong)


family = st.sampled_from(["llava", "vipllava", "llava_next", "llava_onevision"])
tiled = st.sampled_from(["llava_next", "llava_onevision"])
running, any_way = st.sampled_from(["forward", "generate"]), st.sampled_from(["forward", "generate", "score"])
FOUR_AXES = [
    lambda m: m[:, None, None] * torch.ones(m.shape[1], 1),
    lambda m: m[:, None],
    lambda m: m[None, :, None, None],
]
OTHER_SIZES = [lambda m: m[:, 1:], lambda m: torch.cat([m, m], 1), lambda m: m.repeat(2, 1), lambda m: m[0]]


def of_position_ids(family: str, count: int) -> Any:
    count += count >= inputs(family)["input_ids"].shape[1]
    return ran(
        family, "forward", count, ("position_ids", str((1, count))), position_ids=torch.arange(count)[None]
    )


def of_layer(family: str, how: str, layer: int) -> Any:
    name = next(
        name
        for name in ("vision_feature_layer", "vision_feature_layers")
        if hasattr(model(family).config, name)
    )
    return ran(family, how, layer, (f"{name}={layer}", "config"), **{name: layer})


def of_sizes(family: str, how: str, sizes: list[list[int]] | None) -> Any:
    wrong = None if sizes is None else torch.tensor(sizes)
    shows = (
        ("missing",)
        if sizes is None
        else (str(sizes), "size zero")
        if len(sizes) == 1
        else (str((len(sizes), 2)),)
    )
    return ran(family, how, sizes, ("image_sizes", *shows), image_sizes=wrong)


image_counts = st.sampled_from([0, 2, 3]).map(lambda n: torch.tensor([n]))
no_side = st.tuples(st.integers(-2, 0), st.integers(1, 99)).map(list)
bad_sizes = (no_side | no_side.map(lambda size: size[::-1])).map(lambda size: [size])
bad_model_inputs = st.one_of(
    st.builds(
        of_pixels,
        family,
        any_way,
        st.integers(-4, 3).map(lambda axis: lambda pixels: pixels.narrow(axis, 0, 0)),
    ),
    st.builds(placeholders, family, running, st.integers(1, 5) | st.integers(-5, -1)),
    st.builds(mask, family, st.just("forward"), st.sampled_from([*FOUR_AXES, *OTHER_SIZES])),
    st.builds(mask, family, st.just("generate"), st.sampled_from(FOUR_AXES)),
    st.builds(of_layer, family, any_way, st.sampled_from([-4, -5, 2, 3])),
    st.builds(
        of_pixels, family, any_way, st.sampled_from([torch.Tensor.tolist, torch.Tensor.numpy, torch.sum])
    ),
    st.builds(with_nan, family, any_way, st.integers(0, 10**5), st.sampled_from([math.nan, math.inf])),
    st.builds(of_position_ids, family, st.integers(1, 300)),
    st.builds(mask, family, st.just("forward"), st.just(torch.zeros_like)),
    st.builds(of_sizes, tiled, any_way, bad_sizes | st.sampled_from([None, [[9, 9]] * 2, [[9, 9]] * 3])),
    st.builds(
        lambda how, n: ran("llava_onevision", how, n, ("batch_num_images",), batch_num_images=n),
        any_way,
        image_counts,
    ),
)


# category: (drawn inputs, how many to draw, how many different ones must have been refused)
CATEGORIES = {
    "arguments": (bad_arguments, 200, 100),
    "tensors": (bad_tensors, 250, 150),
    "inputs": (bad_model_inputs, 120, 80),
}


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_bad_input_is_refused_and_changes_nothing(category):
    strategy, examples, different = CATEGORIES[category]
    before = answer(model())
    assert len(refused(strategy, examples)) >= different
    assert answer(model()) == before


def test_the_tensors_are_good_when_nothing_is_wrong_with_them():
    for method, _ in USED:
        assert vlmprune.select(method, keep=4, **tensors()).shape[0] == 2


def test_a_tower_without_cls_is_told_what_works_instead():
    for name in ("fastervlm@4", "visionzip@4"):
        with pytest.raises(UnsupportedError, match=r"SiglipVisionModel has no \[CLS\] token: use cls='mean'"):
            vlmprune.attach(model("llava_onevision"), name)


@pytest.mark.parametrize("tokens", [1, 2, 9, 35])
def test_a_replay_refuses_images_of_another_size(tokens):
    with pytest.raises(vlmprune.VlmPruneError, match=f"{tokens} tokens; this replay holds 2 of 36"):
        vlmprune.select(REPLAY, features=torch.rand(1, tokens, 8))
