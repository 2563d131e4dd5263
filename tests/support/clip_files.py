# SPDX-License-Identifier: Apache-2.0
"""Small video files, written by PyAV: every frame has a colour of its own, which says which one it is."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

SIZE = (64, 48)  # width, height


def shade(number: int, count: int) -> int:
    """Grey level of a frame, far enough from that of the next one to survive compression."""
    return round(16 + 224 * number / max(count - 1, 1))


def picture(number: int, count: int) -> np.ndarray:
    """(48, 64, 3): the frame, darker in its right half."""
    made = np.full((SIZE[1], SIZE[0], 3), shade(number, count), dtype=np.uint8)
    made[:, SIZE[0] // 2 :] //= 2
    return made


def number_of(frame: Any, count: int) -> int:
    """Which frame a picture is, told by its left half."""
    pixels = np.asarray(frame.convert("L"), dtype=float)
    level = pixels[:, : pixels.shape[1] // 2 - 4].mean()
    return round((level - 16) * max(count - 1, 1) / 224)


def write_clip(path: Path, count: int, rate: Fraction | int = 10, codec: str = "mpeg4") -> Path:
    """A file of so many frames, ``rate`` a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, count), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A file of one second of sound and no pictures."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def lie_down(path: Path) -> None:
    """Mark an .mp4 as telephones mark portrait clips: players turn it by 90 degrees, clockwise."""
    made = bytearray(path.read_bytes())
    matrix = made.index(b"tkhd") + 4 + 40  # behind times, length and layer
    turned = [0, 1 << 16, 0, -(1 << 16) & 0xFFFFFFFF, 0, 0, 0, 0, 1 << 30]
    made[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big") for value in turned)
    path.write_bytes(made)
