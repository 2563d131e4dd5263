# SPDX-License-Identifier: Apache-2.0
"""What choosing costs in clips: seconds of one thread, and the most bytes held at a time, by frames.

    python benchmarks/clips.py                          # 64 frames of 196 tokens, as wide as a small decoder
    python benchmarks/clips.py --frames 512 --width 128 # 100,352 tokens
    python benchmarks/clips.py --out clips.json

The clip is made of scenes of eight frames in which two places of three stand still, so that methods that
average what stands still have work to do. Process time, the least of three rounds; the clip itself is not
counted among the bytes. No model runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.registry import get, list_methods
from vlmprune.speed.memory import LiveBytes

SCENE = 8  # frames
ROUNDS = 3
BASELINES = ("random", "uniform", "pool")


def clip_of(frames: int, tokens: int, width: int) -> VisualTokens:
    """One clip, on the CPU, in float32."""
    random = torch.Generator().manual_seed(0)
    scenes = torch.randn(-(-frames // SCENE), tokens, width, generator=random)
    x = scenes.repeat_interleave(SCENE, dim=0)[:frames].clone()
    loud = torch.full((tokens, 1), 0.05)
    loud[::3] = 1.0
    for frame in x:  # one by one: a second clip of noise would not fit beside a long one
        frame += loud * torch.randn(tokens, width, generator=random)
    side = int(tokens**0.5)
    grid = (side, side) if side * side == tokens else (1, tokens)
    return VisualTokens(
        features=x.flatten(0, 1)[None],
        received_attention=torch.rand(1, frames * tokens, generator=random),
        grids=(grid,) * frames,
        frames=True,
    )


def measure(name: str, clip: VisualTokens, share: float) -> dict[str, Any]:
    """Seconds and bytes of one method that keeps this share of the clip."""
    method, keep, took = get(name)(), round(share * clip.count), []
    with torch.no_grad():
        for _ in range(ROUNDS):
            started = time.process_time()
            choose(method, clip, keep)
            took.append(time.process_time() - started)
        with LiveBytes() as live:
            choose(method, clip, keep)
    return {"method": name, "keep": keep, "seconds": round(min(took), 3), "bytes": live.peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=196, help="of a frame")
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--keep", type=float, default=0.3, help="share of the tokens")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    of_clips = [name for name in list_methods() if get(name).clips]
    clip = clip_of(options.frames, options.tokens, options.width)
    rows = []
    for name in options.methods or [*of_clips, *BASELINES]:
        rows.append(measure(name, clip, options.keep))
        print(f"{name:10} {rows[-1]['seconds']:8.3f} s {rows[-1]['bytes'] / 2**20:9.1f} MiB", flush=True)
    if options.out is not None:
        conditions = {
            "frames": options.frames,
            "tokens": options.tokens,
            "width": options.width,
            "threads": 1,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        options.out.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
