# SPDX-License-Identifier: Apache-2.0
"""Models by name: what is saved loads again and answers the same; what cannot be pruned is refused early."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_torchvision_available
from typer.testing import CliRunner

import vlmprune
from vlmprune.cli import app
from vlmprune.errors import SpecError, UnsupportedError, VlmPruneError
from vlmprune.models.loading import encode, load, prompt
from vlmprune.testing.tiny import LLAVA_FAMILIES, picture, tiny_bundle

SPEC = {"llava_onevision": "fastervlm(cls=mean)@0.25"}  # its tower has no [CLS]


def answer(model, processor):
    inputs = encode(model, processor, picture(), "What is it?")
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


def save(family, folder):
    if family == "llava_onevision" and not is_torchvision_available():
        pytest.skip(
            "transformers needs torchvision for the video processor that belongs to a saved llava_onevision"
        )
    model, processor = tiny_bundle(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny LLaVA, not to be changed."""
    folder = tmp_path_factory.mktemp("llava")
    save("llava", folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("family", LLAVA_FAMILIES)
def test_a_saved_model_answers_the_same_dense_and_pruned(family, tmp_path):
    model, processor = save(family, tmp_path)
    again, its_processor = load(str(tmp_path))
    assert not again.training and type(again) is type(model)
    assert answer(again, its_processor).tolist() == answer(model, processor).tolist()
    spec = SPEC.get(family, "fastervlm@0.25")
    with vlmprune.prune(again, spec) as run, vlmprune.prune(model, spec):
        assert answer(again, its_processor).tolist() == answer(model, processor).tolist()
    assert run.last.pruned


def test_tiny_is_built_in():
    model, processor = load("tiny")
    assert model.dtype == torch.float32 and answer(model, processor).shape[0] == 1


@pytest.mark.parametrize("name", ["tiny", "saved"])
def test_the_dtype_is_as_asked(name, saved):
    model, processor = load("tiny" if name == "tiny" else str(saved), dtype="bfloat16")
    inputs = encode(model, processor, picture(), "?")
    assert model.dtype == inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64


# --- prompts --------------------------------------------------------------------------------------


def test_the_prompt_is_that_of_the_chat_template():
    _, processor = tiny_bundle()
    assert prompt(processor, "What is it?") == "USER: <image>\nWhat is it?\nASSISTANT:"


def test_without_a_template_the_prompt_is_that_of_llava():
    model, processor = tiny_bundle()
    processor.chat_template = None
    assert prompt(processor, "What is it?") == "USER: <image>\nWhat is it? ASSISTANT:"
    assert answer(model, processor).shape[0] == 1


def test_a_processor_of_tasks_is_given_the_task_alone():
    paligemma = type("PaliGemmaProcessor", (), {"image_token": "<image>"})()
    assert prompt(paligemma, "answer en What is it?") == "<image>answer en What is it?"


@pytest.mark.parametrize("template", [True, False])
def test_a_place_for_a_picture_in_the_question_is_one_too_many(template):
    model, processor = tiny_bundle()
    if not template:
        processor.chat_template = None
    with pytest.raises(SpecError, match="the question holds '<image>'; leave it out"):
        encode(model, processor, picture(), "<image> What is it?")


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}", "{% for %}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_fails_or_tries_to_break_out_is_one_error(template):
    _, processor = tiny_bundle()
    processor.chat_template = template
    with pytest.raises(VlmPruneError, match=r"the chat template of the model fails \(\w+: .+\); give"):
        prompt(processor, "What is it?")


# --- what cannot be loaded ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["./nothing/here", "../nothing", "~/no such folder", "a/b/c", "/nothing", "a\\b"]
)
def test_a_path_is_never_looked_up_as_an_id(name):
    with pytest.raises(
        VlmPruneError, match=r"the folder .* does not exist; expected 'tiny', a folder .* or an HF id"
    ):
        load(name)


def test_a_file_is_no_folder(saved):
    with pytest.raises(VlmPruneError, match="is a file"):
        load(str(saved / "config.json"))


def test_an_empty_name_is_refused():
    with pytest.raises(VlmPruneError, match="empty"):
        load("")


