# SPDX-License-Identifier: Apache-2.0
"""What methods that act inside the language model cost, end to end: time to first token, pictures encoded
beforehand.

Methods that cut there, such as fastv, have a tax:

    tax = attached / ideal

* dense: 576 encoded tokens, nothing attached.
* attached: the same with the method attached.
* ideal: a plain loop over the decoder layers, whose cuts are given: layers before the first cut read
  everything, later ones the very rows that the method keeps, at the positions that it gives them. The
  embeddings are given as well, and no mask is made, so merging text and picture and making masks counts
  against the method.

Methods that edit attention, such as var, have an overhead instead: attached / dense - 1. "edited_share" says
in how many of the (layer, head, row) triples shown to the method it changed anything: an overhead means
nothing where that is none.

All sides fill a KV cache, run the model's own modules and end with the first token on the host. Timed in
rounds, in rotating order; reported are medians, and for ratios the median over rounds of the ratio within a
round. Nothing is timed while the picture is encoded: these methods read nothing of the tower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from copy import copy
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import vlmprune
from vlmprune.errors import UnsupportedError, VlmPruneError
from vlmprune.speed.conditions import conditions, system_load
from vlmprune.speed.timing import Entry, race, ratios, spread

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves the folder of a script out
from llava_shape import SIZES, TEXT, Prompt, build
from tax import _count, add_common_options, save


def edited_share(session: Any, prompt: Prompt) -> float:
    """Share of the (layer, head, row) triples shown to the method in which it changes the attention."""
    host, method, seen = session.slots["attention"], session.slots["attention"].method, Counter[str]()

    class Watched(type(method)):  # type: ignore[misc]
        name = method.name

        def reweight(self, attention: Tensor, marked: Tensor, visual: Tensor) -> Tensor:
            new = super().reweight(attention, marked, visual)
            changed = (new != attention).any(dim=-1)  # (B, H, R)
            seen.update(edited=int(changed.sum()), shown=changed.numel())
            return new

    watched = copy(method)
    object.__setattr__(watched, "__class__", Watched)  # methods are frozen
    host.method = watched
    try:
        with session:
            prompt.merged()
    finally:
        host.method = method
    return seen["edited"] / seen["shown"]


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The row of one spec."""
    size = SIZES[options.size]
    model = build(size, options.device, getattr(torch, options.dtype))
    session = vlmprune.prune(model, options.spec)
    if len(session.slots) != 1 or "before_lm" in session.slots:
        raise UnsupportedError(
            f"{session.spec!r} is not one method that acts inside the language model; tax.py measures the "
            "others"
        )
    prompt = Prompt(model, size)
    prompt.prepare(session)
    entries: dict[str, Entry] = {"dense": (None, prompt.merged), "attached": (session, prompt.merged)}
    report = {"tokens_per_layer": session.last.tokens_per_layer}
    if "inside_lm" in session.slots:
        entries["ideal"] = (None, prompt.given)
        sides = {
            "tax": ("attached", "ideal"),
            "speedup": ("dense", "attached"),
            "ideal_speedup": ("dense", "ideal"),
        }
        report["logits_difference"] = prompt.difference()
    else:
        sides = {"overhead": ("attached", "dense")}
        report["logits_change"] = (prompt.merged() - prompt.free.logits).abs().max().item()
        if session.method.kind() == "reweight":
            report["edited_share"] = edited_share(session, prompt)
    seconds = race(entries, options.repeats, warmup=options.warmup, clock=options.clock)
    lists = {name: ratios(seconds[x], seconds[y]) for name, (x, y) in sides.items()}
    if "overhead" in lists:
        lists["overhead"] = [ratio - 1 for ratio in lists["overhead"]]
    return {
        "spec": session.spec,
        **{name: median(values) for name, values in lists.items()},
        "seconds": {side: median(values) for side, values in seconds.items()},
        "spreads": {name: spread(values) for name, values in (lists | seconds).items()},
        **report,
        "shape": {"tokens": size.tokens, "text_tokens": sum(TEXT), **asdict(size)},
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **{name: getattr(options, name) for name in ("dtype", "clock", "repeats", "warmup")},
    }


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what one method inside the language model costs.")
    parser.add_argument("--spec", required=True, help="such as 'fastv(layer=2)@64'")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--size", default="small", choices=list(SIZES), help="7b: as LLaVA-1.5-7B; default small"
    )
    parser.add_argument("--repeats", type=_count, default=15, help="rounds")
    add_common_options(parser)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = parse_arguments(words)
    try:
        if options.device == "cuda" and (options.clock == "process" or not torch.cuda.is_available()):
            raise UnsupportedError(
                "--device cuda needs a GPU that torch sees, and --clock wall: CPU seconds say nothing about "
                "it"
            )
        vlmprune.parse(options.spec)  # before the model is built
        torch.set_num_threads(options.threads)
        start = conditions()
        row = measure(options) | start | {"load_after": system_load()}
    except VlmPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "tax" in row:
        low, high = row["spreads"]["tax"]
        faster = f"{row['speedup']:.2f}x faster than dense, {row['ideal_speedup']:.2f}x if choosing were free"
        print(f"{row['spec']}: tax {row['tax']:.3f} (p20 {low:.3f}, p80 {high:.3f}); {faster}")
    else:
        low, high = row["spreads"]["overhead"]
        share = f"; edits {row['edited_share']:.1%} of what it is shown" if "edited_share" in row else ""
        print(f"{row['spec']}: overhead {row['overhead']:.1%} (p20 {low:.1%}, p80 {high:.1%}){share}")
    if options.out:
        save(row, options.out)
    if options.json:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
