# SPDX-License-Identifier: Apache-2.0
"""Every model type of transformers that reads pictures: declared, carried by structure, or refused with a
reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from available import available
from later_families import param, sampled
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAP

import vlmprune
from vlmprune.errors import InvariantError, UnsupportedError
from vlmprune.models import adapter_for, check_family, families, structural_types
from vlmprune.models.structural import StructuralAdapter
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import FAMILIES, tiny_inputs, tiny_model

LAYERS = 2  # of every part of a model that is built for its structure alone
COUNTS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers")
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
# their default config builds no model, or asks for a package that is not there
UNBUILT = {
    "chameleon",
    "emu3",
    "hunyuan_vl",
    "inkling_mm_model",
    "qwen4_exp",
}
# what a model may lack, in the words of its refusal
REASONS = (
    "no vision tower in its config",
    "no decoder with layers below",
    "no get_image_features below",
    "takes no mm_encoder_outputs",
    "nothing is known of cuts before layers of kind",
    "chooses keys by an index",
    "makes masks before its decoder",
    "added to hidden states",
)


def shrunk(config: Any) -> Any:
    """A config with few layers and experts."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrunk(value)
        elif name in (*COUNTS, *EXPERTS) and isinstance(value, int) and value > 2 * LAYERS:
            setattr(config, name, 2 * LAYERS)
        elif name.endswith(("layer_types", "indexer_types")) and isinstance(value, list):
            setattr(config, name, value[: 2 * LAYERS])
    return config


def built(model_type: str) -> Any:
    """A model of this type without weights."""
    config = shrunk(CONFIG_MAPPING[model_type]())
    with torch.device("meta"):
        return getattr(transformers, MAP[model_type])(config)


@pytest.mark.parametrize("model_type", sorted(set(MAP) - set(families()) - set(structural_types())))
def test_what_has_no_tokens_of_a_picture_is_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"'{model_type}' is not supported: .{{20,}}; families with"):
        check_family(model_type)


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if sampled(name, 6) else pytest.mark.slow) for name in structural_types()],
)
def test_what_has_no_adapter_is_carried_by_structure_or_refused_with_the_reason(model_type: str) -> None:
    try:
        model = built(model_type)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        assert model_type in UNBUILT
        pytest.skip(f"{model_type}: its default config builds no model")
    try:
        adapter = adapter_for(model)
    except UnsupportedError as error:
        assert any(reason in str(error) for reason in REASONS), error
        return
    assert isinstance(adapter, StructuralAdapter)
    assert adapter.modalities[0].name == "image" and len(adapter.language_model.layers) == adapter.depth
    with pytest.raises(UnsupportedError, match="use a method that reads features only"):
        vlmprune.prune(model, "fastervlm(cls=mean)@9")


ALIKE = ("llava", "internvl", "qwen3_vl", "mistral3", "glm4v", "lfm2_vl", "ovis2", "cohere2_vision")


@pytest.mark.parametrize("family", [param("alike", family, one_in=2) for family in ALIKE])
def test_by_structure_the_same_tokens_are_cut_as_by_declaration(family: str) -> None:
    model, inputs = available(family), tiny_inputs(family, images=(1, 2, 0))
    found: list[Tensor] = []
    for adapter in (None, StructuralAdapter):
        with vlmprune.prune(model, "divprune@9", adapter=adapter) as run:
            found.append(generate(model, inputs))
        assert run.last.realised_tokens == [9, 9, 9]
    assert torch.equal(*found) and "by structure" in str(run.last)
    assert [len(one.keep_idx) for one in run.last.keep] == [9, 9, 9]
    with (
        pytest.raises(UnsupportedError, match="needs 'grids'"),
        vlmprune.prune(model, "pool@9", adapter=StructuralAdapter),
    ):
        generate(model, inputs)


def test_a_sequence_that_does_not_hold_the_features_is_refused() -> None:
    """A model that changed features while it merges them would be cut by the wrong tokens."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava")

    def swap(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].flip(1)}

    model.model.language_model.register_forward_pre_hook(swap, with_kwargs=True)
    with (
        pytest.raises(InvariantError, match="does not hold the features"),
        vlmprune.prune(model, "random@9", adapter=StructuralAdapter),
    ):
        generate(model, inputs)


def test_something_of_every_token_that_nobody_named_is_refused() -> None:
    model, inputs = tiny_model("llava"), tiny_inputs("llava")
    length = inputs["input_ids"].shape[1]

    def add(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "routes": torch.zeros(1, length)}

    model.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
    with (
        pytest.raises(UnsupportedError, match="'routes' of shape"),
        vlmprune.prune(model, "random@9"),
        torch.no_grad(),
    ):
        model(**inputs)


def test_every_declared_family_has_a_tiny_model() -> None:
    assert set(families()) == set(FAMILIES)
