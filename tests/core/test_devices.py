# SPDX-License-Identifier: Apache-2.0
"""Weights that are elsewhere: accelerate's offloading hooks, and a language model spread over two
processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vlmprune
from vlmprune.errors import UnsupportedError
from vlmprune.testing.conformance import TINY_OPTIONS, generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model

accelerate = pytest.importorskip("accelerate")
SPECS = ("fastervlm(cls=mean)@9", "visionzip(cls=mean)@9", "fastv@9", TINY_OPTIONS["var"])
TEXT = ("embed_tokens", "norm", "rotary_emb")
PARTS = ("vision_tower", "multi_modal_projector", *(f"language_model.{part}" for part in TEXT))


def offloaded(model: Any, how: str, folder: Path) -> Any:
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    places = {f"model.{part}": "cpu" for part in PARTS} | {"lm_head": "cpu"}
    places |= {f"model.language_model.layers.{i}": "cpu" if i % 2 else "disk" for i in range(4)}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_weights_change_nothing(how: str, tmp_path: Path) -> None:
    inputs, whole = tiny_inputs(images=(1, 0)), tiny_model()
    model = offloaded(tiny_model(), how, tmp_path)
    dense = generate(model, inputs)
    hooked = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    for spec in SPECS:
        with vlmprune.prune(whole, spec):
            want = generate(whole, inputs)
        with vlmprune.prune(model, spec):
            assert torch.equal(generate(model, inputs), want), spec
    assert torch.equal(generate(model, inputs), dense)
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == hooked


def test_a_closed_form_over_offloaded_weights_names_what_works(tmp_path: Path) -> None:
    inputs, model = tiny_inputs(), offloaded(tiny_model(), "disk_offload", tmp_path)
    with (
        pytest.raises(UnsupportedError, match="estimator='zo'"),
        vlmprune.prune(model, "zooprune@9"),
        torch.no_grad(),
    ):
        model(**inputs)


def test_tensor_parallel_is_refused_where_heads_are_read() -> None:
    model = tiny_model()
    model._tp_size = 2
    for spec in ("fastv@9", TINY_OPTIONS["var"], f"{TINY_OPTIONS['var']}+fastervlm@9"):
        with pytest.raises(UnsupportedError, match=r"over 2 processes.*'fastervlm@64'"):
            vlmprune.attach(model, spec)
    with vlmprune.prune(model, "fastervlm@9") as run:
        generate(model, tiny_inputs())
    assert run.last.realised_tokens == [9]


WORKER = """
import os, sys, torch, vlmprune
from transformers import AutoModelForImageTextToText
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model
torch.set_num_threads(1)
folder, port, rank = sys.argv[1:]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
torch.distributed.init_process_group("gloo")
model = AutoModelForImageTextToText.from_pretrained(folder, tp_plan="auto").eval()
assert model._tp_size == 2
inputs = tiny_inputs(images=(1, 2))
with vlmprune.prune(model, "fastervlm@9") as run:
    ids = generate(model, inputs).tolist()
print(rank, ids, [one.keep_idx.tolist() for one in run.last.keep], flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_keep_the_same_tokens_and_answer_as_one(tmp_path: Path) -> None:
    model, inputs = tiny_model(), tiny_inputs(images=(1, 2))
    model.save_pretrained(tmp_path)
    with vlmprune.prune(model, "fastervlm@9") as run:
        ids = generate(model, inputs).tolist()
    want = f"{ids} {[one.keep_idx.tolist() for one in run.last.keep]}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", WORKER, str(tmp_path), port]
    workers = [subprocess.Popen([*command, rank], stdout=subprocess.PIPE, text=True) for rank in ("0", "1")]
    assert [worker.communicate(timeout=300)[0].strip() for worker in workers] == [f"0 {want}", f"1 {want}"]


def test_weights_may_be_placed_while_attached(tmp_path: Path) -> None:
    """accelerate wraps forward around what the session put there; leaving takes the session's part out of the
    middle.
    """
    inputs, model = tiny_inputs(images=(1, 0)), tiny_model()
    dense = generate(model, inputs)
    with vlmprune.prune(model, "fastervlm@9") as run:
        want = generate(model, inputs)
        offloaded(model, "cpu_offload", tmp_path)
        assert torch.equal(generate(model, inputs), want)
    assert torch.equal(generate(model, inputs), dense)
    with vlmprune.prune(model, "random@9"):
        generate(model, inputs)
    assert torch.equal(generate(model, inputs), dense) and run.last is not None
    accelerate.hooks.remove_hook_from_submodules(model)
    assert "forward" not in model.model.__dict__ and torch.equal(generate(model, inputs), dense)
