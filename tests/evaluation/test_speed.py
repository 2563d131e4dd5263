# SPDX-License-Identifier: Apache-2.0
"""The speed card and the break-even plan: counts are exact, times are whole, and the advice follows."""

from __future__ import annotations

import errno
import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from vlmprune import prune
from vlmprune.cli import app
from vlmprune.cli.board import fitting, grid
from vlmprune.errors import EvaluationError, SpecError, UnsupportedError
from vlmprune.evaluation.report import text
from vlmprune.evaluation.report.speed import SPEED_COLUMNS, speed_groups
from vlmprune.models import adapter_for
from vlmprune.plain import read
from vlmprune.speed import conditions, shapes
from vlmprune.speed.card import Effort, measure, save
from vlmprune.speed.free import FreeSide
from vlmprune.speed.row import SpeedRow
from vlmprune.speed.timing import race, ratios, spread
from vlmprune.speed.workload import Workload, make_workload
from vlmprune.testing.tiny import tiny_inputs, tiny_model
from vlmprune.testing.tiny_configs import missing

ONCE = Effort(rounds=1, answers=1, warmup=0)


@pytest.fixture(scope="module")
def tiny():
    return make_workload("tiny", batch=2)


@pytest.fixture(scope="module")
def card(tiny):
    return measure(
        tiny, ["fastervlm@9", "fastv(layer=2)@0.5", "dense", "var+pool@9"], answer_tokens=3, effort=ONCE
    )


# --- the ideal side -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    ["fastervlm@9", "pool@9", "visionzip@9", "fastv(layer=2)@0.5", "pyramiddrop(layers=[1,2])@0.6", "dense"],
)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_free_side_computes_the_very_same_first_token(family, spec):
    model, inputs = tiny_model(family), tiny_inputs(family, images=(1,))
    workload = Workload(family, model, inputs, adapter_for(model))
    session = prune(model, spec)
    with torch.inference_mode():
        free = FreeSide(session, workload.first_token)
        assert torch.allclose(free.first_token(), free.logits, atol=1e-5)
    layers = session.last.tokens_per_layer
    assert free.embeds.shape[1] - layers[0] == inputs["input_ids"].shape[1] - session.last.dense_tokens[0]
    assert set(free.cuts) == {index for index in range(1, len(layers)) if layers[index] < layers[index - 1]}
    assert not session.attached and not model.model.language_model._forward_pre_hooks


def test_a_batch_is_handed_over_row_by_row(tiny):
    with torch.inference_mode():
        free = FreeSide(prune(tiny.model, "fastv(layer=1)@0.5"), tiny.first_token)
        assert torch.allclose(free.first_token(), free.logits, atol=1e-5)


def test_a_pass_over_the_text_alone_is_no_cut(tiny):
    """vhr reads the prompt without its picture, through the same layers."""
    with torch.inference_mode():
        free = FreeSide(prune(tiny.model, "vhr(layers=[1,2])+fastv(layer=2)@0.5"), tiny.first_token)
        assert set(free.cuts) == {2} and free.first_token().shape == free.logits.shape


@pytest.mark.parametrize("family", [family for family in ("paligemma", "gemma3") if missing(family) is None])
def test_tokens_that_attend_both_ways_are_handed_over_with_their_mask(family):
    model, inputs = tiny_model(family), tiny_inputs(family)
    workload = Workload(family, model, inputs, adapter_for(model))
    with torch.inference_mode():
        free = FreeSide(prune(model, "uniform@9"), workload.first_token)
        assert free.mask is not None and torch.allclose(free.first_token(), free.logits, atol=1e-5)
        with pytest.raises(UnsupportedError, match="divprune@64"):
            FreeSide(prune(model, "fastv(layer=2)@0.5"), workload.first_token)


# --- counting -------------------------------------------------------------------------------------


def test_operations_are_those_of_the_products(tiny):
    model = tiny_model("llava")
    layer = model.model.language_model.layers[0].mlp
    x = torch.randn(1, 7, 64)
    assert tiny.flops(lambda: layer(x)) == 2 * 7 * 64 * 128 * 3
    q = torch.randn(1, 4, 7, 16)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert tiny.flops(lambda: attend(q, q, q)) == 2 * 2 * 4 * 7 * 7 * 16  # fused kernels are opened up


