# SPDX-License-Identifier: Apache-2.0
"""From what tasks of lmms-eval give to the messages, pictures and clips of a processor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ....errors import EvaluationError, UnsupportedError

_STILLS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


class Conversation(NamedTuple):
    """Messages for ``apply_chat_template``, and what they show, in order: images (RGB or paths), clips."""

    messages: list[dict[str, Any]]
    images: list[Any]
    clips: list[Any]

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return "\n".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")


def from_messages(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """From the messages of a chat task."""
    made = Conversation([], [], [])
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        made.messages.append(
            {"role": message["role"], "content": [_part(part["type"], part, made) for part in parts]}
        )
    return made


def from_visuals(visuals: Iterable[Any] | None, text: str) -> Conversation:
    """From what a simple task shows: all pictures and clips, then the text, in one turn."""
    made = Conversation([], [], [])
    parts = [_part(kind(visual), {"url": visual}, made) for visual in visuals or ()]
    made.messages.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
    return made


def _part(name: str, part: Mapping[str, Any], made: Conversation) -> dict[str, str]:
    if name == "text":
        return {"type": "text", "text": part["text"]}
    shown = {"image": made.images, "video": made.clips}.get(name)
    if shown is None:
        raise UnsupportedError(f"a task shows {name!r}; images and video work here")
    # a part that cuts a clip goes on whole, so that ``frames`` can refuse it
    shown.append(part if _cuts(part) else part["url"])
    return {"type": name}


def until(text: str, stops: str | Iterable[str] | None) -> str:
    """Cut at the first stop string; white space stops nothing, lmms-eval adds it to tasks without stops."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop.strip():
            text = text.split(stop)[0]
    return text


def _cuts(part: Mapping[str, Any]) -> list[str]:
    """Keys that ask for a part of a clip only."""
    return [
        key for key in ("video_start", "video_end", "start_time", "end_time") if part.get(key) is not None
    ]


def kind(visual: Any) -> str:
    """Image or video, or what a task calls it."""
    # a path may be of a picture or of a clip: its ending tells
    if isinstance(visual, Image.Image) or (
        isinstance(visual, str | Path) and Path(visual).suffix.lower() in _STILLS
    ):
        return "image"
    return visual.get("type", "video") if isinstance(visual, Mapping) else "video"


def picture(image: Any, mean: Sequence[float] | None = None) -> Image.Image:
    """An image as RGB; ``mean`` (0 to 1) is the colour to pad it to a square with."""
    if isinstance(image, str | Path):
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        raise EvaluationError(
            f"a task gave a {type(image).__name__} as image; expected a PIL image or the path of one"
        )
    image = image.convert("RGB")
    if mean is None or image.width == image.height:
        return image
    # the picture in the middle of a square of one colour
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def frames(clip: Any, most: int) -> np.ndarray:
    """(T, H, W, 3) uint8: at most ``most`` frames of a file or a list, at equal distances."""
    if isinstance(clip, Mapping):
        if _cuts(clip):
            raise UnsupportedError(
                f"a task shows a part of a clip ({', '.join(_cuts(clip))}); whole clips work here"
            )
        # keys under which tasks give the file
        clip = clip.get("url") or clip.get("path") or clip.get("video")
    if isinstance(clip, str | Path):
        if not Path(clip).is_file():
            raise EvaluationError(
                f"the clip {Path(clip).name!r} is not where its task says; fetch the videos of the data set"
            )
        from lmms_eval.models.model_utils.load_video import read_video

        return read_video(str(clip), num_frm=most)
    if not isinstance(clip, Sequence | np.ndarray) or not len(clip):
        raise EvaluationError(
            f"a task gave a {type(clip).__name__} as clip; expected the path of a file or its frames"
        )
    # unique: of a short clip a frame would come twice
    chosen = np.unique(np.linspace(0, len(clip) - 1, min(most, len(clip)), dtype=int))
    return np.stack(
        [np.asarray(picture(clip[i]) if isinstance(clip[i], Image.Image) else clip[i]) for i in chosen]
    )
