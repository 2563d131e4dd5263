# SPDX-License-Identifier: Apache-2.0
"""Pruning tax: what choosing the tokens costs, end to end.

    tax = time to first token with pruning at k tokens / time of the same model that is given k visual tokens
    for free

A tax of 1.00 means that scoring, selecting and cutting cost nothing. The model has the shape of LLaVA-1.5
(CLIP-L/14-336 tower, 576 visual tokens) and random weights: time does not depend on their values.

Timed in rounds, in rotating order; reported are medians, and for ratios the median over rounds of the ratio
within a round:

* dense: 576 encoded tokens, nothing attached.
* pruned: 576 encoded tokens, method attached: merge with the text, score, select, cut, language model, first
  token.
* free: the embeddings of text and kept (or merged) tokens are given; nothing is left but the language model
  and the first token.

The headline leaves the vision tower out of all three: pictures are encoded beforehand and passed as
``mm_encoder_outputs``. But capture (what a method reads while the tower runs, and the description of the
pictures) would then be missed. It is measured alone, as the median over rounds of ``get_image_features``
attached minus detached, and added to every pruned time ("capture_seconds"). That difference, about a
millisecond, would drown in the noise of 24 blocks; it is taken on a tower of the same width and length with
one block and a narrow feed-forward layer. Capture watches the attention of one block and the projector, so it
does the same work there. The ``*_with_vision`` figures need no such trick: pixels in, first token out.

"peak_extra_bytes" is the extra memory of capture for one image: live bytes are followed from one module of
the deep model to the next, attached and detached, and the largest difference at any place is reported, not
the difference of the two maxima, which would hide capture behind the feed-forward layers. "held_extra_bytes"
stays until the language model has run. On the CPU live tensors are counted, so scratch memory inside kernels
is not seen; on CUDA the allocator is asked.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn

import vlmprune
from vlmprune.errors import UnsupportedError, VlmPruneError
from vlmprune.speed.conditions import conditions, system_load
from vlmprune.speed.memory import memory_profile
from vlmprune.speed.timing import Entry, race, ratios, spread

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves the folder of a script out
from llava_shape import SIZES, TEXT, Prompt, build

SIDES = ("dense", "pruned", "free")


class EncodeOnly:
    """A session around encoders alone: left by ``with``, it would ask where the pictures went."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def __enter__(self) -> None:
        self.session.attach()

    def __exit__(self, *error: object) -> None:
        self.session.detach()


def capture_memory(session: Any, encode: Callable[[], Any], root: nn.Module, device: str) -> tuple[int, int]:
    """Extra bytes of encoding while attached: the most at any place, and what stays afterwards."""
    profiles = []
    for context in (nullcontext(), EncodeOnly(session)):
        with context:
            memory_profile(encode, root, device)  # a first run may fill caches
            profiles.append(memory_profile(encode, root, device))
    extra = [attached - bare for bare, attached in zip(*profiles, strict=True)]
    return max(extra), extra[-1]


