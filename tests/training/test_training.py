# SPDX-License-Identifier: Apache-2.0
"""Training: the soft top-k, a loop that goes on to the same weights, and what it refuses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vlmprune
from vlmprune.cli import app
from vlmprune.core.weights import read_weights
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.methods.visionselector import SHAPES
from vlmprune.testing.processors import tiny_processor
from vlmprune.testing.tiny import tiny_model
from vlmprune.training.data import NO_LOSS, batch_of, read_data
from vlmprune.training.loop import Pace, TrainingError, order_of, train
from vlmprune.training.run import frozen, run
from vlmprune.training.selector import SelectorTraining, causal_with, soft_top_k

SMALL = Pace(steps=4, batch_size=2, save_every=1)


# --- the soft choice ------------------------------------------------------------------------------


@pytest.mark.parametrize("heat", [1.0, 0.05])
def test_soft_weights_sum_up_to_the_budget_and_follow_the_scores(heat: float) -> None:
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 1e-3 + 5
    m = soft_top_k(scores, 7, heat)
    torch.testing.assert_close(m.sum(dim=1), torch.full((3,), 7.0), rtol=1e-4, atol=1e-4)
    # in the order of the scores, as far as float32 tells weights near 0 and 1 apart
    assert bool((m.gather(1, scores.argsort(dim=1)).diff(dim=1) >= 0).all())


def test_small_heat_is_a_hard_choice() -> None:
    scores = torch.arange(10.0)[None]
    assert (soft_top_k(scores, 3, 1e-3) > 0.99).tolist() == [[False] * 7 + [True] * 3]


def test_its_gradient_is_that_of_differences() -> None:
    scores = torch.randn(1, 9, dtype=torch.float64)
    weight = torch.randn(9, dtype=torch.float64)
    spread = scores.std()  # which the loop holds fixed

    def value(s):
        z = s - s.mean()
        low, high = torch.tensor(-99.0).double(), torch.tensor(99.0).double()
        for _ in range(80):
            middle = (low + high) / 2
            more = torch.sigmoid(z / spread - middle).sum() > 4
            low, high = (middle, high) if more else (low, middle)
        return (torch.sigmoid(z / spread - low) * weight).sum()

    given = scores.clone().requires_grad_()
    (soft_top_k(given, 4, 1.0, steps=80) * weight).sum().backward()
    step = 1e-5 * torch.eye(9, dtype=torch.float64)
    found = torch.stack([(value(scores + one) - value(scores - one)) / 2e-5 for one in step])
    torch.testing.assert_close(given.grad[0], found, rtol=1e-4, atol=1e-7)


def test_a_mask_without_bias_is_the_dense_model(loaded, questions) -> None:
    model, processor = loaded
    inputs, labels = batch_of(model, processor, questions.train[:3])
    with torch.no_grad():
        dense = model(**inputs).logits
        mask = causal_with(torch.zeros(inputs["input_ids"].shape), inputs["attention_mask"].bool())
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
        masked = model(**inputs).logits
        hook.remove()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(masked[real], dense[real], rtol=1e-3, atol=1e-3)
    for row, one in zip(labels, questions.train, strict=False):
        answer = row[row != NO_LOSS]
        assert processor.tokenizer.decode(answer[:-1]).replace(" ", "") == one.answer.replace(" ", "")
        assert int(answer[-1]) == processor.tokenizer.eos_token_id


# --- the loop -------------------------------------------------------------------------------------


def weights_after(loaded, questions, folder: Path, stops=(None,)) -> dict[str, torch.Tensor]:
    model, processor = loaded
    for stop in stops:
        training = SelectorTraining(model, processor, 16, 8, 0)
        train(training, questions.train, SMALL, folder, {}, stop_after=stop)
    return {name: value.detach().clone() for name, value in training.tensors().items()}


def test_an_interrupted_training_ends_with_the_same_weights(loaded, questions, tmp_path: Path) -> None:
    through = weights_after(loaded, questions, tmp_path / "a")
    stopped = weights_after(loaded, questions, tmp_path / "b", stops=(1, 3, None))
    assert all(torch.equal(stopped[name], value) for name, value in through.items())
    assert not any(path.suffix in (".pt", ".pkl", ".part") for path in tmp_path.rglob("*"))
    again = weights_after(loaded, questions, tmp_path / "a")  # nothing is left to do
    assert all(torch.equal(again[name], value) for name, value in through.items())


def test_a_backbone_that_accelerate_places_gives_the_same_weights(loaded, questions, tmp_path: Path) -> None:
    """As ``device_map`` does: every second layer is on disk, and loaded when it runs."""
    accelerate = pytest.importorskip("accelerate")
    plain = weights_after(loaded, questions, tmp_path / "plain")
    model, processor = vlmprune.load("tiny")
    places = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "language_model"}
    for name, part in model.model.language_model.named_children():
        layers = [f"layers.{i}" for i in range(len(part))] if name == "layers" else [name]
        for i, one in enumerate(layers):
            places[f"model.language_model.{one}"] = "disk" if name == "layers" and i % 2 else "cpu"
    placed = accelerate.dispatch_model(
        model, places | {"lm_head": "cpu"}, "cpu", offload_dir=str(tmp_path / "disk"), force_hooks=True
    )
    with frozen(placed):
        found = weights_after((placed, processor), questions, tmp_path / "placed")
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_a_training_with_other_settings_or_a_changed_checkpoint_is_not_gone_on_with(
    loaded, questions, tmp_path: Path
) -> None:
    model, processor = loaded
    training = SelectorTraining(model, processor, 16, 8, 0)
    train(training, questions.train, SMALL, tmp_path, {}, stop_after=1)
    with pytest.raises(SpecError, match="has other lr"):
        train(training, questions.train, replace(SMALL, lr=0.5), tmp_path, {})
    with pytest.raises(SpecError, match="has other data"):
        train(training, questions.train, SMALL, tmp_path, {"data": "x"})
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "sha256": "0"}))
    with pytest.raises(SpecError, match="changed checkpoint"):
        train(training, questions.train, SMALL, tmp_path, {})
    (tmp_path / "state.json").write_text(json.dumps(state))
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[:4] += 1  # of the same shapes, such as one that was trained on
    with pytest.raises(SpecError, match="has other model"):
        train(SelectorTraining(other, processor, 16, 8, 0), questions.train, SMALL, tmp_path, {})
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(SpecError, match="cannot be gone on with"):
        train(training, questions.train, SMALL, tmp_path, {})


def test_a_loss_that_is_no_number_ends_the_training_and_is_not_saved(
    loaded, questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = SelectorTraining(*loaded, 16, 8, 0)
    own = training.loss

    def loss(asked, progress):
        return own(asked, progress) * (torch.nan if progress else 1.0)

    monkeypatch.setattr(training, "loss", loss)
    with pytest.raises(TrainingError, match="the loss of step 1 is nan"):
        train(training, questions.train, SMALL, tmp_path, {})
    assert json.loads((tmp_path / "state.json").read_text())["done"] == 1


def test_memory_that_runs_out_says_what_to_lower(
    loaded, questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = SelectorTraining(*loaded, 16, 8, 0)

    def loss(asked, progress):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(training, "loss", loss)
    with pytest.raises(TrainingError, match="lower --batch-size"):
        train(training, questions.train, SMALL, tmp_path, {})


def test_every_pass_takes_every_question_once_in_an_order_of_its_own() -> None:
    first, second = (
        [i for step in range(epoch * 5, epoch * 5 + 5) for i in order_of(3, step, 2, 10)] for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert order_of(3, 4, 2, 10) != order_of(4, 4, 2, 10)


# --- the whole ------------------------------------------------------------------------------------


def test_the_command_trains_and_its_weights_are_used(tmp_path: Path) -> None:
    words = [
        "train",
        "visionselector",
        "--model",
        "tiny",
        "--data",
        "shapes",
        "--out",
        str(tmp_path),
        "--json",
    ]
    numbers = {"keep": 16, "steps": 2, "batch-size": 2, "samples": 4, "dev": 1, "width": 8}
    words += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert {"before", "after", "uniform", "divprune", "dense"} < facts["dev"].keys()
    assert facts["settings"]["keep"] == 16
    trained = read_weights(str(tmp_path), "visionselector", SHAPES)
    first = read_weights(str(tmp_path / "first"), "visionselector", SHAPES)
    assert trained.sizes == {"h": 8, "D": 128}
    assert not torch.equal(trained.tensors["q_proj.weight"], first.tensors["q_proj.weight"])
    model, processor = vlmprune.load("tiny")
    picture, question, _ = vlmprune.example()
    with vlmprune.prune(model, f"visionselector(weights={str(tmp_path)!r})@16") as handle, torch.no_grad():
        model.generate(**vlmprune.encode(model, processor, picture, question), max_new_tokens=2)
    assert handle.last.realised_tokens == [16]
    with pytest.raises(UnsupportedError, match="this model is"):
        vlmprune.prune(tiny_model(), f"visionselector(weights={str(tmp_path)!r})@9")


def test_the_model_can_be_trained_afterwards_and_methods_without_weights_are_refused(
    loaded, tmp_path: Path
) -> None:
    model, processor = loaded
    assert all(value.requires_grad for value in model.parameters())
    with pytest.raises(SpecError, match=r"cannot be trained; expected one of \['dyvte', 'rcp', 'textm"):
        run("fastervlm", model, processor, "shapes", tmp_path, keep=16)
    with pytest.raises(UnsupportedError, match="more than the 144 that stay"):
        run("visionselector", model, processor, "shapes", tmp_path, keep=144, samples=4, dev=1)
    assert all(value.requires_grad for value in model.parameters())


def test_families_whose_masks_are_made_by_types_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="masks by token types"):
        SelectorTraining(tiny_model("gemma3"), None, 9, None, 0)


def test_processors_that_give_more_than_pixels_and_text_are_refused(questions) -> None:
    with pytest.raises(UnsupportedError, match=r"gives image_grid_thw.* beside pixels and text"):
        batch_of(None, tiny_processor("qwen2_vl"), questions.train[:1])


def test_data_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    vlmprune.example()[0].save(tmp_path / "a.png")
    line = {"image": "a.png", "question": "Why?", "answer": "so"}
    path.write_text("".join(json.dumps({**line, "answer": f"so {i}"}) + "\n" for i in range(5)))
    data = read_data(str(path), 3, 2)
    assert [one.answer for one in data.train] == ["so 0", "so 1", "so 2"]
    assert [one.answer for one in data.dev] == ["so 3", "so 4"]
    assert data.train[0].picture().mode == "RGB"
    with pytest.raises(SpecError, match="has 5 questions"):
        read_data(str(path), 5, 1)
    for bad, message in (
        ({**line, "image": "b.png"}, "names the picture 'b.png', which is not there"),
        ({**line, "answer": ""}, "has an empty field"),
        ({"image": "a.png"}, "cannot be used"),
    ):
        path.write_text(json.dumps(bad) + "\n")
        with pytest.raises(SpecError, match=message):
            read_data(str(path), 1, 1)
    (tmp_path / "a.png").write_text("no picture")
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(SpecError, match=r"line 1 of .*a.png' cannot be read as a picture"):
        read_data(str(path), 1, 0).train[0].picture()
    with pytest.raises(SpecError, match="is a folder"):
        read_data(str(tmp_path), 1, 1)
    with pytest.raises(SpecError, match=r"not there.*shapes"):
        read_data("shape", 1, 1)


def test_lines_end_at_line_ends_alone_and_are_counted_as_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    vlmprune.example()[0].save(tmp_path / "a.png")
    asked = "What\u2028is\x85written here?"  # JSON may hold them as they are
    line = json.dumps({"image": "a.png", "question": asked, "answer": "so"}, ensure_ascii=False)
    path.write_text(f"{line}\n\n{line}\r\n", encoding="utf-8", newline="")
    assert [one.question for one in read_data(str(path), 1, 1).train] == [json.loads(line)["question"]]
    path.write_text(f"{line}\n\n\n{{}}\n", encoding="utf-8")
    with pytest.raises(SpecError, match="line 4 of"):
        read_data(str(path), 1, 1)


def test_pictures_are_opened_as_they_are_for_a_prompt(tmp_path: Path) -> None:
    deep = np.array([[0, 4000], [2000, 1000]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    turned = Image.new("RGB", (6, 2))
    turned.getexif()[0x0112] = 6  # on its side
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    lines = [
        {"image": name, "question": "Why?", "answer": "so"}
        for name in ("deep.png", "turned.jpg", "clear.png")
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    grey, upright, clear = (one.picture() for one in read_data(str(path), 3, 0).train)
    assert grey.getextrema() == ((0, 255),) * 3
    assert upright.size == (2, 6)
    assert clear.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": 0.0}, {"seed": -1}, {"batch_size": 0}, {"weight_decay": -1.0}]
)
def test_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        Pace(**wrong)
