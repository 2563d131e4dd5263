# SPDX-License-Identifier: Apache-2.0
"""Our task files on documents in the columns of the real data sets, and what is said without data."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install -e '.[eval]' in a clone")

from datasets import Dataset, Features, List, Value
from datasets import Image as Picture
from sweep_tools import journals, sweep

import vlmprune.evaluation.tasks.lmms.loading as loading
import vlmprune.evaluation.tasks.lmms.overlays as overlays
from vlmprune.errors import EvaluationError, UnsupportedError
from vlmprune.evaluation.answer.batch import model_inputs
from vlmprune.evaluation.tasks.lmms.cell import run_cell
from vlmprune.evaluation.tasks.lmms.conversation import picture
from vlmprune.evaluation.tasks.registry import get_task
from vlmprune.testing.tiny import tiny_bundle

TEXT = Value("string")
IMAGE = Image.new("RGB", (20, 10), (200, 0, 0))


def overlay(name, tmp_path, features, rows):
    """Our task file, with its data set replaced by rows of ours."""
    Dataset.from_list(rows, features=Features(features)).to_parquet(tmp_path / "rows.parquet")
    text = (loading.folder() / f"{name}.yaml").read_text()
    text = re.sub("^dataset_name:.*\n", "", text, flags=re.MULTILINE)
    split = re.search("^test_split: (.*)$", text, flags=re.MULTILINE)[1]
    text = re.sub("^dataset_path:.*$", "dataset_path: parquet", text, flags=re.MULTILINE)
    (tmp_path / f"{name}.yaml").write_text(
        text + f"dataset_kwargs: {{data_files: {{{split}: rows.parquet}}}}\n"
    )
    return get_task(f"lmms:{tmp_path / name}.yaml")


def test_textvqa_shows_the_ocr_tokens(tmp_path):
    features = {"question_id": Value("int64"), "question": TEXT, "answer": TEXT, "image": Picture()}
    features |= {"ocr_tokens": List(TEXT), "answers": List(TEXT)}
    answers = ["Nokia"] * 4 + ["nokia phone"] * 6
    row = {
        "question_id": 1,
        "question": "what brand?",
        "ocr_tokens": ["NOKIA", "3310"],
        "answers": answers,
        "image": IMAGE,
    }
    task = overlay("textvqa_val_ocr", tmp_path, features, [row | {"answer": "nokia phone"}] * 2)
    first, second = task.samples()
    assert "Reference OCR token: NOKIA, 3310" in first.question
    assert first.cluster == second.cluster and first.group == "text"
    # ten people answered: an answer counts in full where three others gave it
    assert task.score(first, "Nokia") == pytest.approx(1.0)
    assert task.score(first, "nokia phone.") == 1.0 and task.score(first, "samsung") == 0.0
    assert task.blind == {"textvqa_val_ocr": 1.0}
    assert task.max_new_tokens == 16


def mmbench_rows():
    base = {
        "question": "which?",
        "hint": "nan",
        "source": "s",
        "split": "dev",
        "L2-category": "l2",
        "image": IMAGE,
    }
    options = [("red", "green", "blue", "grey"), ("green", "blue", "grey", "red")]
    rows = []
    for index, category in ((1, "colour"), (2, "colour"), (3, "place")):
        for turn, words in enumerate(options):
            row = {
                "index": index + turn * 1_000_000,
                "category": category,
                "answer": "ABCD"[words.index("red")],
            }
            rows.append(base | row | dict(zip("ABCD", words, strict=True)))
    return rows


@pytest.mark.parametrize("language", ["en", "cn"])
def test_mmbench_is_scored_here_as_the_static_evaluator_does(language, tmp_path):
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    columns = ("question", "hint", "source", "split", "category", "L2-category", "answer", *"ABCD")
    features = dict.fromkeys(columns, TEXT) | {"index": Value("int64"), "image": Picture()}
    task = overlay(f"mmbench_{language}_dev_offline", tmp_path, features, mmbench_rows())
    samples = task.samples()
    assert task.families == ("colour", "place")
    assert "A. red" in samples[0].question
    answers = ["A", "D", "A.", "B", "red", "I cannot say"]
    assert [task.score(sample, answer) for sample, answer in zip(samples, answers, strict=True)] == [
        1,
        1,
        1,
        0,
        1,
        0,
    ]
    assert task.official(samples, answers) == pytest.approx({"accuracy": 4 / 6, "circular": 1 / 3})
    draw = random.Random(0)
    for _ in range(5):
        answers = [draw.choice(["A", "B", "D", "(D)", "red", "it is grey", ""]) for _ in samples]
        rows = [
            task._results(sample.number, answer)["circular"]
            for sample, answer in zip(samples, answers, strict=True)
        ]
        assert overlays.mmbench_circular(rows) == pytest.approx(
            mmbench_evaluator.eval_result(rows, eval_method="static")[0]
        )


def test_pope_counts_the_answers(tmp_path):
    columns = ("id", "question_id", "question", "answer", "image_source", "category")
    features = dict.fromkeys(columns, TEXT) | {"image": Picture()}
    base = {"id": "1", "image_source": "x", "image": IMAGE, "question": "Is there a dog?"}
    asked = [("yes", "popular"), ("no", "popular"), ("yes", "random"), ("no", "random")]
    rows = [
        base | {"question_id": str(i), "answer": answer, "category": kind}
        for i, (answer, kind) in enumerate(asked)
    ]
    task = overlay("pope_yes", tmp_path, features, rows)
    answers = ["yes", "Yes", "yes", "no"]
    samples = task.samples()
    assert task.official(samples, answers) == pytest.approx({"accuracy": 0.75, "f1": 0.8, "yes_ratio": 0.75})
    assert [task.score(sample, answer) for sample, answer in zip(samples, answers, strict=True)] == [
        1,
        0,
        1,
        1,
    ]
    assert task.families == ("popular", "random") and dict(task.blind) == {"popular": 0.5, "random": 0.5}


def test_seedbench_keeps_the_image_questions(tmp_path):
    choices = [f"choice_{letter}" for letter in "abcd"]
    features = dict.fromkeys(("question", "answer", "data_type", "question_id", *choices), TEXT) | {
        "image": List(Picture())
    }
    base = dict.fromkeys(choices, "it") | {
        "question": "what?",
        "answer": "C",
        "question_id": "1",
        "image": [IMAGE],
    }
    task = overlay(
        "seedbench_image",
        tmp_path,
        features,
        [base | {"data_type": kind} for kind in ("video", "image", "image")],
    )
    samples = task.samples()
    assert len(samples) == 2
    assert [task.score(samples[0], answer) for answer in ("C", "c. it", "B")] == [1, 1, 0]


def test_vizwiz_and_gqa_look_up_what_they_need(tmp_path, monkeypatch):
    features = {
        "question_id": TEXT,
        "question": TEXT,
        "answer": TEXT,
        "answers": List(TEXT),
        "image": Picture(),
    }
    row = {"question_id": "1", "question": "what?", "answer": "cup", "answers": ["cup"] * 10, "image": IMAGE}
    task = overlay("vizwiz_vqa_val_short", tmp_path, features, [row])
    assert task.score(task.samples()[0], "A cup.") == 1.0
    pictures = Dataset.from_list([{"image": IMAGE}], features=Features({"image": Picture()}))
    monkeypatch.setattr(overlays, "_gqa_pictures", lambda: (pictures, {"n7": 0}))
    features = {"id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT}
    task = overlay(
        "gqa_images",
        tmp_path,
        features,
        [{"id": "1", "imageId": "n7", "question": "Is it?", "answer": "yes"}],
    )
    (sample,) = task.samples()
    assert (sample.load_images()[0].size, task.score(sample, "Yes."), task.score(sample, "no")) == (
        IMAGE.size,
        1.0,
        0.0,
    )


# --- what is missing ------------------------------------------------------------------------------


def test_a_data_set_that_is_not_here_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(EvaluationError, match=r"datasets\.load_dataset\('lmms-lab-encoder/MMBench', 'en'\)"):
        get_task("lmms:mmbench_en_dev_offline")
    with pytest.raises(EvaluationError, match="vlmprune lmms-tasks FOLDER"):
        get_task("lmms:shapes")
    with pytest.raises(EvaluationError, match="does not exist"):
        get_task(f"lmms:{tmp_path / 'none.yaml'}")


def test_unknown_names_groups_and_likelihoods_are_refused(monkeypatch, tmp_path):
    from lmms_eval.tasks import TaskManager

    (tmp_path / "a.yaml").write_text("group: several\ntask: [one, two]\n")
    (tmp_path / "b.yaml").write_text("task: one\noutput_type: multiple_choice\n")
    monkeypatch.setattr(
        loading, "_manager", lambda: TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    )
    with pytest.raises(EvaluationError, match="Did you mean 'textvqa_val_ocr'"):
        get_task("lmms:textvqa_val_orc")
    with pytest.raises(UnsupportedError, match="several tasks"):
        get_task("lmms:several")
    with pytest.raises(UnsupportedError, match="multiple_choice"):
        get_task("lmms:one")


@pytest.mark.slow
def test_a_task_of_lmms_eval_itself_is_found(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(EvaluationError, match=r"datasets\.load_dataset\('lmms-lab-encoder/POPE'\)"):
        get_task("lmms:pope")


# --- clips ----------------------------------------------------------------------------------------

CLIPS = """
task: clips
dataset_path: json
dataset_kwargs: {data_files: {test: clips.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function clips_utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 5, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: "1"}
"""
CLIPS_UTILS = """
from PIL import Image

def visual(doc):
    return [path if path.endswith("mp4") else Image.open(path).convert("RGB") for path in doc["shown"]]
"""


class FramesInNumpy:
    """Stands for the video processor of transformers, which needs torchvision."""

    def __call__(self, videos, **options):
        import torch

        side = (84, 84)
        clips = [
            np.stack([np.asarray(Image.fromarray(frame).resize(side)) for frame in clip]) for clip in videos
        ]
        pixels = (
            torch.tensor(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        )  # (clips, T, 3, H, W)
        return {"pixel_values_videos": pixels}


@pytest.fixture
def clips(tmp_path):
    av = pytest.importorskip("av", reason="needs av, which lmms-eval reads clips with")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=5)
            stream.width = stream.height = 96
            stream.pix_fmt = "yuv420p"
            for _ in range(8):
                frame = av.VideoFrame.from_ndarray(
                    random.integers(0, 256, (96, 96, 3), dtype=np.uint8), format="rgb24"
                )
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    IMAGE.save(tmp_path / "still.png")
    shown = [["a.mp4"], ["still.png"], ["b.mp4"]]
    rows = [
        {"question": "what happens?", "answer": "x", "shown": [str(tmp_path / name) for name in names]}
        for names in shown
    ]
    Dataset.from_list(rows).to_json(tmp_path / "clips.jsonl")
    (tmp_path / "clips.yaml").write_text(CLIPS)
    (tmp_path / "clips_utils.py").write_text(CLIPS_UTILS)
    return get_task(f"lmms:{tmp_path / 'clips.yaml'}")


def test_clips_are_read_pruned_and_counted(clips):
    """Rows with clips and rows with pictures, alone and together."""
    model, processor = tiny_bundle("llava_onevision")
    processor.video_processor = FramesInNumpy()
    spec = "fastervlm(cls='mean')@3/crop"
    single, batch = (
        run_cell(model, processor, spec, clips, batch_size=size, max_frames=3).records for size in (1, 3)
    )
    same = [[(r.answer, r.dense_tokens, r.realised_tokens) for r in rows] for rows in (single, batch)]
    assert same[0] == same[1]
    assert [r.dense_tokens for r in batch][::2] == [27, 27]  # 3 frames of 3 x 3 tokens
    assert [r.realised_tokens for r in batch][::2] == [9, 9]
    assert len({r.cluster for r in batch}) == 3 and all(r.firings > 0 for r in batch)
    with pytest.raises(UnsupportedError, match="run_cell"):
        clips.samples()[0].load_images()


def test_a_sweep_gives_clips_to_lmms_eval(clips, tmp_path, monkeypatch):
    model, processor = tiny_bundle("llava_onevision")
    model.save_pretrained(tmp_path / "model")
    processor.video_processor = FramesInNumpy()
    monkeypatch.setattr("vlmprune.evaluation.leaderboard.work.load_model", lambda *name: (model, processor))
    assert clips.video
    task, spec = f"lmms:{tmp_path / 'clips.yaml'}", "uniform@9"
    results = sweep(
        tmp_path / "model",
        tmp_path / "out",
        specs=[spec],
        tasks=[task],
        limit=3,
        batch_size=2,
        max_new_tokens=5,
    )
    assert results["failed"] == []
    (row,) = [row for row in results["rows"] if row["spec"] == spec]
    direct = run_cell(model, processor, spec, clips, batch_size=2, max_new_tokens=5).records
    assert {name: line["answer"] for name, line in journals(tmp_path / "out")[spec].items()} == {
        r.id: r.answer for r in direct
    }
    assert row["n"] == 3 and row["realised_tokens"] == 9


def test_a_clip_for_a_model_without_video_is_refused(clips):
    model, processor = tiny_bundle("llava")
    with pytest.raises(UnsupportedError, match="takes images only"):
        run_cell(model, processor, "uniform@9", clips)


def test_pictures_are_padded_where_asked(clips):
    model, processor = tiny_bundle("llava")
    padded, plain = (
        run_cell(model, processor, "dense", clips, offset=1, limit=1, image_pad=pad).records[0].answer
        for pad in (True, False)
    )
    text = processor.apply_chat_template(clips.conversation(1).messages, add_generation_prompt=True)
    inputs = model_inputs(processor, model, [text], [[picture(IMAGE, processor.image_processor.image_mean)]])
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert (
        padded
        == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        != plain
    )
