# SPDX-License-Identifier: Apache-2.0
"""The plug-in in an unmodified lmms-eval, on tiny models and data made here; skipped without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install -e '.[eval]' in a clone")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from vlmprune.cli import app
from vlmprune.errors import EvaluationError, SpecError, UnsupportedError
from vlmprune.evaluation.answer.evaluate import evaluate
from vlmprune.evaluation.leaderboard.journal import locked
from vlmprune.evaluation.tasks.lmms.arguments import Arguments
from vlmprune.evaluation.tasks.lmms.cell import records, run_cell
from vlmprune.evaluation.tasks.lmms.loading import folder as task_files
from vlmprune.evaluation.tasks.lmms.loading import write_tasks
from vlmprune.evaluation.tasks.lmms.model import VlmPrune, VlmPruneSimple
from vlmprune.evaluation.tasks.lmms.task import LmmsTask
from vlmprune.evaluation.tasks.registry import get_task
from vlmprune.testing.checks_model import snapshot
from vlmprune.testing.tiny import tiny_bundle

MIXED = """
task: mixed
dataset_path: parquet
dataset_kwargs: {data_files: {test: mixed.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function mixed_utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: "1"}
"""
MIXED_UTILS = """
def visual(doc):
    return [doc[name] for name in ("image_0", "image_1") if doc[name] is not None]
"""
SIZES = [
    (84, 84),
    (190, 100),
    None,
    (100, 190),
    ((84, 120), (60, 60)),
    (168, 160),
]  # a simple task; texts and pairs among them


def noise(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with our tasks and a task of the simple kind."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    folder = tmp_path_factory.mktemp("tasks")
    assert "shapes" in write_tasks(folder, limit=20)
    rows = []
    for number, sizes in enumerate(SIZES):
        sizes = [sizes] if sizes is None or isinstance(sizes[0], int) else sizes
        pictures = [size and noise(10 * number + k, size) for k, size in enumerate(sizes)]
        row = {
            "question": "what is it?" + " tell me." * (number % 3),
            "answer": "x",
            "image_0": None,
            "image_1": None,
        }
        rows.append(row | {f"image_{k}": image for k, image in enumerate(pictures)})
    features = Features(
        {"question": Value("string"), "answer": Value("string"), "image_0": Picture(), "image_1": Picture()}
    )
    Dataset.from_list(rows, features=features).to_parquet(folder / "mixed.parquet")
    (folder / "mixed.yaml").write_text(MIXED)
    (folder / "mixed_utils.py").write_text(MIXED_UTILS)
    return folder


@pytest.fixture(scope="module")
def shapes(tasks):
    return get_task(f"lmms:{tasks / 'shapes.yaml'}")


@pytest.fixture(scope="module")
def mixed(tasks):
    return get_task(f"lmms:{tasks / 'mixed.yaml'}")


def said(records):
    """All of a record that must not depend on how it was computed, by sample."""
    return {
        r.id: (r.answer, r.score, r.dense_tokens, r.realised_tokens, r.layer_tokens, r.family, r.group)
        for r in records
    }


# --- gates ----------------------------------------------------------------------------------------


def test_tasks_are_not_written_over_themselves():
    with pytest.raises(SpecError, match=r"is the file .* itself"):
        write_tasks(task_files(), limit=1)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_dense_is_the_built_in_wrapper_answer_for_answer(family, shapes, tmp_path, monkeypatch):
    if find_spec("decord") is None:  # the wrapper imports it for video, which it does not read here
        monkeypatch.setitem(sys.modules, "decord", types.SimpleNamespace(VideoReader=None, cpu=None))
    model, processor = tiny_bundle(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    built_in = get_model("llava_hf").create_from_arg_string(
        f"pretrained={tmp_path},device_map=cpu", {"device": "cpu"}
    )
    manager = TaskManager("ERROR", include_defaults=False)
    found = simple_evaluate(
        model=built_in, tasks=[shapes.lmms], task_manager=manager, bootstrap_iters=0, limit=10
    )
    answers = [row["resps"][0][0] for row in found["samples"]["shapes"]]
    ours = run_cell(model, processor, "dense", shapes, limit=10).records
    assert [record.answer for record in ours] == [answer.strip() for answer in answers]
    assert len(set(answers)) > 5  # the answers depend on what is asked


@pytest.mark.parametrize("spec", ["fastervlm@1.0", "fastv(layer=2)@1.0"])
def test_keep_all_is_dense(spec, mixed):
    model, processor = tiny_bundle("llava_next")
    assert said(run_cell(model, processor, spec, mixed).records) == said(
        run_cell(model, processor, "dense", mixed).records
    )


@pytest.mark.parametrize("spec", ["dense", "fastervlm@9", "fastv(layer=2)@9"])
def test_batches_give_what_single_rows_give(spec, mixed):
    model, processor = tiny_bundle("llava_next")
    single, batch = (run_cell(model, processor, spec, mixed, batch_size=size).records for size in (1, 4))
    assert said(single) == said(batch)
    assert [r.batch for r in batch] == [4, 4, 4, 4, 2, 2]


def test_simple_and_chat_ask_the_same(mixed):
    """Simple requests show pictures first and then the text, as lmms-eval does in a chat."""
    from lmms_eval.api.task import ConfigurableTask

    model, processor = tiny_bundle("llava")
    task = ConfigurableTask(
        config=dict(
            mixed.lmms.config.to_dict()
            | {
                name: getattr(mixed.lmms.config, name)
                for name in ("doc_to_visual", "metric_list", "dataset_kwargs")
            }
        )
    )
    lm = VlmPruneSimple(model, processor, Arguments(prune="fastervlm@9", batch_size=2))
    found = simple_evaluate(
        model=lm, tasks=[task], task_manager=TaskManager("ERROR", include_defaults=False), bootstrap_iters=0
    )
    answers = [row["resps"][0][0].strip() for row in found["samples"]["mixed"]]
    assert answers == [record.answer for record in run_cell(model, processor, "fastervlm@9", mixed).records]


def test_a_failing_generation_ends_the_run(mixed, monkeypatch):
    model, processor = tiny_bundle("llava")
    run_cell(
        model, processor, "dense", mixed, limit=1
    )  # transformers notes things on the model in its first call

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(model.model.language_model.layers[2], "forward", fail)
    before = snapshot(model)
    with pytest.raises(EvaluationError, match="generation failed on mixed 0: RuntimeError: out of luck"):
        run_cell(model, processor, "fastervlm@9", mixed)
    assert snapshot(model) == before


def test_every_row_counts_what_pruning_did(mixed):
    model, processor = tiny_bundle("llava")
    rows = run_cell(model, processor, "fastervlm@9", mixed, batch_size=3).records
    pictures = [1, 1, 0, 1, 2, 1]
    assert [r.dense_tokens for r in rows] == [36 * n for n in pictures]
    assert [r.realised_tokens for r in rows] == [9 * n for n in pictures]
    assert [r.layer_tokens for r in rows] == [9.0 * n for n in pictures]
    assert [r.firings > 0 for r in rows] == [n > 0 for n in pictures]
    assert [r.encoding for r in rows] == ["each" if n else "none" for n in pictures]
    assert all(0 < r.seconds["first_token"] <= r.seconds["total"] for r in rows)
    assert {r.peak_memory for r in rows} == {None}  # the CPU
    assert len({r.cluster for r in rows}) == 6 and all(r.answer for r in rows)


def test_hooks_that_see_nothing_end_the_run(mixed, monkeypatch):
    from vlmprune.hooks.session import Session

    model, processor = tiny_bundle("llava")
    monkeypatch.setattr(Session, "_before_lm", lambda self, module, args, kwargs: None)
    with pytest.raises(EvaluationError, match="generation failed on mixed 0"):
        run_cell(model, processor, "fastervlm@9", mixed)


def test_what_does_not_generate_is_refused():
    model, processor = tiny_bundle("llava")
    request = types.SimpleNamespace(task_name="seedbench_ppl")
    with pytest.raises(UnsupportedError, match="seedbench_ppl"):
        VlmPrune(model, processor, Arguments()).loglikelihood([request])
    processor.chat_template = None
    with pytest.raises(UnsupportedError, match="chat_template=FILE"):
        VlmPrune(model, processor, Arguments())


def test_settings_of_a_task_become_those_of_generate():
    model, processor = tiny_bundle("llava")
    lm = VlmPrune(model, processor, Arguments(max_new_tokens=16))
    assert lm._options(
        {"until": ["x"], "image_aspect_ratio": "original", "top_p": 1.0, "do_sample": False}
    ) == {
        "max_new_tokens": 16,
        "num_beams": 1,
        "do_sample": False,
    }
    assert lm._options({"max_new_tokens": 8, "temperature": 0.5, "top_p": 0.9, "num_beams": 2}) == {
        "max_new_tokens": 8,
        "num_beams": 2,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    ids = torch.tensor([3, 5, 0, 5])
    assert lm._length(ids) == 4  # the tiny model knows no end
    model.generation_config.eos_token_id = [7, 5]
    assert (lm._length(ids), lm._length(ids[:1])) == (2, 1)


# --- one benchmark, three ways --------------------------------------------------------------------


def test_lmms_eval_and_evaluate_agree_on_every_sample(shapes):
    """The benchmark through lmms-eval, its documents through evaluate, and the benchmark itself."""
    model, processor = tiny_bundle("llava")
    ours, spec, limit = get_task("shapes"), "divprune@9", 20
    cell = run_cell(model, processor, spec, shapes, batch_size=4)
    samples = shapes.samples(limit=limit)
    theirs = list(
        evaluate(
            model, processor, samples, [spec], shapes, max_new_tokens=shapes.max_new_tokens, batch_size=5
        )
    )
    own = said(
        evaluate(model, processor, ours.samples(limit=limit), [spec], ours, max_new_tokens=16, batch_size=5)
    )
    assert said(cell.records) == said(theirs)
    assert list(said(cell.records).values()) == [own[sample.id] for sample in ours.samples(limit=limit)]
    answers = {record.id: record.answer for record in theirs}
    assert shapes.official(samples, [answers[sample.id] for sample in samples]) == pytest.approx(cell.metrics)
    assert cell.metrics["accuracy"] == pytest.approx(np.mean([record.score for record in theirs]))


def test_right_answers_score_one(shapes):
    for sample in shapes.samples():
        assert shapes.score(sample, sample.answers[0]) == 1.0 and shapes.score(sample, "none of them") == 0.0
    assert set(shapes.families) == set(get_task("shapes").families) == set(shapes.blind)
    assert shapes.groups == dict(get_task("shapes").groups)
    assert shapes.fingerprint == shapes.fingerprint and len(shapes.fingerprint) == 16


def test_pictures_that_are_equal_make_a_cluster(mixed, shapes):
    own = get_task("shapes").samples(limit=20)
    same = [[a.images == b.images for a in some for b in some] for some in (own, shapes.samples())]
    assert same[0] == same[1]
    assert [len(sample.images) for sample in mixed.samples()] == [1, 1, 0, 1, 2, 1]


# --- the command line -----------------------------------------------------------------------------


def test_the_registry_knows_both_classes():
    assert get_model("vlmprune").__name__ == "VlmPrune"
    assert get_model("vlmprune", force_simple=True).__name__ == "VlmPruneSimple"


def test_the_folder_of_tasks_is_written_from_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ["lmms-tasks", str(tmp_path / "new"), "--limit", "10"])
    assert done.exit_code == 0, done.output
    assert "textvqa_val_ocr" in done.output
    assert len(get_task(f"lmms:{tmp_path / 'new' / 'shapes.yaml'}").samples()) == 10


def test_the_command_line_of_lmms_eval(tasks, tmp_path):
    """The command finds the model by its entry point, and every sample row says what pruning did."""
    arguments = {
        "--model": "vlmprune",
        "--model_args": "pretrained=tiny,prune=random(seed=1)@9,max_new_tokens=4",
        "--tasks": "shapes",
        "--include_path": tasks,
        "--output_path": tmp_path,
        "--batch_size": 2,
        "--limit": 4,
        "--device": "cpu",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    command = [Path(sys.executable).parent / "lmms-eval", "--log_samples", *words]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    found = list(tmp_path.rglob("*_samples_shapes.jsonl"))
    assert len(found) == 1 and done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in found[0].read_text().splitlines()]
    counts = [row["token_counts"][0] for row in rows]
    assert [one["spec"] for one in counts] == ["random(seed=1)@9"] * 4
    assert [(one["dense_tokens"], one["realised_tokens"]) for one in counts] == [(144, 9)] * 4
    assert all(1 <= one["output_tokens"] <= 4 for one in counts)  # the model stops by itself
    read = records(rows, get_task(f"lmms:{tasks / 'shapes.yaml'}"))
    assert [(r.id, r.realised_tokens, bool(r.answer)) for r in read] == [
        (f"shapes-{i}", 9, True) for i in range(4)
    ]
    results = json.loads(next(tmp_path.rglob("*_results.json")).read_text())
    assert 0 <= results["results"]["shapes"]["accuracy,none"] <= 1


def test_a_run_folder_is_locked_in_a_process_in_which_lmms_eval_has_evaluated(shapes, tmp_path):
    """lmms-eval makes locks of filelock's own class those of the whole process."""
    run_cell(*tiny_bundle("llava"), "pool@4", shapes, limit=1)
    with (
        locked(tmp_path),
        pytest.raises(EvaluationError, match="is in use by process"),
        locked(tmp_path),
    ):
        pass


@pytest.mark.parametrize("name, near", [("popee", " Did you mean 'pope'"), ("nosuchtask", "")])
def test_validate_refuses_a_task_that_lmms_eval_lacks_and_names_only_what_is_near(tmp_path, name, near):
    config = tmp_path / "config.yaml"
    config.write_text(f'models: [tiny]\nspecs: [pool@4]\ntasks: ["lmms:{name}"]\n')
    result = CliRunner().invoke(app, ["validate", str(config)])
    assert result.exit_code == 2 and "valid" not in result.stdout
    assert f"{config}: lmms-eval has no task '{name}'" in result.stderr
    assert (near in result.stderr) if near else ("Did you mean" not in result.stderr)


def test_validate_accepts_tasks_that_lmms_eval_has(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text('models: [tiny]\nspecs: [pool@4]\ntasks: ["lmms:pope", "lmms:pope_yes"]\n')
    result = CliRunner().invoke(app, ["validate", str(config)])
    assert result.exit_code == 0 and "valid" in result.stdout, result.stderr


def test_rules_that_give_no_number_and_documents_without_a_target_stop_no_summary():
    rules = {"mean": lambda values: sum(values) / len(values), "by_language": lambda values: {"en": 1.0}}
    given = types.SimpleNamespace(
        lmms=types.SimpleNamespace(aggregation=lambda: rules),
        _results=lambda number, answer: {"mean": float(number), "by_language": answer},
        _targets=lambda number: [],
    )
    asked = [types.SimpleNamespace(number=number) for number in (0, 1)]
    assert LmmsTask.official(given, asked, ["x", "y"]) == {"mean": 0.5}
    assert LmmsTask._guess(given, [0, 1]) == 0.0
