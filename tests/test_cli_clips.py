# SPDX-License-Identifier: Apache-2.0
"""``vlmprune run`` about a clip: what is said of it, its strip of frames, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import cli
from PIL import Image

from vlmprune.core.keepmap import KeepMap
from vlmprune.errors import SpecError
from vlmprune.viz.strip import GAP, LARGEST, LINE, draw_strip

pytest.importorskip("av", reason="needs PyAV, the extra [video]")
from clip_files import write_clip


def test_a_clip_is_asked_about_and_drawn(tmp_path):
    path, out = write_clip(tmp_path / "clip.mp4", 20), tmp_path / "strip.png"
    words = ("run", path, "What?", "--frames", 3, "--prune", "evs@0.5", "--max-new-tokens", 2, "--draw", out)
    found = json.loads(cli(*words, "--json").stdout)
    assert found["visual_tokens"]["dense"] == [144] * 3
    assert found["clip"]["kept"] == found["visual_tokens"]["pruned"]
    assert found["clip"]["kept"][0] == 144 and sum(found["clip"]["kept"]) == 216
    assert found["clip"]["times"] == pytest.approx([0.3, 1.0, 1.6], abs=0.06)
    assert found["clip"]["shown_as"] == "images of one prompt"
    tall = LARGEST * 48 // 64
    assert Image.open(out).size == (3 * (LARGEST + GAP) + GAP, tall + LINE + 2 * GAP)
    text = cli(*words[:-2], "--no-dense").stdout
    assert "Clip: 3 frames of 0:02.0, one every 0:00.7; shown to the model as images of one prompt." in text
    assert f"144 {found['clip']['kept'][1]} {found['clip']['kept'][2]}" in text


def test_eight_frames_are_read_unless_others_are_asked_for_and_a_picture_has_none(tmp_path):
    path = write_clip(tmp_path / "clip.webm", 30, codec="libvpx")
    words = ("--no-dense", "--json", "--max-new-tokens", 1)
    assert len(json.loads(cli("run", path, *words).stdout)["clip"]["times"]) == 8
    assert json.loads(cli("run", *words).stdout)["clip"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CLIP", "What?", "--prune", "fastv@0.5"], "fastv cuts inside the language model"),
        (["CLIP", "What?", "--prune", "downsample@64"], "show fewer frames by --frames"),
        (["CLIP", "What?", "--prune", "evs@0.01"], "keep at least 144"),
        (["CLIP", "What?", "--frames", "0"], "--frames"),
        (["--frames", "4"], "--frames is for clips, whose names end in one of .mp4"),
        (["none.mp4"], "no file at 'none.mp4'; expected the path of a clip"),
        (["BROKEN"], "cannot be read as a clip"),
    ],
)
def test_wrong_clips_and_options_are_one_message_and_code_2(words, message, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 20)
    (tmp_path / "broken.mp4").write_bytes(path.read_bytes()[:500])
    names = {"CLIP": path, "BROKEN": tmp_path / "broken.mp4"}
    result = cli("run", *(names.get(word, word) for word in words), code=2)
    assert message in result.stderr and result.stdout == ""


def maps(kept, grid=(2, 2)):
    return [KeepMap(indices, grids=(grid,)) for indices in kept]


def test_a_strip_shows_every_frame_with_what_it_keeps():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    sheet = np.asarray(draw_strip(frames, maps([[0], [], [0, 1, 2, 3]]), ["a", "b", "c"]))
    step = LARGEST + GAP
    centres = [sheet[GAP + 80, GAP + number * step + 80] for number in range(3)]  # of the first patch
    assert centres[0].tolist() == [255, 0, 0] and centres[2].tolist() == [0, 0, 255]
    assert centres[1].max() < 128  # dropped: dark
    assert sheet[GAP + 240, GAP + 240].max() < 128  # the last patch of the first frame
    pale = np.asarray(draw_strip(frames, maps([[0], [], [0]]), merged=True))
    assert pale[GAP + 80, GAP + step + 80].tolist() == [140, 255, 140]


def test_a_strip_goes_on_in_a_second_row_and_shows_one_frame_of_each_group():
    frames = [Image.new("RGB", (20, 10), (number * 20, 0, 0)) for number in range(10)]
    sheet = draw_strip(frames, maps([[0, 1, 2, 3]] * 10), max_side=1000)
    wide = 1000 // 8 - GAP
    assert sheet.size == (8 * (wide + GAP) + GAP, 2 * (round(wide / 2) + LINE + GAP) + GAP)
    halved = np.asarray(draw_strip(frames, maps([[0, 1, 2, 3]] * 5)))
    step = min(LARGEST, 2000 // 5 - GAP) + GAP
    assert [int(halved[GAP + 40, GAP + number * step + 40, 0]) for number in range(5)] == [
        0,
        40,
        80,
        120,
        160,
    ]


def test_a_strip_refuses_what_does_not_fit():
    frames = [Image.new("RGB", (20, 10))] * 2
    with pytest.raises(SpecError, match="2 frames, 3 maps and 0 labels"):
        draw_strip(frames, maps([[0]] * 3))
    with pytest.raises(
        SpecError, match="2 frames do not fit into 60 pixels side by side; give max_side of 108"
    ):
        draw_strip(frames, maps([[0]] * 2), max_side=60)
