# SPDX-License-Identifier: Apache-2.0
"""Clips from files: which frames are read, what is said of them, and files that are no clips."""

from __future__ import annotations

import builtins
import time
from fractions import Fraction

import numpy as np
import pytest

from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.videofile import clock, is_clip, read_clip

pytest.importorskip("av", reason="needs PyAV, the extra [video]")
from clip_files import SIZE, lie_down, number_of, write_clip, write_sound


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_frames_are_those_in_the_middle_of_equal_parts(tmp_path, name):
    clip = read_clip(str(write_clip(tmp_path / name, 40)), 4)
    assert [number_of(frame, 40) for frame in clip.frames] == [5, 15, 25, 35]
    assert clip.times == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.01)
    assert clip.seconds == pytest.approx(4.0, abs=0.11)
    assert all(frame.mode == "RGB" and frame.size == SIZE for frame in clip.frames)


def test_three_hours_are_read_by_seeking(tmp_path):
    path = write_clip(tmp_path / "long.mp4", 1080, Fraction(1, 10))
    started = time.perf_counter()
    clip = read_clip(str(path), 6)
    assert clip.seconds == pytest.approx(10800)
    assert clip.sampling == "6 frames of 3:00:00, one every 30:00.0"
    assert clip.times == [900, 2700, 4500, 6300, 8100, 9900]
    assert [number_of(frame, 1080) for frame in clip.frames] == pytest.approx(
        [90, 270, 450, 630, 810, 990], abs=10
    )  # neighbours differ by a fifth of a grey level
    assert time.perf_counter() - started < 20


def test_a_short_clip_says_that_it_has_no_more(tmp_path):
    one = read_clip(str(write_clip(tmp_path / "one.mp4", 1)))
    assert len(one.frames) == 1 and one.times == [0.0]
    assert one.sampling == "1 of 8 frames asked for: 0:00.1 of this clip show no more"
    three = read_clip(str(write_clip(tmp_path / "three.mp4", 3)), 8)
    assert [number_of(frame, 3) for frame in three.frames] == [0, 1, 2] and "3 of 8" in three.sampling
    assert read_clip(str(tmp_path / "three.mp4"), 1).sampling == "1 frame, from the middle of 0:00.3"


def test_a_file_that_does_not_say_how_long_it_is(tmp_path):
    import av

    path = tmp_path / "stream.mkv"
    write_clip(path, 40)
    with (
        av.open(str(path)) as source,
        av.open(str(tmp_path / "live.mkv"), "w", options={"live": "1"}) as live,
    ):
        stream = live.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                live.mux(packet)
    with av.open(str(tmp_path / "live.mkv")) as made:
        assert not made.duration and not made.streams.video[0].duration
    clip = read_clip(str(tmp_path / "live.mkv"), 4)
    assert [number_of(frame, 40) for frame in clip.frames] == [5, 15, 25, 35]


def test_a_clip_that_lies_down_is_turned_up(tmp_path):
    path = write_clip(tmp_path / "phone.mp4", 3)
    lie_down(path)
    frame = read_clip(str(path), 1).frames[0]
    assert frame.size == (SIZE[1], SIZE[0])
    pixels = np.asarray(frame.convert("L"), dtype=float)
    # the left half, which is light, comes to the top when it is turned clockwise
    assert pixels[:24].mean() > 1.5 * pixels[-24:].mean()


def test_broken_and_empty_files_are_refused(tmp_path):
    whole = write_clip(tmp_path / "whole.mkv", 200).read_bytes()
    (tmp_path / "half.mkv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SpecError, match=r"lasts 0:20.\d, and its pictures end at .*it is broken off"):
        read_clip(str(tmp_path / "half.mkv"))
    movie = write_clip(tmp_path / "whole.mp4", 200).read_bytes()
    for name, bytes_ in (
        ("half.mp4", movie[: len(movie) // 2]),
        ("empty.mp4", b""),
        ("text.mp4", b"no clip"),
    ):
        (tmp_path / name).write_bytes(bytes_)
        with pytest.raises(
            SpecError, match=f"{name}.* cannot be read as a clip .*expected a whole video file"
        ):
            read_clip(str(tmp_path / name))
    with pytest.raises(SpecError, match="holds no moving pictures"):
        read_clip(str(write_sound(tmp_path / "sound.mp4")))


def test_a_playlist_cannot_reach_into_the_network(tmp_path):
    (tmp_path / "list.ts").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/part.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(SpecError, match=r"list\.ts"):
        read_clip(str(tmp_path / "list.ts"))
    with pytest.raises(SpecError, match="a URL is not read, download it"):
        read_clip("https://example.org/clip.mp4")
    with pytest.raises(SpecError, match=r"no file at .nowhere\.mp4"):
        read_clip("nowhere.mp4")
    with pytest.raises(SpecError, match="frames=0; expected an integer"):
        read_clip("nowhere.mp4", 0)


def test_without_pyav_it_says_what_to_install(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", 2)
    real = builtins.__import__

    def without(name, *rest):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"pip install -e '.\[video\]'"):
        read_clip(str(path))


def test_names_and_clocks():
    assert is_clip("A.MP4") and is_clip("a/b.webm") and not is_clip("a.png") and not is_clip("mp4")
    assert [clock(s) for s in (0, 7.46, 59.96, 3600, 10800.04)] == [
        "0:00.0",
        "0:07.5",
        "1:00.0",
        "1:00:00",
        "3:00:00",
    ]
