# SPDX-License-Identifier: Apache-2.0
"""Models inside wrappers, and with weights in another form: the same tokens, or a clear refusal."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import vlmprune
from vlmprune.errors import UnsupportedError
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model

INPUTS = tiny_inputs("llava", images=(1, 2))
SPECS = ("fastervlm@9", "fastv@9")


def kept(model: Any, spec: str, answers: bool = True) -> tuple[list[list[int]], Tensor]:
    """Tokens that stay of every picture, and what is answered."""
    with vlmprune.prune(model, spec) as run, torch.no_grad():
        said = generate(model, INPUTS, max_new_tokens=3) if answers else model(**INPUTS).logits[:, -1]
    return [one.keep_idx.tolist() for one in run.last.keep], said


@pytest.mark.parametrize("spec", SPECS)
def test_lora_equals_its_merged_model(spec: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj)"
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny_model("llava"), config)
    found = kept(wrapped, spec)
    merged = kept(copy.deepcopy(wrapped).merge_and_unload(), spec)
    assert found[0] == merged[0] and torch.equal(found[1], merged[1])
    assert not torch.equal(found[1], kept(tiny_model("llava"), spec)[1])


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs a process group of its own")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_the_module_inside_ddp_is_pruned_and_the_wrapper_refused(group: None) -> None:
    model = tiny_model("llava")
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(UnsupportedError, match=r"give the one inside, its \.module"):
        vlmprune.attach(wrapped, "fastervlm@9")
    want = kept(tiny_model("llava"), "fastervlm@9", answers=False)
    with vlmprune.prune(wrapped.module, "fastervlm@9") as run, torch.no_grad():
        logits = wrapped(**INPUTS).logits[:, -1]
    assert [one.keep_idx.tolist() for one in run.last.keep] == want[0] and torch.equal(logits, want[1])


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed")
def test_two_processes_that_share_the_weights_keep_what_one_keeps() -> None:
    """FSDP1, whole and by layers, and FSDP2."""
    program = Path(__file__).parents[1] / "support" / "sharded.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_decoder_in_int8_keeps_what_the_tower_chose() -> None:
    model = tiny_model("llava")
    want = kept(model, "fastervlm@9")
    quantised = torch.ao.quantization.quantize_dynamic(model.model.language_model, {nn.Linear}, torch.qint8)
    model.model.language_model = quantised
    assert kept(model, "fastervlm@9")[0] == want[0]


def in_int8_of_torchao(model: Any) -> Any:
    """All linear layers but the last with int8 weights; they keep their class and shape."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name,
    )
    return model


OF_TORCHAO = [*SPECS, "visionzip@9", "zooprune@9", "zooprune(rank=4)@9", "zooprune(estimator=zo)@9"]


@pytest.mark.parametrize("spec", OF_TORCHAO)
def test_int8_weights_of_torchao_are_read_as_the_numbers_that_they_stand_for(spec: str) -> None:
    """ZOO-Prune's exact form reads the weights of the projector."""
    model, plain = in_int8_of_torchao(tiny_model("llava")), tiny_model("llava")
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            plain.get_submodule(path).weight = nn.Parameter(module.weight.dequantize().detach())
    found, want = kept(model, spec), kept(plain, spec)
    assert found[0] == want[0] and torch.equal(found[1], want[1])


def test_weights_of_torchao_that_change_are_read_again() -> None:
    model = in_int8_of_torchao(tiny_model("llava"))
    before = kept(model, "zooprune@9")
    model.model.multi_modal_projector = in_int8_of_torchao(
        tiny_model("llava", seed=1)
    ).model.multi_modal_projector
    assert kept(model, "zooprune@9")[0] != before[0]


def in_bits(model: Any, bits: int) -> Any:
    """The same with layers of bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes").nn
    for path, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or "lm_head" in path:
            continue
        weight, shape = linear.weight.detach().clone(), (linear.in_features, linear.out_features)
        if bits == 8:
            made = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
            made.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.Linear4bit(*shape, quant_type="nf4", compute_dtype=torch.float32)
            made.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")
        made.bias = linear.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made.to("cpu"))
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_is_pruned_by_what_reads_no_weights(bits: int) -> None:
    model = in_bits(tiny_model("llava"), bits)
    for spec in SPECS:
        keep, _ = kept(model, spec)
        assert [len(one) for one in keep] == [9, 9, 9]
    kept(model, "visionzip@9")
    for spec in ("zooprune@9", "zooprune(rank=4)@9", "zooprune(estimator=zo)@9"):
        with pytest.raises(UnsupportedError, match=r"quantised and cannot be read .* keep the projector"):
            kept(model, spec)
