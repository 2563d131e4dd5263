# SPDX-License-Identifier: Apache-2.0
"""Read a clip from a file: a few frames, evenly spread over all of it; needs PyAV (the extra [video]).

Of N frames each is what the clip shows in the middle of one of N equal parts of its length. Long clips are
read by seeking, so that three hours take as long as three minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import check_int
from .errors import SpecError, UnsupportedError

if TYPE_CHECKING:
    from PIL import Image

FRAMES = 8  # of a clip, where nobody says how many
ENDINGS = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".ogv",
    ".wmv",
    ".flv",
    ".3gp",
)
_FAR = 10.0  # seconds: nearer frames are reached by decoding on, farther ones by seeking
_LATE = 0.1  # of the length: pictures that end so much too early are those of a file that was cut off


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a clip.

    Args:
        path: of the file.
        frames: upright RGB pictures, all different moments, in order.
        times: seconds from the start at which each frame came up.
        seconds: length of the clip.
        wanted: frames that were asked for; a short clip shows fewer.
    """

    path: str
    frames: list[Image.Image] = field(repr=False)
    times: list[float]
    seconds: float
    wanted: int

    @property
    def sampling(self) -> str:
        """What was read of how much, in words."""
        length, count = clock(self.seconds), len(self.frames)
        if count < self.wanted:
            return f"{count} of {self.wanted} frames asked for: {length} of this clip show no more"
        if count == 1:
            return f"1 frame, from the middle of {length}"
        return f"{count} frames of {length}, one every {clock(self.seconds / count)}"


def clock(seconds: float) -> str:
    """``0:07.5`` or ``3:00:00``."""
    tenths = round(10 * seconds)
    whole, part = divmod(tenths, 10)
    minutes, second = divmod(whole, 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
    return f"{minutes}:{second:02}.{part}"


def is_clip(path: str) -> bool:
    """Whether the name of a file says that it is a clip."""
    return path.lower().endswith(ENDINGS)


def read_clip(path: str, count: int = FRAMES) -> Clip:
    """At most ``count`` frames of a clip, evenly spread; a file that is broken or breaks off is refused."""
    check_int("frames", count, least=1)
    if "://" in path or not Path(path).is_file():
        raise SpecError(f"no file at {path!r}; expected the path of a clip: a URL is not read, download it")
    try:
        import av
    except ImportError as error:
        raise UnsupportedError(
            f"reading {path!r} needs PyAV, which is not here ({error}); install it: pip install -e '.[video]'"
        ) from error
    try:
        # a playlist inside of the file must not make this reach into the network
        with av.open(path, options={"protocol_whitelist": "file"}) as container:
            reader = _Reader(path, container)
            seconds = reader.length()
            found = [reader.at((i + 0.5) / count * seconds, seconds) for i in range(count)]
    except av.FFmpegError as error:
        raise SpecError(
            f"{path!r} cannot be read as a clip ({error.strerror}); expected a whole video file"
        ) from error
    kept = {frame.pts: frame for frame in found}
    return Clip(
        path,
        [_upright(frame) for frame in kept.values()],
        [max(0.0, reader.time(frame)) for frame in kept.values()],
        seconds,
        count,
    )


def _upright(frame: Any) -> Image.Image:
    """RGB, turned as players turn it: telephones store portrait clips lying down."""
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


class _Reader:
    """Walks over the frames of the first video stream of an open file, forwards only."""

    def __init__(self, path: str, container: Any) -> None:
        import av

        covers = av.stream.Disposition.attached_pic
        streams = [one for one in container.streams.video if not one.disposition & covers]
        if not streams:
            raise SpecError(f"{path!r} holds no moving pictures; expected a video file")
        self.path, self.container, self.stream = path, container, streams[0]
        self.stream.thread_type = "AUTO"
        self.unit = float(self.stream.time_base)
        self.first = (self.stream.start_time or 0) * self.unit
        self.frames: Iterator[Any] = iter(())
        self.now: Any = None  # what the clip shows where the walk stands
        self.next: Any = None

    def time(self, frame: Any) -> float:
        """Seconds from the start."""
        if frame.pts is None:
            raise SpecError(
                f"{self.path!r} does not say when its frames are shown, as raw streams do not; put it into a "
                "container such as .mp4"
            )
        return frame.pts * self.unit - self.first

    def length(self) -> float:
        """Seconds that the clip lasts: as the file says, or else as its packets do."""
        if self.stream.duration:
            return float(self.stream.duration) * self.unit
        if self.container.duration:
            return self.container.duration / 1e6
        ends = [
            (packet.pts + (packet.duration or 0)) * self.unit - self.first
            for packet in self.container.demux(self.stream)
            if packet.pts is not None
        ]
        if not ends:
            raise SpecError(f"{self.path!r} holds no frames; expected a clip with one at least")
        self.container.seek(0)
        return max(ends)

    def at(self, moment: float, seconds: float) -> Any:
        """The frame that is shown at a moment, which may not lie before the last one."""
        reached = self.now or self.next
        if reached is None or moment - self.time(reached) > _FAR:
            self.container.seek(int((moment + self.first) / self.unit), stream=self.stream)
            self.frames = self.container.decode(self.stream)
            self.now, self.next = None, next(self.frames, None)
        while self.next is not None and (self.now is None or self.time(self.next) <= moment):
            self.now, self.next = self.next, next(self.frames, None)
        if self.now is None:
            raise SpecError(f"{self.path!r} shows nothing at {clock(moment)}; expected a clip with frames")
        shown = self.time(self.now) + (self.now.duration or 0) * self.unit
        if self.next is None and moment > shown + _LATE * seconds:
            raise SpecError(
                f"{self.path!r} says that it lasts {clock(seconds)}, and its pictures end at {clock(shown)}: "
                "it is broken off; get the whole file, or cut it to what is there"
            )
        return self.now
