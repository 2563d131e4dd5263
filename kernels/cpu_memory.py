# SPDX-License-Identifier: Apache-2.0
"""One greedy choice among 100,000 tokens, alone in this process: CPU seconds and peak memory, as JSON.

    python kernels/cpu_memory.py argmax    # or nn, which compares all pairs for the first pick; or dpp

A matrix of all similarities would take 37 GiB. The peak includes torch and the features, 98 MiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import torch

from vlmprune.kernels import dispatch

N, K, WIDTH = 100_000, 1_000, 256
WALKS = ("argmax", "nn", "dpp")


def run(walk: str) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(1, N, WIDTH, generator=generator), dim=-1)
    weight = torch.rand(1, N, generator=generator)
    start = time.process_time()
    if walk == "dpp":
        order, _ = dispatch.greedy_dpp_features(x, weight, K)
    else:
        order, _ = dispatch.greedy_maxmin_features(x, K, weight if walk == "argmax" else None, walk)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    shape = f"N={N} k={K} D={WIDTH}"
    return {
        "shape": shape,
        "seconds": round(seconds, 1),
        "peak_mib": round(peak),
        "distinct": len(set(order[0].tolist())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("walk", choices=WALKS)
    torch.set_num_threads(1)
    print(json.dumps(run(parser.parse_args().walk)))


if __name__ == "__main__":
    main()
