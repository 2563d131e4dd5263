# SPDX-License-Identifier: Apache-2.0
"""What vLLM is told when it loads its plug-ins."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.serving import overrides
from vlmprune.serving.vllm import plugin

pytestmark = pytest.mark.vllm
LLAVA, OTHER = "LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration"


@pytest.fixture
def registry(monkeypatch):
    from vllm import ModelRegistry

    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    monkeypatch.delenv("VLMPRUNE", raising=False)
    monkeypatch.setenv(plugin.RAY_COPIES, "MINE")  # what a user has set stays
    return ModelRegistry.models


def test_vllm_finds_the_entry_point():
    (found,) = [one for one in entry_points(group="vllm.general_plugins") if one.name == "vlmprune"]
    assert found.load() is plugin.register


def test_who_merely_has_vlmprune_gets_the_classes_of_vllm(registry):
    before = dict(registry)
    plugin.register()
    assert {name: registry[name] for name in before if not name.startswith("VlmPrune")} == {
        name: model for name, model in before.items() if not name.startswith("VlmPrune")
    }
    assert registry["VlmPrune" + LLAVA].module_name == "vlmprune.serving.vllm.llava"


def test_our_lines_go_where_those_of_vllm_go_unless_somebody_said_where(registry, monkeypatch):
    """Without this no line below a warning is ever shown."""
    ours, root, theirs = (logging.getLogger(name) for name in ("vlmprune", None, "vllm"))
    for logger in (ours, root, theirs):
        monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(ours, "parent", root)
    ours.handlers = [logging.NullHandler()]
    plugin.register()
    assert ours.parent is root
    ours.handlers = []
    plugin.register()
    # vLLM sets its handlers after it has asked us
    shown = []
    handler = logging.NullHandler()
    handler.handle = shown.append
    theirs.handlers = [handler]
    monkeypatch.setattr(theirs, "level", logging.INFO)
    for logger in (ours, theirs):
        logger.manager._clear_cache()
    logging.getLogger("vlmprune.serving.tally").info("a line")
    assert [record.getMessage() for record in shown] == ["a line"]


def test_the_variable_puts_ours_in_place_and_refuses_other_families_by_name(registry, monkeypatch):
    monkeypatch.setenv("VLMPRUNE", "fastervlm@64")
    text_only = registry["LlamaForCausalLM"]
    plugin.register()
    assert registry[LLAVA].module_name == "vlmprune.serving.vllm.llava"
    assert registry["LlamaForCausalLM"] is text_only
    with pytest.raises(UnsupportedError, match=f"{OTHER} cannot be pruned in vLLM yet"):
        registry[OTHER].load_model_cls()


@pytest.mark.parametrize(
    "name", ["TransformersMultiModalForCausalLM", "TransformersMultiModalMoEForCausalLM"]
)
def test_with_the_variable_no_wrapper_of_transformers_serves_a_family_whole(registry, monkeypatch, name):
    """What vLLM runs where it has no class of a family, or with --model-impl transformers."""
    own = registry[name]
    plugin.register()
    assert registry[name] is own
    monkeypatch.setenv("VLMPRUNE", "divprune@64")
    plugin.register()
    with pytest.raises(UnsupportedError, match=f"{name} cannot be pruned in vLLM yet"):
        registry[name].load_model_cls()
    assert registry["TransformersForCausalLM"].module_name != plugin.REFUSED  # text alone is none of ours


def test_workers_of_ray_are_given_the_variables(registry):
    """Else they would run vLLM's classes on prompts that were cut for ours."""
    from vllm.ray.ray_env import get_env_vars_to_copy

    wanted = {"VLMPRUNE", "VLMPRUNE_UNTESTED_VLLM"}
    assert not wanted & get_env_vars_to_copy()
    plugin.register()
    plugin.register()
    assert wanted | {"MINE"} <= get_env_vars_to_copy()


def test_a_family_without_a_class_in_vllm_gets_ours(registry, monkeypatch):
    monkeypatch.setenv("VLMPRUNE", "divprune@64")
    plugin.register()
    # vLLM has a class of its own for the last
    for name in ("VipLlava", "AyaVision", "Mistral3"):
        name += "ForConditionalGeneration"
        assert registry[name].module_name == "vlmprune.serving.vllm.wrapped"
    for name, model in (("Glm4v", "ForCausalLM"), ("Glm4vMoe", "MoEForCausalLM")):
        found = registry[name + "ForConditionalGeneration"]
        assert found.module_name == "vlmprune.serving.vllm.wrapped_mrope"
        assert found.class_name == "PlacedMultiModal" + model


