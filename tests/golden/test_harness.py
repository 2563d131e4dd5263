# SPDX-License-Identifier: Apache-2.0
"""The golden suite fails where it should, and names what it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # starts pytest anew

SUITE = Path(__file__).parent / "test_vectors.py"


def case(file, kind="selection", tolerance=None):
    return {
        "file": file,
        "kind": kind,
        "hyperparameters": {"visual_token_num": 2},
        "tolerance": tolerance or {"kept_indices": "exact", "scores": "rtol 1e-5"},
    }


def run(directory):
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(SUITE),
        "--golden-dir",
        str(directory),
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONSAFEPATH": "1"}, check=False, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_mismatch_unknown_kind_missing_file_and_forgotten_array_fail(tmp_path):
    folder, stranger = tmp_path / "fastervlm", tmp_path / "not_a_method"
    folder.mkdir(), stranger.mkdir()
    attention = np.array([[[0.1, 0.4, 0.2, 0.3]]], dtype=np.float32)
    good = {"cls_attentions": attention, "scores": attention[:, 0], "kept_indices": np.array([[1, 3]])}
    np.savez(folder / "good.npz", **good)
    np.savez(folder / "wrong.npz", **(good | {"kept_indices": np.array([[0, 1]])}))
    np.savez(folder / "extra.npz", **good, surprise=attention)
    cases = [
        case("good.npz"),
        case("wrong.npz"),
        case("good.npz", kind="unheard_of"),
        case("lost.npz"),
        case("extra.npz", tolerance={"kept_indices": "exact", "scores": "rtol 1e-5", "surprise": "exact"}),
    ]
    (folder / "index.json").write_text(json.dumps({"cases": cases}))
    (stranger / "index.json").write_text(
        json.dumps({"files": {"a.npz": {"kind": "selection"}, "b.npz": {"kind": "selection"}}})
    )

    code, output = run(tmp_path)

    assert code == 1
    assert "fastervlm: 1 of 5 cases passed" in output
    assert "not registered: not_a_method (2 cases)" in output
    assert "wrong: kept_indices" in output
    assert "no runner for kind 'unheard_of'" in output
    assert "lost.npz is named in the index but missing" in output
    assert "left ['surprise'] uncompared" in output


def test_an_empty_folder_of_vectors_is_an_error(tmp_path):
    code, output = run(tmp_path)
    assert code != 0
    assert "no golden vectors under" in output
