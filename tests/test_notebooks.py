# SPDX-License-Identifier: Apache-2.0
"""The notebooks: what is written is what their Python files say, with outputs; and how they are compared."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))


def script():
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NamedTuple looks its module up
    spec.loader.exec_module(module)
    return module


BUILD = script()


def written(path):
    return json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))


def test_there_are_seven():
    assert [path.stem[:2] for path in SOURCES] == [f"{number:02}" for number in range(1, 8)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_what_is_written_is_what_the_file_says(path):
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in written(path)["cells"]]
    hint = f"run python notebooks/build.py {path.stem[:2]}"
    assert found == [tuple(cell) for cell in BUILD.cells(path.read_text(encoding="utf-8"))], hint


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_cell_was_executed_in_order_and_none_failed(path):
    code = [cell for cell in written(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    streams = [o["name"] for cell in code for o in cell["outputs"] if o["output_type"] == "stream"]
    assert set(streams) <= {"stdout"}, "a cell warns: repair it, or a reader stumbles"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_title_and_has_lines_of_readable_length(path):
    source = path.read_text(encoding="utf-8")
    first = BUILD.cells(source)[0]
    assert first.kind == "markdown" and first.text.startswith("# ")
    code = [line for cell in BUILD.cells(source) if cell.kind == "code" for line in cell.text.splitlines()]
    assert max(map(len, code)) <= 110


# --- the script -----------------------------------------------------------------------------------


def test_cells_are_read_from_comments():
    head = '"""For readers of the file."""\n\n'
    source = head + "# %% [markdown]\n# # Title\n#\n# Text\n\n# %%\nx = 1\n\n\n# %%\n# no text\n"
    found = [("markdown", "# Title\n\nText"), ("code", "x = 1"), ("code", "# no text")]
    assert [tuple(cell) for cell in BUILD.cells(source)] == found


def test_a_cell_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"expected '# %%' or '# %% \[markdown\]'"):
        BUILD.cells("# %% [raw]\nx\n")


def cell(*outputs, source="x"):
    return {"source": source, "outputs": list(outputs)}


def stream(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


def result(**data):
    return {"output_type": "execute_result", "data": {k.replace("_", "/", 1): v for k, v in data.items()}}


@pytest.mark.parametrize(
    ("before", "after", "alike"),
    [
        (stream("kept 18 of 144, 2.1 ms"), stream("kept 18 of 144, 13 ms"), True),
        (stream("kept 18 of 144, 2.1 ms"), stream("kept 19 of 144, 2.1 ms"), False),
        (stream("<f at 0x7f12>"), stream("<f at 0x81aa>"), True),
        (result(text_html="<b>1</b>", text_plain="a"), result(text_html="<b>2</b>", text_plain="a"), False),
        (result(text_plain="a"), result(text_plain="a", image_png="AAAA"), False),
        (result(image_png="AAAA"), result(image_png="BBBB"), True),
        (
            result(text_html='<img src="data:image/png;base64,AA">'),
            result(text_html='<img src="data:image/png;base64,BB">'),
            True,
        ),
    ],
)
def test_outputs_are_compared_but_for_times_addresses_and_pixels(before, after, alike):
    old, new = (SimpleNamespace(cells=[cell(), cell(one)]) for one in (before, after))
    found = BUILD.differences(old, new)
    assert len(found) == (not alike) and all(text.startswith("cell 1 shows") for text in found)


def test_other_cells_are_a_difference_of_their_own():
    old, new = (SimpleNamespace(cells=[cell(source=text)]) for text in "xy")
    assert BUILD.differences(old, new) == ["its cells are not those of the Python file"]


def test_a_dead_widget_becomes_what_it_showed():
    states = {
        "box": {"state": {"children": ["IPY_MODEL_slide", "IPY_MODEL_map"], "_model_name": "VBoxModel"}},
        "slide": {"state": {"value": 3, "_model_name": "IntSliderModel"}},
        "map": {"state": {"value": "<b>map</b>", "_model_name": "HTMLModel"}},
    }
    assert BUILD.drawings("box", states) == ["<b>map</b>"]


def test_a_notebook_whose_packages_are_missing_is_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setattr(BUILD, "find_spec", lambda name: None)
    assert BUILD.main(["07", "--check"]) == 0
    assert capsys.readouterr().out == "07_timm_towers: left out, timm and torchvision not installed\n"


def test_a_name_that_no_notebook_has_is_refused(capsys):
    with pytest.raises(SystemExit):
        BUILD.main(["99"])
    assert "no notebook begins with ['99']" in capsys.readouterr().err