def test_each_picture_of_an_item_loses_its_own_placeholders():
    from vllm.multimodal.processing import PromptUpdateDetails

    from vlmprune.serving.vllm.processor import without

    text = PromptUpdateDetails.select_token_id([1, 7, 9, 9, 9, 8, 9, 9, 9, 2], 9)
    left = without(text, [(3, 2), (3, 1)])
    assert list(left.full) == [1, 7, 9, 9, 8, 9, 2]
    assert left.is_embed(list(left.full)).tolist() == [False, False, True, True, False, True, False]
    # rows of one picture with newlines, which have placeholders of their own
    assert without([9] * 8, [(6, 2)]) == [9] * 4
    assert without(text, [(3, 3), (3, 3)]) is text
    # words between lines of tokens ride as rows, also where all tokens stay
    lines = PromptUpdateDetails.select_token_id([1, 9, 9, 9, 8, 9, 9, 9, 2], 9)
    for kept in (6, 4, 1):
        left = without(lines, [(6, kept)], breaks=True)
        assert list(left.full) == [1] + [9] * (kept + 1) + [2]
        assert left.is_embed(list(left.full)).tolist() == [False] + [True] * (kept + 1) + [False]
    # more words than placeholders: what stands for a token is told, not guessed
    frames = PromptUpdateDetails.select_token_id([1, 7, 9, 8, 7, 7, 9, 2], 9)
    assert list(without(frames, [(2, 1)], breaks=True).full) == [1, 7, *[9] * 4, 2]
    with pytest.raises(UnsupportedError, match="6 placeholders for 8 visual tokens"):
        without(text, [(4, 2), (4, 2)])


@pytest.mark.parametrize(("height", "width"), [(1, 300), (300, 1), (30, 5000), (5000, 28), (336, 672)])
def test_a_very_narrow_picture_of_tiles_has_as_many_tokens_as_vllm_packs(height, width):
    """Its tiles are padding, of which no row or no column is left."""
    import torch
    from transformers import LlavaNextConfig
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
    from vllm.model_executor.models import llava_next

    from vlmprune.serving.vllm.llava_next import LlavaNextProcessor
    from vlmprune.serving.vllm.processor import tokens_of

    config, size = LlavaNextConfig(), (height, width)
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.info = llava_next.LlavaNextProcessingInfo.__new__(llava_next.LlavaNextProcessingInfo)
    processor.info.ctx = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    processor.info.get_hf_config = lambda: config
    items = SimpleNamespace(get_image_size=lambda _: SimpleNamespace(height=height, width=width))
    (grids,) = processor.pictures(items, 0, {})
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, 336)
    packed = llava_next.LlavaNextForConditionalGeneration._merge_image_patch_embeddings(
        SimpleNamespace(config=config, image_newline=torch.full((1,), torch.nan)),
        torch.tensor(size),
        torch.zeros(1 + down * across, 24 * 24, 1),
        strategy="spatial_unpad",
    )
    assert tokens_of(grids) == int((~packed.isnan()).sum()) and min(min(grid) for grid in grids) > 0


def test_a_wrong_variable_ends_the_start(registry, monkeypatch):
    monkeypatch.setenv("VLMPRUNE", "fastervlmm@64")
    with pytest.raises(SpecError, match="fastervlm"):
        plugin.register()


def test_untested_releases_are_refused_unless_a_variable_lets_them_run(registry, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.1+cu130")
    monkeypatch.setenv("VLMPRUNE", "fastervlm@64")
    monkeypatch.delenv("VLMPRUNE_UNTESTED_VLLM", raising=False)
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.33\.1 was not tested.*0\.32\.0"):
        plugin.register()
    monkeypatch.setenv("VLMPRUNE_UNTESTED_VLLM", "1")
    plugin.register()


def test_overrides_name_our_class_and_refuse_others():
    config = overrides("fastervlm(cls = mean)@64")(SimpleNamespace(architectures=[LLAVA]))
    assert (config.architectures, config.vlmprune) == (["VlmPrune" + LLAVA], "fastervlm(cls=mean)@64")
    assert overrides("dense")(config).architectures == ["VlmPrune" + LLAVA]  # asked again, nothing changes
    with pytest.raises(UnsupportedError, match=OTHER):
        overrides("dense")(SimpleNamespace(architectures=[OTHER]))


def test_the_load_client_of_vllm_takes_what_the_load_run_asks_for():
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from serving_load import Asked, Client, arguments

    server = SimpleNamespace(address="http://here:1", model=lambda: ("tiny", "/models/tiny"))
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    line = Client(server, arguments(["--side", "144"])).line(Asked("divprune@9", 4, 1, 7))
    asked = parser.parse_args(line)
    assert asked.extra_body == {"mm_processor_kwargs": {"vlmprune": "divprune@9"}}
    assert asked.random_mm_bucket_config == {(144, 144, 1): 1.0}