def time_all(
    session: Any, watcher: Any, prompt: Prompt, tower: Prompt, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Everything that is measured, one value per round."""
    scores = []

    def pruned() -> None:
        prompt.merged()
        scores.append(session.last.seconds)

    how = {"warmup": options.warmup, "clock": options.clock}
    encoders: dict[str, Entry] = {
        "bare": (None, tower.encode),
        "watched": (EncodeOnly(watcher), tower.encode),
    }
    encodes = race(encoders, options.capture_repeats, **how)
    encoded: dict[str, Entry] = {
        "dense": (None, prompt.merged),
        "pruned": (session, pruned),
        "free": (None, prompt.given),
    }
    lists = race(encoded, options.repeats, **how)
    pixels: dict[str, Entry] = {
        "dense_with_vision": (None, prompt.from_pixels),
        "pruned_with_vision": (session, prompt.from_pixels),
        "free_with_vision": (None, prompt.given_from_pixels),
    }
    lists |= race(pixels, options.vision_repeats, **how)
    lists["score_seconds"] = scores[options.warmup :]
    lists["capture_seconds"] = [
        watched - bare for watched, bare in zip(encodes["watched"], encodes["bare"], strict=True)
    ]
    capture = median(lists["capture_seconds"])
    lists["pruned"] = [taken + capture for taken in lists["pruned"]]
    for end in ("", "_with_vision"):
        for name, above, below in (
            ("tax", "pruned", "free"),
            ("speedup", "dense", "pruned"),
            ("ideal_speedup", "dense", "free"),
        ):
            lists[name + end] = ratios(lists[above + end], lists[below + end])
    return lists


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The row of one spec."""
    size, dtype = SIZES[options.size], getattr(torch, options.dtype)
    model, shallow = build(size, options.device, dtype), build(size, options.device, dtype, shallow=True)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UnsupportedError(
            f"transformers {transformers.__version__} takes no mm_encoder_outputs; use 5.20 or newer"
        )
    session, watcher = (vlmprune.prune(m, options.prune, keep=options.keep) for m in (model, shallow))
    prompt = Prompt(model, size)
    kept = prompt.prepare(session)
    lists = time_all(session, watcher, prompt, Prompt(shallow, size), options)
    peak, held = capture_memory(session, prompt.encode, model.model, options.device)
    sides = [side + end for end in ("", "_with_vision") for side in SIDES]
    return {
        "spec": session.spec,
        "kept": kept,
        **{name: median(values) for name, values in lists.items() if name not in sides},
        "seconds": {side: median(lists[side]) for side in sides},
        "spreads": {name: spread(values) for name, values in lists.items()},
        "tax_of_fastest": min(lists["pruned"]) / min(lists["free"]),
        "peak_extra_bytes": peak,
        "held_extra_bytes": held,
        "logits_difference": prompt.difference(),
        "shape": {"tokens": size.tokens, "text_tokens": sum(TEXT), **asdict(size)},
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **{
            name: getattr(options, name)
            for name in ("dtype", "clock", "repeats", "vision_repeats", "capture_repeats", "warmup")
        },
    }


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the pruning tax of one spec, or of all methods.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prune", metavar="SPEC", help="such as fastervlm@64")
    what.add_argument(
        "--all",
        action="store_true",
        help="all methods in one interleaved run without the tower, which goes on where it was stopped: "
        "rounds are added to --out, and FILE.csv beside it is the table",
    )
    parser.add_argument("--keep", help="budget for a spec without one: 64 tokens, or 0.25 of them")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--size", default="small", choices=list(SIZES), help="7b: as LLaVA-1.5-7B; default small"
    )
    parser.add_argument("--repeats", type=_count, default=30, help="rounds without the vision tower")
    parser.add_argument("--vision-repeats", type=_count, help="rounds with it; default a third of --repeats")
    parser.add_argument(
        "--capture-repeats", type=_count, help="rounds for the cost of capture; default twice --repeats"
    )
    add_common_options(parser)
    options = parser.parse_args(words)
    if options.all and options.out is None:
        parser.error("--all needs --out FILE.jsonl, where the rounds are kept")
    options.vision_repeats = options.vision_repeats or -(-options.repeats // 3)
    options.capture_repeats = options.capture_repeats or 2 * options.repeats
    return options


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """How to measure, and where the row goes."""
    parser.add_argument("--warmup", type=_count, default=2, help="rounds that are not counted")
    parser.add_argument("--threads", type=_count, default=os.cpu_count(), help="default: all cores")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "process"],
        help="process: CPU seconds, for a busy machine",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON list that takes the row, in place of an older one like it",
    )
    parser.add_argument("--json", action="store_true", help="print the row as the last line")


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}; expected a number from 1")
    return int(word)


def save(row: dict[str, Any], path: Path) -> None:
    """Put the row into the list in ``path``, one line each."""
    like = ("spec", "device", "dtype", "threads", "clock", "shape")
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [old for old in rows if any(old[key] != row[key] for key in like)] + [row]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def main(words: list[str] | None = None) -> int:
    options = parse_arguments(words)
    try:
        if options.device == "cuda" and options.clock == "process":
            raise UnsupportedError(
                "--clock process counts CPU seconds, which say nothing about a GPU; use --clock wall"
            )
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError("--device cuda was asked for but torch sees no GPU; use --device cpu")
        torch.set_num_threads(options.threads)
        if options.all:
            import tax_all

            return tax_all.main(options)
        vlmprune.parse(options.prune)  # before the model is built
        start = conditions()
        row = measure(options) | start | {"load_after": system_load()}
    except VlmPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for side, end in (("without tower", ""), ("with tower", "_with_vision")):
        low, high = row["spreads"]["tax" + end]
        faster = (
            f"{row['speedup' + end]:.2f}x faster than dense, {row['ideal_speedup' + end]:.2f}x if choosing "
            "were free"
        )
        print(f"{row['spec']} {side}: tax {row['tax' + end]:.3f} (p20 {low:.3f}, p80 {high:.3f}); {faster}")
    took = f"{row['score_seconds'] * 1e3:.2f} ms to choose, {row['capture_seconds'] * 1e3:.2f} ms to capture"
    print(f"{took}, at most {row['peak_extra_bytes'] / 2**20:.2f} MiB extra")
    if options.out:
        save(row, options.out)
    if options.json:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
