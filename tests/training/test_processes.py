# SPDX-License-Identifier: Apache-2.0
"""accelerate under the loop: one process is plain torch, parts and processes share a step, half precision."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from vlmprune.core.weights import read_weights
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.methods.visionselector import SHAPES
from vlmprune.training import processes
from vlmprune.training.data import Exercise
from vlmprune.training.exits import ExitTraining
from vlmprune.training.loop import Pace, TrainingError, order_of, train
from vlmprune.training.processes import accelerated, device_of
from vlmprune.training.rcp import RCPTraining
from vlmprune.training.resampler import ResamplerTraining
from vlmprune.training.run import from_first
from vlmprune.training.selector import SelectorTraining

CPU = torch.device("cpu")
FEW = Pace(steps=3, batch_size=4, save_every=1)


class Line:
    """A training whose loss is the mean of a number for each question."""

    method, budgeted, settings = "line", True, {"keep": 1}
    model_digest = "0"

    def __init__(self) -> None:
        self.module = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.tensor([3.0, -1.0]))})

    def loss(self, asked: list[Exercise], progress: float) -> torch.Tensor:
        wanted = torch.tensor([float(len(one.question) % 7) for one in asked])
        x = self.module["w"]
        return ((x[0] - wanted) ** 2 + (x[1] * wanted) ** 2).mean()


@pytest.fixture
def own_state() -> Iterator[None]:
    """accelerate has one state for a process, whose precision cannot be changed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(folder: Path, questions: Any, pace: Pace) -> torch.Tensor:
    training = Line()
    train(training, questions.train, pace, folder, {})
    return training.module["w"].detach()


def test_one_process_makes_the_steps_of_plain_torch(loaded, questions, tmp_path: Path) -> None:
    pace = replace(FEW, batch_size=2)
    by_hand, looped = (SelectorTraining(*loaded, 16, 8, 0) for _ in range(2))
    weights = [*by_hand.module.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=pace.lr, weight_decay=pace.weight_decay)
    for step in range(pace.steps):
        optimiser.param_groups[0]["lr"] = pace.lr_at(step)
        torch.manual_seed(step)
        asked = [questions.train[i] for i in order_of(0, step, 2, 4)]
        optimiser.zero_grad()
        by_hand.loss(asked, step / (pace.steps - 1)).backward()
        torch.nn.utils.clip_grad_norm_(weights, pace.clip)
        optimiser.step()
    train(looped, questions.train, pace, tmp_path, {})
    assert all(torch.equal(looped.tensors()[name], value) for name, value in by_hand.tensors().items())


def test_parts_of_a_step_have_the_gradient_of_the_step(questions, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", questions, FEW)
    parts = trained(tmp_path / "parts", questions, replace(FEW, parts=2))
    torch.testing.assert_close(parts, whole)
    first = trained(tmp_path / "first", questions, replace(FEW, batch_size=2))  # half of each step
    assert not torch.allclose(first, whole)
    with pytest.raises(SpecError, match="has other parts"):
        trained(tmp_path / "whole", questions, replace(FEW, parts=4))


def test_questions_of_a_step_fall_into_parts_and_processes() -> None:
    pace = replace(FEW, batch_size=12, parts=2)
    assert [pace.share(process, 3) for process in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(SpecError, match=r"batch_size=12; expected a multiple of 8, of 2 parts in each of 4"):
        pace.share(0, 4)
    with pytest.raises(SpecError, match="expected a multiple of 3"):
        replace(FEW, parts=3)


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(SelectorTraining, id="visionselector"),
        *(
            pytest.param(one, id=one.method, marks=pytest.mark.slow)
            for one in (RCPTraining, ResamplerTraining, ExitTraining)
        ),
    ],
)
def test_half_precision_trains_float32_weights(made, loaded, questions, tmp_path: Path, own_state) -> None:
    training = made(*loaded, None if made is ExitTraining else 16, 8, 0)
    before = {name: value.detach().clone() for name, value in training.tensors().items()}
    training.prepare([*questions.train, *questions.dev], tmp_path, 2)
    products: list[torch.dtype] = []
    inner = training.language_model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: products.append(output.dtype)
    )
    pace = Pace(steps=2, batch_size=2, precision="bf16")
    losses = train(training, questions.train, pace, tmp_path / "state", {})
    inner.remove()
    # gates learn from what was looked at before
    assert made is ExitTraining or {*products} == {torch.bfloat16}
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert all(value.dtype == torch.float32 for value in training.tensors().values())
    assert any(not torch.equal(before[name], value) for name, value in training.tensors().items())


def test_precision_that_cannot_be_had_is_refused(own_state, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="'fp16' scales its gradients"):
        Pace(precision="fp16")
    with pytest.raises(SpecError, match="precision"):
        Pace(precision="half")
    accelerated(CPU)
    with pytest.raises(TrainingError, match=r"set up otherwise .* precision 'bf16' on 'cpu' in a process"):
        accelerated(CPU, "bf16")
    monkeypatch.setattr(processes, "_KINDS", ("MULTI_GPU",))
    with pytest.raises(UnsupportedError, match="processes of the kind NO were launched"):
        accelerated(CPU)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UnsupportedError, match="pip install accelerate"):
        accelerated(CPU)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device_of("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [device_of(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_what_one_process_says_is_said() -> None:
    assert from_first(accelerated(CPU), [{"a": 1}]) == {"a": 1}


@pytest.mark.slow
def test_two_processes_make_the_steps_of_two_parts(tmp_path: Path) -> None:
    script = str(Path(sys.executable).with_name("vlmprune"))
    words = [script, "train", "visionselector", "--model", "tiny", "--data", "shapes", "--json"]
    numbers = {"keep": 16, "steps": 3, "batch-size": 4, "samples": 6, "dev": 2, "width": 8, "patience": 2}
    words += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--no-python"]
    for name, call in (("one", [*words, "--parts", "2"]), ("two", [*launch, *words])):
        out = ["--out", str(tmp_path / name)]
        for _ in range(2):  # the second call finds a finished training
            done = subprocess.run([*call, *out], capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count('"dev"') == 1, "the first process alone prints"
    one, two = (read_weights(str(tmp_path / name), "visionselector", SHAPES) for name in ("one", "two"))
    for name, value in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], value)
    assert one.facts["settings"]["processes"] == 1 and two.facts["settings"]["processes"] == 2
    assert {path.name for path in (tmp_path / "two" / "training").iterdir()} == {
        "state.json",
        "step-3.safetensors",
    }