def test_rows_hold_what_was_measured_with_its_conditions(card):
    rows, left_out = card
    assert [row.spec for row in rows] == ["dense", "fastervlm@9", "fastv(layer=2)@0.5"]
    dense, before, inside = rows
    for row in rows:
        assert row.batch == 2 and row.answer_tokens == 3 and row.device == "cpu" and row.dtype == "float32"
        assert row.first_token_s > 0 and row.total_s > 0 and row.attention in row.attention_tried_s
        assert row.p20["total_s"] <= row.total_s <= row.p80["total_s"]
    assert (
        dense.tokens_per_layer == (144.0,) * 8 and dense.versus_dense == 1.0 and dense.versus_free_k is None
    )
    assert before.tokens_per_layer == (9.0,) * 8 and inside.tokens_per_layer == (144.0,) * 2 + (72.0,) * 6
    assert before.flops < inside.flops < dense.flops
    assert before.peak_bytes < dense.peak_bytes
    for row in (before, inside):
        assert row.choosing_s > 0 and row.logits_difference < 1e-5
        assert row.versus_dense == pytest.approx(dense.first_token_s / row.first_token_s)  # one round
        assert row.versus_free_k == pytest.approx(row.first_token_s / row.free_k_s)
    (refused,) = left_out
    assert refused.spec == "var+pool@9" and "sink" in refused.reason


def test_answers_have_the_stated_length(tiny):
    lengths = []
    handle = tiny.model.model.language_model.register_forward_hook(
        lambda module, args, output: lengths.append(1)
    )
    try:
        tiny.answer(5)
    finally:
        handle.remove()
    assert len(lengths) == 5  # the prompt gives the first token


def test_newer_rows_replace_those_of_the_same_conditions(card, tmp_path):
    rows, _ = card
    before, later = {"load_before": 0.1}, {"load_before": 0.2}
    save(rows, tmp_path, before)
    path = save([replace(rows[1], first_token_s=9.0), replace(rows[1], batch=8)], tmp_path, later)
    saved = json.loads(path.read_text())
    assert [(row["spec"], row["batch"]) for row in saved["rows"]] == [
        ("dense", 2),
        ("fastv(layer=2)@0.5", 2),
        ("fastervlm@9", 2),
        ("fastervlm@9", 8),
    ]
    assert saved["rows"][2]["first_token_s"] == 9.0 and saved["conditions"] == later
    assert saved["earlier"] == [before]  # under which the rows that stay were measured
    assert "earlier" not in json.loads(save(rows, tmp_path / "new.json", later).read_text())
    assert [read(SpeedRow, row, "row") for row in saved["rows"][:2]] == [rows[0], rows[2]]


def test_a_file_that_is_no_card_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmprune.speed.workload.make_workload", lambda *_, **__: pytest.fail("was built"))
    path = tmp_path / "mine.json"
    path.write_text('{"mine": 1}')
    made = CliRunner().invoke(app, ["bench", "--model", "tiny", "--out", str(path)])
    assert made.exit_code and "holds no speed card" in " ".join(made.output.split())
    assert path.read_text() == '{"mine": 1}'


def test_rows_of_other_threads_or_texts_stand_apart_and_replace_nothing(card, tmp_path):
    rows, _ = card
    given = [replace(one, threads=1) for one in rows]
    others = [replace(one, threads=4) for one in rows[:1]] + [replace(given[1], text_tokens=7)]
    path = save([*given, *others], tmp_path, {})
    path = save(given[:1], tmp_path, {})
    saved = [read(SpeedRow, row, "row") for row in json.loads(path.read_text())["rows"]]
    assert len(saved) == len(given) + 2
    groups = speed_groups(saved)
    assert sorted(len(group.rows) for group in groups) == [1, 1, len(given)]
    assert len({group.title for group in groups}) == 3
    assert any("4 threads" in group.title for group in groups)
    assert any("7 text tokens" in group.title for group in groups)


@pytest.mark.parametrize("text", ["[]", "{}", "not JSON", '{"rows": [{"spec": "dense"}]}', '{"rows": [5]}'])
def test_what_is_no_speed_card_is_not_written_over(card, tmp_path, text):
    path = tmp_path / "speed.json"
    path.write_text(text)
    with pytest.raises(SpecError, match="holds no speed card"):
        save(card[0], tmp_path, {})
    assert path.read_text() == text


