# SPDX-License-Identifier: Apache-2.0
"""Push and pull, against a Hub that is a folder: what goes along, what is refused, and what comes back."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

sys.path.append(str(Path(__file__).parent / "evaluation"))
from simulated_run import simulate

import vlmprune
from vlmprune import hub
from vlmprune.core.keepmap import KeepMap, ScoreMap
from vlmprune.core.report import Report
from vlmprune.core.weights import write_weights
from vlmprune.errors import EvaluationError, SpecError, VlmPruneError
from vlmprune.evaluation.leaderboard.rundir import Run


class LocalHub:
    """The three calls of HfApi that are used, on folders; arguments that the real ones lack are refused."""

    def __init__(self, folder):
        self.folder, self.made = folder, []

    def _call(self, name, options):
        return inspect.signature(getattr(HfApi, name)).bind(self, **options).arguments

    def _repo(self, given):
        return self.folder / f"{given['repo_type']}s" / given["repo_id"]

    def create_repo(self, **options):
        given = self._call("create_repo", options)
        self.made.append((given["repo_type"], given["repo_id"], given["private"]))
        assert given["exist_ok"] is True
        self._repo(given).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, **options):
        given = self._call("upload_folder", options)
        source, target = Path(given["folder_path"]), self._repo(given)
        names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=given["allow_patterns"]):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        return SimpleNamespace(commit_url=f"https://hub/{given['repo_id']}/commit/1")

    def snapshot_download(self, **options):
        given = self._call("snapshot_download", options)
        if not self._repo(given).is_dir():
            raise FileNotFoundError("404 Client Error: Repository Not Found")
        out = Path(given["local_dir"] or self.folder / "cache" / given["repo_id"])
        shutil.copytree(self._repo(given), out, dirs_exist_ok=True)
        return str(out)


@pytest.fixture
def api(tmp_path):
    return LocalHub(tmp_path / "hub")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("runs") / "run", samples=20, budgets=(9,), resamples=100)


@pytest.fixture
def maps(tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    scores = ScoreMap(torch.arange(6.0), ((2, 3),), "fastervlm")
    scores.save(folder / "scores.safetensors")
    scores.keep(2).save(folder / "keep_0.json")
    (folder / "notes.txt").write_text("private")
    return folder


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    backbone = {"model_type": "llama", "hidden_size": 8}
    write_weights(folder, "visionselector", {"a": torch.ones(2)}, {"backbone": backbone})
    (folder / "training").mkdir()
    (folder / "training" / "state.json").write_text("{}")
    return folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- round trips ----------------------------------------------------------------------------------


def test_maps_come_back_as_they_were_and_nothing_else_goes_along(api, maps, tmp_path):
    assert hub.push(maps, "me/maps", api=api) == "https://hub/me/maps/commit/1"
    assert api.made == [("dataset", "me/maps", True)]
    assert files(tmp_path / "hub/datasets/me/maps") == ["README.md", "keep_0.json", "scores.safetensors"]
    found = hub.load_maps(hub.pull("maps", "me/maps", tmp_path / "back", api=api))
    assert {name: type(one) for name, one in found.items()} == {
        "keep_0.json": KeepMap,
        "scores.safetensors": ScoreMap,
    }
    assert found["keep_0.json"].keep_idx.tolist() == [4, 5]
    card = (tmp_path / "hub/datasets/me/maps/README.md").read_text()
    assert "2 of 6 tokens" in card and card.startswith("---\ntags: [vlmprune]\n---\n")


def test_weights_come_back_without_the_state_of_their_training(api, weights, tmp_path):
    hub.push(weights, "me/selector", public=True, api=api)
    assert api.made == [("model", "me/selector", False)]
    names = ["README.md", "visionselector.json", "visionselector.safetensors"]
    assert files(tmp_path / "hub/models/me/selector") == names
    back = hub.pull("weights", "me/selector", api=api)
    for name in names[1:]:
        assert (back / name).read_bytes() == (weights / name).read_bytes()
    assert (
        "`visionselector`, trained with model_type llama, hidden_size 8" in (back / "README.md").read_text()
    )


def test_a_run_comes_back_whole_with_its_rows_as_parquet(api, run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    hub.push(run, "me/run", api=api)
    back = hub.pull("run", "me/run", tmp_path / "back", api=api)
    for name in files(run):
        if name.startswith(("cells/", "run.json", "results.json")):
            assert (back / name).read_bytes() == (run / name).read_bytes(), name
    rows, table = Run.open(back).results["rows"], parquet.read_table(back / "rows.parquet").to_pylist()
    assert sorted((row["spec"], row["accuracy"]) for row in table) == sorted(
        (row["spec"], row["accuracy"]) for row in rows
    )
    one = next(row for row in rows if row["spec"] == "dense")
    (same,) = [row for row in table if row["spec"] == "dense" and row["model"] == one["model"]]
    assert (same["ci_low"], same["ci_high"]) == tuple(one["ci"])
    assert "| dense" in (back / "README.md").read_text()


def test_a_card_of_the_users_own_is_kept(api, maps, tmp_path):
    (maps / "README.md").write_text("mine")
    hub.push(maps, "me/maps", api=api)
    assert (tmp_path / "hub/datasets/me/maps/README.md").read_text() == "mine"


def test_the_block_of_the_page_runs_and_prints_what_it_says(monkeypatch, api, tmp_path, capsys):
    page = Path(__file__).parents[1] / "docs" / "hub.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_api", lambda: api)
    exec(compile(block, str(page), "exec"), {"__name__": "page"})
    assert f"# {capsys.readouterr().out}" in block


def test_a_name_that_reads_as_a_pattern_is_that_file_and_no_other(api, maps, tmp_path):
    one = KeepMap.load(maps / "keep_0.json")
    one.save(maps / "keep[1].json")
    one.save(maps / "*.json")
    (maps / "private").mkdir()
    (maps / "private" / "diary.json").write_text("{}")
    hub.push(maps, "me/maps", api=api)
    names = ["*.json", "README.md", "keep[1].json", "keep_0.json", "scores.safetensors"]
    assert files(tmp_path / "hub/datasets/me/maps") == names


def test_of_a_run_only_its_cells_go_along(api, run, tmp_path):
    pytest.importorskip("pyarrow")
    mine = shutil.copytree(run, tmp_path / "mine")
    (mine / "cells" / "notes.json").write_text('{"key": "secret"}')
    hub.push(mine, "me/run", api=api)
    there = files(tmp_path / "hub/datasets/me/run")
    assert "cells/notes.json" not in there and len(there) == len(files(run)) + 2


def test_what_lies_in_the_cache_of_the_hub_can_be_pushed(api, maps, tmp_path):
    cached = tmp_path / "models--me--maps"
    snapshot = cached / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(maps, cached / "blobs")
    for path in (cached / "blobs").glob("*.json"):
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    hub.push(snapshot, "me/maps", api=api)
    assert files(tmp_path / "hub/datasets/me/maps") == ["README.md", "keep_0.json"]


# --- refused --------------------------------------------------------------------------------------


def test_what_is_damaged_is_not_pushed(api, weights, maps, run, tmp_path):
    (weights / "visionselector.safetensors").write_bytes(
        (weights / "visionselector.safetensors").read_bytes()[:-1] + b"\x01"
    )
    (maps / "keep_0.json").write_text('{"keep_idx": [1]}')
    broken = shutil.copytree(run, tmp_path / "broken")
    info = json.loads((broken / "results.json").read_text())
    info["rows"][0]["accuracy"] = 2.0
    (broken / "results.json").write_text(json.dumps(info))
    for folder, words in ((weights, "SHA-256 differs"), (maps, "not a whole KeepMap"), (broken, "accuracy")):
        with pytest.raises(VlmPruneError, match=words):
            hub.push(folder, "me/it", api=api)
    assert api.made == [] and not (tmp_path / "hub").exists()


def test_what_was_changed_on_the_hub_is_refused_when_it_is_pulled(api, weights, tmp_path):
    hub.push(weights, "me/selector", api=api)
    path = tmp_path / "hub/models/me/selector/visionselector.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SpecError, match="SHA-256 differs"):
        hub.pull("weights", "me/selector", api=api)


def test_a_folder_of_something_else_and_an_unknown_kind_are_refused(api, tmp_path):
    with pytest.raises(SpecError, match=r"holds none of these: a run \(run.json\), weights"):
        hub.push(tmp_path, "me/it", api=api)
    with pytest.raises(SpecError, match="is no folder"):
        hub.push(tmp_path / "nowhere", "me/it", api=api)
    with pytest.raises(SpecError, match="kind"):
        hub.pull("model", "me/it", api=api)


def test_a_repository_without_what_was_asked_for_is_refused(api, maps, tmp_path):
    empty = tmp_path / "hub" / "models" / "me" / "empty"
    empty.mkdir(parents=True)
    (empty / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SpecError, match="holds no weights"):
        hub.pull("weights", "me/empty", api=api)
    (tmp_path / "hub" / "datasets" / "me" / "empty").mkdir(parents=True)
    with pytest.raises(SpecError, match="holds no maps"):
        hub.pull("maps", "me/empty", api=api)
    with pytest.raises(SpecError, match="holds no maps"):
        hub.load_maps(tmp_path / "nowhere")


def test_no_link_leads_out_of_the_folder(api, maps, run, tmp_path):
    (tmp_path / "secret").write_text("key")
    (maps / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(SpecError, match=r"is a link to .*secret.*outside of the folder"):
        hub.push(maps, "me/maps", api=api)
    mine = shutil.copytree(run, tmp_path / "mine")
    shutil.move(mine / "cells", tmp_path / "cells")
    (mine / "cells").symlink_to(tmp_path / "cells")
    with pytest.raises(SpecError, match="is a link to"):
        hub.push(mine, "me/run", api=api)
    assert api.made == []


def test_a_broken_cell_that_no_row_is_of_is_not_pushed(api, run, tmp_path):
    mine = shutil.copytree(run, tmp_path / "mine")
    (mine / "cells" / "0123456789abcdef.json").write_text('{"spec": "dense"}')
    (mine / "cells" / "0123456789abcdef.jsonl").write_text('{"id": "mine"}\n')
    with pytest.raises(EvaluationError, match=r"0123456789abcdef\.json has the fingerprint"):
        hub.push(mine, "me/run", api=api)
    assert api.made == []


def test_a_repository_that_is_not_there_is_one_sentence(api):
    with pytest.raises(
        EvaluationError, match=r"cannot pull from 'me/gone': 404 Client Error: .*hf auth login"
    ):
        hub.pull("maps", "me/gone", api=api)


def test_parquet_names_its_extra(monkeypatch, run, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(VlmPruneError, match=re.escape('pip install -e ".[hub]"')):
        hub.write_rows(run, tmp_path / "rows.parquet")


def test_the_section_of_a_model_card_says_what_runs():
    report = Report(
        "fastervlm@64", dense_tokens=[576], realised_tokens=[64], layer_tokens=[[64]], sequence=(600, 88)
    )
    card = hub.deployment_card("me/model", "fastervlm@64", report, {"GQA, 1,000 questions": 0.6124})
    for text in ("`vlmprune.prune(model, 'fastervlm@64')`", "| 64 of 576 |", "| 88 of 600 |", "61.2 %"):
        assert text in card
    assert card.startswith("## Visual token pruning\n")


def test_nothing_in_the_package_calls_the_hub_by_itself():
    package = Path(vlmprune.__file__).parent
    users = [
        p.name for p in package.rglob("*.py") if re.search(r"\bimport hub\b|from \.+hub ", p.read_text())
    ]
    assert users == []
