# SPDX-License-Identifier: Apache-2.0
"""Time to the first token inside vLLM, dense against pruned in one engine, interleaved.

    python benchmarks/serving.py --model tiny --specs dense fastervlm@36 --rounds 5

One process, one engine, since specs are per request: what the machine does besides meets all specs alike.
Every round asks each spec once about a picture that is new, and once with another question about the same
picture, which is then in the encoder cache: the language model alone. Prefixes are not cached. Seconds are
wall clock and, where the engine is in this process, CPU time, which a busy machine changes little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np
from PIL import Image


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a name or folder for vLLM, or tiny")
    parser.add_argument("--specs", nargs="+", default=["dense", "fastervlm@36"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=336, help="of the random pictures, in pixels")
    parser.add_argument("--words", type=int, default=16, help="random text tokens behind the picture")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of vllm.LLM, as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    return parser.parse_args()


def build(options: argparse.Namespace) -> Any:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    from vlmprune.models.tiny import FOLDER
    from vlmprune.serving import overrides

    model = str(FOLDER) if options.model == "tiny" else options.model
    settings = {"enforce_eager": True, "enable_prefix_caching": False, **options.engine}
    return vllm.LLM(model, hf_overrides=overrides("dense"), dtype=options.dtype, **settings)


class Load:
    """Random pictures and text: what is seen does not change how long it takes."""

    def __init__(self, engine: Any, options: argparse.Namespace) -> None:
        import vllm

        self.engine, self.options = engine, options
        config = engine.llm_engine.model_config.hf_config
        self.image = getattr(config, "image_token_id", None) or config.image_token_index
        self.random = np.random.default_rng(0)
        self.one_token = vllm.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def picture(self) -> Image.Image:
        side = self.options.side
        return Image.fromarray(self.random.integers(0, 256, (side, side, 3), dtype=np.uint8))

    def ask(self, picture: Image.Image, spec: str) -> tuple[float, float, int]:
        """(wall seconds, CPU seconds, tokens of the prompt) to the first token."""
        words = self.random.integers(5, 40, self.options.words).tolist()
        request = {
            "prompt_token_ids": [self.image, *words],
            "multi_modal_data": {"image": picture},
            "mm_processor_kwargs": {"vlmprune": spec},
        }
        wall, cpu = time.perf_counter(), time.process_time()
        (output,) = self.engine.generate([request], self.one_token, use_tqdm=False)
        return time.perf_counter() - wall, time.process_time() - cpu, len(output.prompt_token_ids)


def measure(load: Load, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per spec: medians over the rounds."""
    seen: dict[tuple[str, str], list[tuple[float, float, int]]] = defaultdict(list)
    for number in range(options.rounds + 1):
        # another order in every round
        for spec in np.roll(options.specs, number).tolist():
            picture = load.picture()
            fresh, again = load.ask(picture, spec), load.ask(picture, spec)
            if number:  # the first round warms up
                seen[spec, "new"].append(fresh)
                seen[spec, "cached"].append(again)
    rows = []
    for spec in options.specs:
        row: dict[str, Any] = {"spec": spec, "prompt": seen[spec, "new"][0][2]}
        for kind in ("new", "cached"):
            row[f"{kind}_wall_s"] = statistics.median(one[0] for one in seen[spec, kind])
            row[f"{kind}_cpu_s"] = statistics.median(one[1] for one in seen[spec, kind])
        rows.append(row)
    return rows


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What pruning gains against the first spec, and where it does not pay."""
    base, lines = rows[0], []
    for row in rows[1:]:
        gains = {kind: base[f"{kind}_cpu_s"] / row[f"{kind}_cpu_s"] for kind in ("new", "cached")}
        pays = "" if min(gains.values()) > 1.02 else "; it does not pay here"
        lines.append(
            f"{row['spec']} against {base['spec']}: new picture {gains['new']:.2f}x, cached picture "
            f"{gains['cached']:.2f}x in CPU time{pays}"
        )
    return lines


def main() -> None:
    options = arguments()
    rows = measure(Load(build(options), options), options)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'spec':24} {'prompt':>7} {'new, CPU ms':>12} {'cached, CPU ms':>15} {'new, wall ms':>13}")
    for row in rows:
        times = [1000 * row[name] for name in ("new_cpu_s", "cached_cpu_s", "new_wall_s")]
        print(f"{row['spec']:24} {row['prompt']:7} {times[0]:12.1f} {times[1]:15.1f} {times[2]:13.1f}")
    print("\n".join(verdict(rows)))


if __name__ == "__main__":
    main()