def test_a_card_that_cannot_be_written_is_one_clear_error(card, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(EvaluationError, match=r"speed\.json cannot be written .*the disk is full: make room"):
        save(card[0], tmp_path, {})


# --- the card on a terminal -----------------------------------------------------------------------


@pytest.mark.parametrize("width", [170, 80, 60])
def test_the_card_is_readable_whatever_the_width(card, width):
    rows, _ = card
    screen = Console(width=width, record=True, file=io.StringIO())
    columns = fitting(SPEED_COLUMNS, rows, screen)
    screen.print(grid(columns, rows))
    lines = screen.export_text().splitlines()
    assert max(map(len, lines)) <= width
    for row in rows:  # one line each, spec and times whole
        (line,) = [line for line in lines if line.split()[:1] == [row.spec]]
        assert text.seconds(row.first_token_s) in line
    titles = [column.title for column in columns]
    assert titles[0] == "spec" and {"first token", "first token, speed-up"} <= set(titles)
    assert (len(titles) == len(SPEED_COLUMNS)) == (width == 170) and (width >= 80) == (
        "whole answer" in titles
    )
    words = {word for line in lines[:6] for word in line.split()}
    assert all(
        word in words for title in titles for word in title.split()
    )  # no heading is broken within a word


# --- timing ---------------------------------------------------------------------------------------


def test_rounds_rotate_and_the_warm_up_is_not_counted():
    order, told = [], []
    entries = {name: (None, lambda name=name: order.append(name)) for name in "abc"}
    seconds = race(entries, 3, warmup=1, on_round=lambda: told.append(len(order)))
    assert "".join(order) == "abcbcacababc" and told == [3, 6, 9, 12]
    assert {len(values) for values in seconds.values()} == {3}


def test_the_context_is_entered_around_its_call_only():
    from contextlib import contextmanager

    state = []

    @contextmanager
    def attached():
        state.append("in")
        yield
        state.append("out")

    class Again:
        def __enter__(self):
            self.inner = attached()
            self.inner.__enter__()

        def __exit__(self, *error):
            self.inner.__exit__(*error)

    race({"a": (Again(), lambda: state.append("a")), "b": (None, lambda: state.append("b"))}, 1, warmup=0)
    assert state == ["in", "a", "out", "b"]


def test_spreads_and_ratios():
    assert spread([float(i) for i in range(11)]) == [2.0, 8.0]
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "tokens"),
    [("llava-1.5-7b", 7.06, 576), ("llava-next-7b", 7.06, 2928), ("qwen2.5-vl-7b", 8.29, 1024)],
)
def test_shapes_have_the_size_of_what_they_are_named_after(name, billions, tokens):
    config = shapes.config_of(name)
    model = shapes.random_model(config, "meta", torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16} and not model.training
    assert shapes._placeholders(shapes.SHAPES[name], config) == tokens


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_scaling_keeps_heads_and_divides_width_and_depth(name):
    whole, quarter = shapes.config_of(name), shapes.config_of(name, 4)
    for part in ("text_config", "vision_config"):
        big, small = getattr(whole, part), getattr(quarter, part)
        assert big.hidden_size == 4 * small.hidden_size
        heads = "num_heads" if hasattr(big, "num_heads") else "num_attention_heads"
        assert big.hidden_size // getattr(big, heads) == small.hidden_size // getattr(small, heads)
    assert whole.vision_config.patch_size == quarter.vision_config.patch_size
    assert whole.text_config.vocab_size == quarter.text_config.vocab_size
    assert whole.text_config.num_hidden_layers == 4 * quarter.text_config.num_hidden_layers


