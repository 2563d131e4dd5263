# SPDX-License-Identifier: Apache-2.0
"""What a cell is: everything that can change an answer changes its name, and nothing else does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
from sweep_tools import config, sweep

from vlmprune.errors import EvaluationError
from vlmprune.evaluation.leaderboard import files, identity
from vlmprune.evaluation.leaderboard.run import Settings, planned
from vlmprune.evaluation.leaderboard.rundir import cell_id
from vlmprune.models.tiny import BUNDLED, SUMS

# --- models ---------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, small_model):
    """A folder as a model with code of its own has it."""
    folder = shutil.copytree(small_model, tmp_path / "model")
    (folder / "modeling_mine.py").write_text("SCALE = 1\n")
    (folder / "layers").mkdir()
    (folder / "layers" / "head.py").write_text("BIAS = 0\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    (folder / "vocabulary.tiktoken").write_text("IQ== 0\n")
    return folder


CHANGES = [
    "modeling_mine.py",
    "layers/head.py",
    "additional_chat_templates/short.jinja",
    "vocabulary.tiktoken",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "processor_config.json",
]


@pytest.mark.parametrize("name", CHANGES)
def test_one_byte_of_any_file_makes_other_weights(model, name):
    before, path = identity.weights(str(model)), model / name
    data = path.read_bytes()
    stat = path.stat()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as careless copies do
    assert identity.weights(str(model)) != before
    path.write_bytes(data)
    assert identity.weights(str(model)) == before


def test_a_file_more_less_or_of_another_name_makes_other_weights(model):
    found = {identity.weights(str(model))}
    (model / "layers" / "more.py").write_text("")
    found.add(identity.weights(str(model)))
    (model / "layers" / "more.py").rename(model / "more.py")
    found.add(identity.weights(str(model)))
    (model / "layers" / "head.py").unlink()
    found.add(identity.weights(str(model)))
    (model / "vocabulary.tiktoken").rename(model / "vocabulary.token")  # the order stays the same
    found.add(identity.weights(str(model)))
    assert len(found) == 5


def test_contents_do_not_run_into_names(tmp_path):
    """Two folders with the same bytes in another order are two models."""
    for name, texts in (("a", {"x": "1", "y": "2"}), ("b", {"x": "1y2"}), ("c", {"x": "", "1y": "2"})):
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / file).write_text(text)
    found = {files.digest(files.files_below(tmp_path / name), tmp_path / name) for name in "abc"}
    assert len(found) == 3


def test_what_decides_no_answer_leaves_the_weights_as_they_are(model):
    before = identity.weights(str(model))
    for name in (
        "README.md",
        ".gitattributes",
        "layers/__pycache__/head.pyc",
        ".cache/huggingface/x.json",
    ):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("prose")
    for name in ("checkpoint-500/optimizer.pt", "checkpoint-500/model.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("of a training")
    assert identity.weights(str(model)) == before


def test_what_is_told_of_a_model_of_the_package_leaves_its_weights_as_they_are(tmp_path, monkeypatch):
    folder = shutil.copytree(BUNDLED["natural"], tmp_path / "natural")
    monkeypatch.setitem(BUNDLED, "natural", folder)
    before = identity.weights("natural")
    for name, same in (("card.md", True), ("provenance.json", True), ("config.json", False)):
        old = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / name).write_text((folder / name).read_text() + " ")
        new = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / SUMS).write_text((folder / SUMS).read_text().replace(old, new))
        assert (identity.weights("natural") == before) is same


def test_a_run_in_the_folder_of_its_model_does_not_change_the_model(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "model")
    before = identity.weights(str(folder))
    sweep(folder, folder / "run", specs=["dense"], limit=2)
    assert identity.weights(str(folder)) == before


def test_other_formats_of_weights_count_only_beside_code(small_model, model, tmp_path):
    plain = shutil.copytree(small_model, tmp_path / "plain")
    for folder, same in ((plain, True), (model, False)):
        before = identity.weights(str(folder))
        (folder / "pytorch_model.bin").write_bytes(b"x")
        assert (identity.weights(str(folder)) == before) is same


def test_links_are_followed_and_the_order_of_a_folder_does_not_matter(model, tmp_path, monkeypatch):
    before = identity.weights(str(model))
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in sorted(model.iterdir(), reverse=True):
        (linked / path.name).symlink_to(path)
    (linked / "layers-again").symlink_to(linked)  # a circle ends
    assert files.read_once(linked, [f for f in files.files_below(linked) if "again" not in str(f)]) == before
    walk = os.walk

    def backwards(*args, **options):
        for where, folders, names in walk(*args, **options):
            folders.reverse()
            yield where, folders, names[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert identity.weights(str(model)) == before


def test_an_adapter_counts_with_the_model_below_it(small_model, tmp_path):
    base, adapter = shutil.copytree(small_model, tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = identity.weights(str(adapter))
    (base / "config.json").write_text("{}")
    assert identity.weights(str(adapter)) != before
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(EvaluationError, match="names no base model"):
        identity.weights(str(adapter))


def test_code_of_a_model_makes_another_cell_where_it_may_run(small_model):
    old, new = (planned(config(small_model), Settings(trust_remote_code=trust))[0] for trust in (False, True))
    assert cell_id(identity.recipe(old, "pool@9")) != cell_id(identity.recipe(new, "pool@9"))


def test_code_of_a_model_that_lies_elsewhere_is_refused_where_it_may_run(model):
    config = json.loads((model / "config.json").read_text())
    for reference, refused in (("modeling_mine.Mine", False), ("owner/other--modeling_mine.Mine", True)):
        (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": reference}}))
        before = identity.weights(str(model))
        if refused:
            with pytest.raises(
                EvaluationError, match=r"is that of 'owner/other--modeling_mine.Mine', so nothing"
            ):
                identity.weights(str(model), trust_remote_code=True)
        else:
            assert identity.weights(str(model), trust_remote_code=True) == before


# --- the package ----------------------------------------------------------------------------------


def test_what_is_said_to_decide_no_answer_is_there_and_the_rest_counts(monkeypatch, tmp_path):
    assert [name for name in identity._SILENT if not (identity._ROOT / name).exists()] == []
    copy = shutil.copytree(
        identity._ROOT, tmp_path / "vlmprune", ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    monkeypatch.setattr(identity, "_ROOT", copy)

    def code():
        identity.versions.cache_clear()
        return dict(identity.versions("shapes"))["code"]

    before = code()
    for name in (
        "hooks/session.py",
        "methods/fastv.py",
        "evaluation/leaderboard/plan.py",
        "evaluation/stats/objects.py",
        "evaluation/tasks/sample.py",
        "new.py",
    ):
        with (copy / name).open("a") as file:
            file.write("\n# changed\n")
        assert code() != before, name
        before = code()
    for name in (
        "cli/board.py",
        "evaluation/stats/summary.py",
        "evaluation/report/page.py",
        "evaluation/leaderboard/run.py",
    ):
        with (copy / name).open("a") as file:
            file.write("\n# changed\n")
        assert code() == before, name
    identity.versions.cache_clear()
