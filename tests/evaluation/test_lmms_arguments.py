# SPDX-License-Identifier: Apache-2.0
"""What the lmms-eval plug-in reads from the command line and from tasks; nothing here needs lmms-eval."""

from __future__ import annotations

from importlib import metadata, util

import numpy as np
import pytest
import yaml
from PIL import Image

import vlmprune.evaluation.tasks.lmms.loading as loading
from vlmprune.errors import EvaluationError, SpecError, UnsupportedError
from vlmprune.evaluation.tasks.lmms.arguments import Arguments, split
from vlmprune.evaluation.tasks.lmms.conversation import frames, from_messages, from_visuals, picture, until
from vlmprune.evaluation.tasks.registry import get_task


def test_specs_keep_their_commas():
    assert split("pretrained=a/b,prune=sparsevlm(layers=(2,6), seed=1)@64,dtype=float32") == [
        "pretrained=a/b",
        "prune=sparsevlm(layers=(2,6), seed=1)@64",
        "dtype=float32",
    ]
    read = Arguments.read(
        "prune=random(seed=1)@36,strict=true,max_new_tokens=16", {"batch_size": 4, "device": None}
    )
    assert read == Arguments(prune="random(seed=1)@36", strict=True, max_new_tokens=16, batch_size=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune", "name=value"),
        ("prunes=fastv@64", "Did you mean 'prune'"),
        ("keep=64", "prune=fastervlm@64"),
        ("prune=fastervm@64", "Did you mean 'fastervlm'"),
        ("prune=fastervlm", "budget"),
        ("strict=maybe", "true or false"),
        ("batch_size=auto", "whole number"),
        ("batch_size=0", "at least 1"),
        ("dtype=a,dtype=b", "twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message):
    with pytest.raises(SpecError, match=message.replace("(", r"\(")):
        Arguments.read(text)


def test_messages_keep_the_order_of_what_they_show():
    one, two = Image.new("L", (4, 4)), Image.new("RGB", (8, 4))
    found = from_messages(
        [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": one},
                    {"type": "text", "text": "and"},
                    {"type": "image", "url": two},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "video", "url": "clip.mp4"}, {"type": "text", "text": "what?"}],
            },
        ]
    )
    assert found.images == [one, two] and found.clips == ["clip.mp4"] and found.question == "what?"
    assert [[part["type"] for part in message["content"]] for message in found.messages] == [
        ["text"],
        ["image", "text", "image"],
        ["video", "text"],
    ]
    assert picture(one).mode == "RGB"


def test_visuals_are_told_apart():
    image = Image.new("RGB", (4, 4))
    found = from_visuals([image, "a.png", "b.mp4", [image, image]], "what?")
    assert found.images == [image, "a.png"] and found.clips == ["b.mp4", [image, image]]
    assert [part["type"] for part in found.messages[0]["content"]] == [
        "image",
        "image",
        "video",
        "video",
        "text",
    ]
    assert from_visuals(None, "what?").messages[0]["content"] == [{"type": "text", "text": "what?"}]
    with pytest.raises(UnsupportedError, match="audio"):
        from_messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])


def test_a_padded_picture_is_square_and_centred():
    padded = np.asarray(picture(Image.new("RGB", (6, 2), (255, 0, 0)), (0.5, 0.25, 0.0)))
    assert padded.shape == (6, 6, 3)
    assert (
        (padded[2:4] == (255, 0, 0)).all()
        and (padded[:2] == (127, 63, 0)).all()
        and (padded[4:] == (127, 63, 0)).all()
    )


def test_frames_are_spread_over_the_clip():
    clip = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    assert frames(clip, 4)[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
    assert len(frames(clip, 99)) == 10
    assert frames([Image.new("RGB", (2, 3))] * 5, 2).shape == (2, 3, 2, 3)
    with pytest.raises(EvaluationError, match=r"none\.mp4"):
        frames("none.mp4", 4)
    with pytest.raises(UnsupportedError, match="video_start"):
        frames({"url": "a.mp4", "video_start": 1.0}, 4)
    with pytest.raises(UnsupportedError, match="end_time"):
        frames(
            from_messages(
                [{"role": "user", "content": [{"type": "video", "url": "a.mp4", "end_time": 2.0}]}]
            ).clips[0],
            4,
        )


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (None, "a\n\nASSISTANT: b"),
        (["\n\n"], "a\n\nASSISTANT: b"),
        (["ASSISTANT:"], "a\n\n"),
        ("b", "a\n\nASSISTANT: "),
    ],
)
def test_stop_strings_cut_and_white_space_does_not(stops, text):
    assert until("a\n\nASSISTANT: b", stops) == text


def test_without_lmms_eval_its_tasks_say_what_to_install(monkeypatch):
    found = util.find_spec
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "lmms_eval" else found(name))
    with pytest.raises(EvaluationError, match=r"pip install -e .\.\[eval\]. in a clone"):
        get_task("lmms:gqa")


def test_the_entry_point_is_declared_and_light():
    (point,) = [
        point for point in metadata.entry_points(group="lmms_eval.models") if point.name == "vlmprune"
    ]
    assert point.value == "vlmprune.evaluation.tasks.lmms.plugin:manifests"
    assert callable(point.load())


def test_a_task_file_is_named_after_its_task():
    class Names(yaml.SafeLoader):
        pass

    Names.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    files = sorted(loading.folder().glob("*.yaml"))
    assert len(files) >= 8
    for path in files:
        config = yaml.load(path.read_text(), Names)
        assert config["task"] == path.stem
        assert config["generation_kwargs"]["max_new_tokens"] == 16