def test_an_empty_folder_is_named(tmp_path):
    # its name would be taken for a model type by some versions of transformers
    (tmp_path / "llava").mkdir()
    with pytest.raises(VlmPruneError, match=r"holds no config.json"):
        load(str(tmp_path / "llava"))


def test_an_unsupported_family_is_refused_before_its_weights_are_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "blip-2"}))
    with pytest.raises(
        UnsupportedError,
        match=r"'blip-2' is not supported: a Q-former .*; families with an adapter: .*'llava'",
    ):
        load(str(folder))


@pytest.mark.parametrize("text", ["{", "{}", "[]", "7", '{"model_type": ""}', '{"model_type": ["llava"]}'])
def test_a_config_that_makes_no_sense_is_one_error(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(VlmPruneError, match=r"the config of .* cannot be read"):
        load(str(folder))


def plant(folder, **config):
    """Give a checkpoint code that would be seen to run."""
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "theirs.Config"}} | config))
    (folder / "theirs.py").write_text("raise SystemExit('this ran')")


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("model_type", ["theirs", "minicpmv", "llava_next_2"])
def test_a_checkpoint_with_code_is_refused_before_it_runs(folder, model_type, trust):
    plant(folder, model_type=model_type)
    told = r"code that comes with it was not run.*Run it dense, or .*vlmprune\.select"
    with pytest.raises(UnsupportedError, match=told) as error:
        load(str(folder), trust_remote_code=trust)
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("trust", [False, True])
def test_a_supported_model_is_always_that_of_transformers(folder, trust):
    plant(folder, **json.loads((folder / "config.json").read_text()))
    if trust:  # the tokenizer looks at the config of the checkpoint, so its code does run then
        (folder / "theirs.py").write_text(
            "from transformers import LlavaConfig\n\nclass Config(LlavaConfig): ...\n"
        )
    model, processor = load(str(folder), trust_remote_code=trust)
    assert type(model).__module__.startswith("transformers.") and type(model.config).__module__.startswith(
        "transformers."
    )
    assert answer(model, processor).shape[0] == 1


@pytest.mark.parametrize(
    ("config", "example"),
    [
        ({"model_type": "internvl_chat"}, "OpenGVLab/InternVL3-1B-hf"),
        ({"model_type": "llava_qwen"}, "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "llava-hf/llava-1.5-7b-hf"),
    ],
)
def test_a_checkpoint_in_its_authors_format_names_a_converted_one(folder, config, example):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedError, match=f"a converted checkpoint, whose name ends in -hf, such as {example}"
    ):
        load(str(folder))


def test_a_reason_that_is_known_is_given(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "mllama"}))
    with pytest.raises(UnsupportedError, match="read by cross-attention"):
        load(str(folder))


def test_only_safetensors_are_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(VlmPruneError, match=r"the weights of .* cannot be read: .*\*\.safetensors"):
        load(str(folder))


def test_spoilt_weights_are_one_error(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VlmPruneError, match=r"the weights of .* cannot be read"):
        load(str(folder))


def test_missing_weights_are_not_drawn_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    gone = sorted(name for name in weights if name.endswith("q_proj.weight"))[0]
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VlmPruneError, match=r"lack 1 tensors, such as '.*q_proj.weight'"):
        load(str(folder))


def test_a_missing_processor_is_one_error(folder):
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(VlmPruneError, match=r"the processor of .* cannot be read"):
        load(str(folder))


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(device):
    with pytest.raises(VlmPruneError, match=f"device '{device}' cannot be used.*expected cpu, cuda") as error:
        load("tiny", device=device)
    assert len(str(error.value)) < 200 and "fpga" not in str(
        error.value
    )  # torch lists all kinds that there are


def test_a_dtype_that_is_not_known_is_refused():
    with pytest.raises(SpecError, match="Did you mean 'float16'"):
        load("tiny", dtype="fp16")


def test_an_id_that_cannot_be_fetched_says_so():
    done = CliRunner().invoke(app, ["run", "--model", "nobody/nothing"])
    assert done.exit_code == 2
    assert "error: the config of 'nobody/nothing' cannot be read: " in done.stderr
    assert "check spelling and network" in done.stderr and "Traceback" not in done.stderr