def test_a_shape_runs_with_the_slots_it_asks_for(monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name in ("llava-1.5-7b", "llava-next-7b"):
        shape = shapes.SHAPES[name]
        text = {**shape.text, **small, "num_key_value_heads": 4}
        monkeypatch.setitem(shapes.SHAPES, name, replace(shape, vision={**shape.vision, **small}, text=text))
        workload = make_workload(name, batch=2, text=10, scale=1)
        assert workload.text_tokens == 10 and workload.batch == 2
        logits = workload.first_token()  # the model itself counts placeholders against features
        assert logits.shape == (2, 32064) and bool(logits.isfinite().all())
        assert "llava-hf/" in workload.note and workload.name == name


def test_a_family_without_an_adapter_is_named_and_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(shapes, "families", lambda: ["llava"])
    assert set(shapes.unsupported()) == {"llava-next-7b", "qwen2.5-vl-7b"}
    with pytest.raises(UnsupportedError, match=r"llava-next-7b: model type 'llava_next' has no adapter"):
        shapes.build("llava-next-7b", "cpu", torch.float32)


def test_a_scale_that_does_not_divide_is_told():
    with pytest.raises(SpecError, match="scale=3 does not divide"):
        shapes.config_of("llava-1.5-7b", 3)


# --- smaller pictures -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_qwen():
    """The shape of Qwen2.5-VL with narrow layers, and a picture of 8 x 8 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        shape = shapes.SHAPES["qwen2.5-vl-7b"]
        vision = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "depth": 4,
            "num_heads": 2,
            "out_hidden_size": 64,
        }
        text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        text |= {"num_key_value_heads": 4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        narrow = replace(
            shape,
            vision={**shape.vision, **vision, "fullatt_block_indexes": [1, 3]},
            text={**shape.text, **text},
            image=(224, 224),
        )
        patch.setitem(shapes.SHAPES, "qwen2.5-vl-7b", narrow)
        yield make_workload("qwen2.5-vl-7b", batch=2, text=10, scale=1)


def test_a_smaller_picture_is_timed_from_the_picture_on(small_qwen):
    assert small_qwen.text_tokens == 12  # with what stands around a picture
    specs = ["uniform@16", "downsample@16", "downsample@0.5"]
    rows, left_out = measure(small_qwen, specs, answer_tokens=2, effort=ONCE)
    dense, uniform, small, half = rows
    assert not left_out and [row.spec for row in rows] == ["dense", *specs]
    # the same tokens in the language model, and fewer in the tower
    assert small.tokens_per_layer == uniform.tokens_per_layer == (16.0, 16.0)
    assert half.tokens_per_layer == (30.0, 30.0)  # 5 x 6 of 8 x 8: the nearest shape within 32
    assert small.flops < uniform.flops < dense.flops
    assert small.choosing_s is None and small.versus_free_k is None and small.logits_difference is None
    # what is pruned in the model reads the picture of dense
    assert uniform.processor_s == dense.processor_s and small.processor_s not in (None, dense.processor_s)
    assert dense.versus_dense_picture == 1.0
    both = dense.processor_s + dense.first_token_s
    assert small.versus_dense_picture == pytest.approx(both / (small.processor_s + small.first_token_s))
    assert small.text_tokens == dense.text_tokens == 12


def test_the_smaller_prompt_is_the_other_one_but_for_its_picture(small_qwen):
    small = small_qwen.smaller("downsample@16")
    image = small_qwen.model.config.image_token_id
    text, whole = (w.inputs["input_ids"][0] for w in (small, small_qwen))
    assert torch.equal(text[text != image], whole[whole != image])
    assert [int((ids == image).sum()) for ids in (text, whole)] == [16, 64]
    assert small.inputs["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    again = small.reading()
    assert all(torch.equal(again[name], small.inputs[name]) for name in small.inputs)


def test_pictures_that_cannot_be_shrunk_are_left_out_with_the_reason(tiny):
    rows, left_out = measure(tiny, ["downsample@16"], answer_tokens=2, effort=ONCE)
    assert [row.spec for row in rows] == ["dense"] and rows[0].processor_s > 0
    assert "at one size" in left_out[0].reason
    bare = replace(tiny, reading=None)
    with pytest.raises(UnsupportedError, match=r"is given pixels without one; take --model qwen2\.5-vl"):
        bare.smaller("downsample@16")


def test_the_commit_is_found_through_the_link_of_an_editable_install(tmp_path, monkeypatch):
    real = Path(conditions.__file__).resolve()
    (tmp_path / "vlmprune").symlink_to(real.parents[1])
    beside = conditions.commit()
    monkeypatch.setattr(conditions, "__file__", str(tmp_path / "vlmprune" / "speed" / "conditions.py"))
    assert conditions.commit() == beside
    git = ["git", "-C", str(real.parents[2]), "status", "--porcelain", "."]
    changed = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    assert str(beside).endswith("-dirty") == bool(changed)


# --- commands -------------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def test_bench_writes_rows_and_json(tmp_path):
    little = ("--rounds", 1, "--answers", 1, "--answer", 2)
    done = run("bench", "--model", "tiny", "--prune", "pool@9", *little, "--json", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert [row["spec"] for row in content["rows"]] == ["dense", "pool@9"] and content["conditions"][
        "versions"
    ]
    assert json.loads((tmp_path / "speed.json").read_text())["rows"] == content["rows"]
    assert content["left_out"] == []
    assert set(content["unsupported"]) == set(shapes.unsupported())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bench", "--prune", "fastervml@9"), "Did you mean 'fastervlm'"),
        (("bench", "--prune", "fastervlm"), "budget"),
        (("bench", "--model", "tiny", "--out", "no/such/folder"), "expected a folder that is there"),
        (("bench", "--scale", "3"), "does not divide"),
        (("plan", "fastervlm@9", "--device", "cuda:99"), "cuda"),
        (("report", "no/such/run"), "is no folder"),
    ],
)
def test_wrong_input_is_told_before_anything_is_built(words, message):
    done = run(*words)
    assert done.exit_code == 2 and message in done.output


def test_report_writes_every_format(run_folder, tmp_path):
    forms = [word for form in ("html", "csv", "json", "md", "tex") for word in ("-f", form)]
    done = run("report", run_folder, "--out", tmp_path, *forms, "--json")
    assert done.exit_code == 0, done.output
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".html", ".json", ".md", ".tex"]
    assert len(json.loads(done.stdout)["files"]) == 5


def test_bench_prints_a_table_and_what_it_means():
    done = CliRunner(env={"COLUMNS": "80"}).invoke(
        app,
        ["bench", "--model", "tiny", "--prune", "pool@9", "--rounds", "1", "--answers", "1", "--answer", "2"],
    )
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert sum(line.split()[:1] == ["pool@9"] for line in done.stdout.splitlines()) == 1
    assert "above 1.00 is the cost of choosing" in " ".join(done.stdout.split())
