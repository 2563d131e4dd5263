# SPDX-License-Identifier: Apache-2.0
"""What is refused at the start of a server, and of a client: checks, with the configs and items of vLLM."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from vlmprune.errors import UnsupportedError, VlmPruneError

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("name", ["cudagraph_mm_encoder", "compile_mm_encoder"])
def test_encoders_without_their_python_code_are_refused(name):
    from vllm.config import CompilationConfig

    from vlmprune.serving.vllm.towers import refuse_compiled

    assert name in {field.name for field in fields(CompilationConfig)}
    given = {"cudagraph_mm_encoder": False, "compile_mm_encoder": False}

    def config(**changed):
        return SimpleNamespace(compilation_config=SimpleNamespace(**given | changed), lora_config=None)

    refuse_compiled(config())
    with pytest.raises(UnsupportedError, match=f"start without {name}"):
        refuse_compiled(config(**{name: True}))


def test_adapters_of_the_encoder_are_refused_and_those_of_the_language_model_are_not():
    """vLLM gives them as many rows as a picture has placeholders, which are fewer than it has tokens."""
    from vllm.config.lora import LoRAConfig

    from vlmprune.serving.vllm.towers import refuse_compiled

    lora = LoRAConfig()
    config = SimpleNamespace(compilation_config=SimpleNamespace(), lora_config=lora)
    refuse_compiled(config)
    lora.enable_tower_connector_lora = True
    with pytest.raises(UnsupportedError, match="enable_tower_connector_lora"):
        refuse_compiled(config)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"vision_feature_select_strategy": "full"}, "expected 'default'"),
        ({"vision_feature_layer": [-2, -5]}, "expected those of one"),
        ({"vision_config": SimpleNamespace(model_type="pixtral")}, "expected CLIP or SigLIP"),
    ],
)
def test_features_that_are_put_together_in_other_ways_are_refused(changed, why):
    from transformers import LlavaConfig

    from vlmprune.serving.vllm.llava import check_config

    config = LlavaConfig()
    check_config(config)
    with pytest.raises(UnsupportedError, match=why):
        check_config(SimpleNamespace(**vars(config) | changed))


def request_of(spec, items, server=None, kind=None, **options):
    """What the processor of LLaVA-1.5, or another, makes of a request."""
    from vlmprune.serving.vllm.llava import LlavaProcessor

    config = SimpleNamespace(
        get_multimodal_config=lambda: SimpleNamespace(mm_processor_kwargs=server),
        hf_config=SimpleNamespace(),
    )
    kind = kind or LlavaProcessor
    processor = kind.__new__(kind)
    processor.info = SimpleNamespace(ctx=SimpleNamespace(model_config=config))
    given = {"vlmprune": spec, **options}
    return processor._request(SimpleNamespace(hf_processor_mm_kwargs=given, mm_data_items=items))


@pytest.mark.parametrize("spec", ["dense", "divprune@3"])
def test_options_of_the_processor_are_refused_in_a_request_unless_the_server_has_them(spec):
    size = {"height": 84, "width": 84}
    with pytest.raises(UnsupportedError, match=r"\['crop_size'\].*--mm-processor-kwargs"):
        request_of(spec, {}, crop_size=size)
    with pytest.raises(UnsupportedError, match=r"\['do_resize'\]"):
        request_of(spec, {}, do_resize=None)
    with pytest.raises(UnsupportedError, match="vlmprun'"):
        request_of(spec, {}, vlmprun="divprune@9")
    assert request_of(spec, {}, server={"crop_size": size}, crop_size=size).text == spec


def test_embeddings_made_elsewhere_are_refused_unless_all_stay():
    from vllm.multimodal.parse import ImageEmbeddingItems

    items = {"image": ImageEmbeddingItems(torch.zeros(1, 6, 8), 8)}
    assert request_of("dense", items).budget is None
    with pytest.raises(UnsupportedError, match="image embeddings, whose rows were chosen elsewhere"):
        request_of("divprune@3", items)


def test_embeddings_without_the_size_of_their_picture_are_refused_also_if_all_stay():
    from vllm.multimodal.parse import ImageEmbeddingItems

    from vlmprune.serving.vllm.wrapped_mrope import PlacedProcessor

    assert request_of("dense", {}, kind=PlacedProcessor).budget is None
    with pytest.raises(UnsupportedError, match="image embeddings, whose places in the picture"):
        request_of("dense", {"image": ImageEmbeddingItems(torch.zeros(1, 6, 8), 8)}, kind=PlacedProcessor)


def test_a_clip_is_refused_where_images_only_are_pruned():
    assert request_of("dense", {"video": [0]}).budget is None
    with pytest.raises(UnsupportedError, match="a video, which cannot be pruned in this model"):
        request_of("divprune@3", {"video": [0]})


@pytest.mark.parametrize(
    ("spec", "why"), [("fastervlmm@64", "fastervlm"), ("fastervlm(layer=-1)@64", "first 23 of 24 blocks")]
)
def test_a_default_that_cannot_run_ends_the_start(monkeypatch, spec, why):
    """Given by --mm-processor-kwargs, or by a model's config; else every request would get 400."""
    from transformers import LlavaConfig
    from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

    from vlmprune.serving.vllm.llava import LlavaProcessor
    from vlmprune.serving.vllm.processor import WarmUp

    monkeypatch.delenv("VLMPRUNE", raising=False)
    monkeypatch.setattr(
        BaseMultiModalProcessor,
        "get_dummy_inputs",
        lambda *given, **options: ProcessorInputs([7], {}),
        raising=False,
    )

    def started(server, **config):
        processor = LlavaProcessor.__new__(LlavaProcessor)
        multimodal = SimpleNamespace(mm_processor_kwargs=server)
        processor.info = SimpleNamespace(
            ctx=SimpleNamespace(
                model_config=SimpleNamespace(
                    get_multimodal_config=lambda: multimodal,
                    hf_config=LlavaConfig(**config),
                    quantization=None,
                )
            )
        )
        return processor.get_dummy_inputs()

    made = started({"vlmprune": "fastervlm@64"})
    assert isinstance(made, WarmUp) and made.prompt == [7]
    assert made.hf_processor_mm_kwargs["vlmprune"] == "dense"
    for server, config in (({"vlmprune": spec}, {}), (None, {"vlmprune": spec})):
        with pytest.raises(VlmPruneError, match=why):
            started(server, **config)
