# SPDX-License-Identifier: Apache-2.0
"""Measure the Triton kernels on this GPU against what torch offers, in about 20 minutes.

    python kernels/bench_gpu.py                      # writes kernels/results/<gpu>.csv python
    kernels/bench_gpu.py --only prune select  # some sections; nothing is written python kernels/bench_gpu.py
    --dry-run            # no GPU: every variant once, on tiny inputs; not a measurement

Variants of a case take turns, round by round, over rotating sets of fresh inputs that together exceed the L2
cache. gpu: time of one call in a captured graph of many. host: until a call returns, on an idle queue. wall:
until its result is there. Each is the median over rounds with the 20th and 80th percentile. `ours again`
repeats `ours`: what differs there is noise.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))  # not the root, see CONTRIBUTING.md
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
if find_spec("triton") is None:
    sys.exit("error: Triton is not installed, and this script runs its kernels: pip install triton")

import torch
import triton
import triton.language as tl
from gpu_clock import DRY, Case, rows

from vlmprune.kernels import triton as ops
from vlmprune.kernels.triton import dpp, gather, maxmin
from vlmprune.kernels.triton import select as selection

HERE = Path(__file__).resolve().parent
DEVICE = "cpu" if DRY else "cuda"
HALF = torch.bfloat16


def size(n: int, tiny: int) -> int:
    return tiny if DRY else n


def some(table: tuple | list) -> tuple | list:
    """All of it, or two of it in a dry run."""
    return table[-2:] if DRY else table


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def changed(module, name: str, value) -> Callable:
    """A variant of calls: with another entry in the launch table."""

    def wrap(call: Callable) -> Callable:
        def run(*args):
            with mock.patch.object(module, name, value):
                return call(*args)

        return run

    return wrap


# --- sections of the checklist --------------------------------------------------------------------


@triton.jit
def nothing_kernel(x):
    pass


@triton.jit
def touch_kernel(x):
    at = tl.arange(0, 1024)
    tl.store(x + at, tl.load(x + at) + 1)


def floors() -> Iterator[Case]:
    one = {
        "empty kernel": lambda x: nothing_kernel[(1,)](x),
        "one program, load and store": lambda x: touch_kernel[(1,)](x),
    }
    yield Case("floors", "launch", lambda: (rand(1024),), one)
    for mb in (1, 16, 256):
        elements = size(mb * 2**19, 2048)
        yield Case(
            "floors",
            f"copy {mb} MB",
            lambda n=elements: (rand(n, dtype=HALF),),
            {"clone": torch.clone},
            4 * elements,
        )


def select() -> Iterator[Case]:
    for batch in (1, 64):
        batch = size(batch, 1)
        for n in some((576, 1024, 2880, 4096, 8192, 100_000)):
            n, k = size(n, 40), size(n // 9, 4)
            variants = {
                "ours": lambda s, k=k: ops.topk_select(s, k),
                "ours again": lambda s, k=k: ops.topk_select(s, k),
            }
            for warps in (1, 2, 4, 8, 16) if n <= 8192 else ():
                if n // (32 * warps) <= 128:
                    variants[f"ours, {warps} warps"] = changed(selection, "warps", lambda block, w=warps: w)(
                        variants["ours"]
                    )
            variants |= {
                "topk": lambda s, k=k: s.topk(k).indices,
                "topk, sort": lambda s, k=k: s.topk(k, sorted=False).indices.sort(-1).values,
                "stable sort": lambda s, k=k: (
                    torch.sort(s, dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values
                ),
                "FlashInfer": lambda s, k=k: flashinfer_top_k(s, k),
            }
            moved = batch * 4 * (n + k)
            yield Case(
                "select",
                f"B={batch} N={n} k={k}",
                lambda b=batch, n=n: (rand(b, n).softmax(-1),),
                variants,
                moved,
            )
    ties = {"ours": lambda s: ops.topk_select(s, 100)}
    yield Case(
        "select", "N=100000, few distinct values", lambda: (rand(1, size(100_000, 9000)).round(),), ties
    )


def flashinfer_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    import flashinfer

    return flashinfer.top_k(scores, k, deterministic=True)[1]


def gather_chain(s, x, k):
    idx = s.topk(k, sorted=False).indices.sort(-1).values
    return x.gather(1, idx[..., None].expand(-1, -1, x.shape[-1]))


def index_chain(s, x, k):
    idx = s.topk(k, sorted=False).indices.sort(-1).values
    rows = idx + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(x.shape[0], k, -1)


def prune() -> Iterator[Case]:
    table = [
        (1, 576, 64, 1024),
        (1, 576, 64, 4096),
        (1, 576, 192, 4096),
        (16, 576, 64, 4096),
        (64, 576, 64, 4096),
        (1, 2880, 320, 4096),
        (1, 2880, 640, 4096),
        (8, 2880, 640, 4096),
        (64, 2880, 640, 4096),
        (1, 2880, 640, 8192),
        (1, 4096, 1024, 3584),
        (1, 6272, 1568, 3584),
        (1, 100_000, 10_000, 3584),
    ]
    compiled = None if DRY else torch.compile(gather_chain, mode="max-autotune-no-cudagraphs", dynamic=False)
    for batch, n, k, width in some(table):
        batch, n, k, width = size(batch, 1), size(n, 40), size(k, 4), size(width, 32)
        ours = lambda s, x, k=k, form="auto": ops.prune(s, k, [x], form=form)  # noqa: E731
        variants = {"ours": ours, "ours again": ours}
        variants |= {
            f"ours, {form}": (lambda s, x, k=k, f=form: ops.prune(s, k, [x], form=f))
            for form in ("fused", "two")
        }
        for kb in (8, 16, 64, 128):
            variants[f"ours, slices of {kb} KB"] = changed(gather, "SLICE", kb * 1024)(ours)
        variants |= {
            "topk, sort, gather": lambda s, x, k=k: gather_chain(s, x, k),
            "topk, sort, index_select": lambda s, x, k=k: index_chain(s, x, k),
            "FlashInfer, gather_rows": lambda s, x, k=k: ops.gather_rows(
                [x], flashinfer_top_k(s, k).int().sort(-1).values
            ),
            "copy of the same bytes": lambda s, x, k=k: x[:, :k].clone(),
        }
        if compiled:
            variants["torch.compile"] = lambda s, x, k=k: compiled(s, x, k)
        moved = batch * (4 * n + 4 * k + 2 * k * width * HALF.itemsize)

        def make(batch=batch, n=n, width=width):
            return rand(batch, n), rand(batch, n, width, dtype=HALF)

        yield Case("prune", f"B={batch} N={n} k={k} D={width}", make, variants, moved)


def maxmin_loop(sim: torch.Tensor, k: int) -> torch.Tensor:
    """A lean loop of torch calls, five a pick."""
    best = sim.clone()
    best.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    best, order = best.amax(-1), []
    for step in range(k):
        pick = best.argmin(-1, keepdim=True)
        row = sim.gather(1, pick[..., None].expand(-1, -1, sim.shape[-1]))[:, 0]
        best = (row if step == 0 else torch.maximum(best, row)).scatter(1, pick, torch.inf)
        best = best if not order else best.scatter(1, torch.cat(order, 1), torch.inf)
        order.append(pick)
    return torch.cat(order, 1)


def unit_gram(n: int, batch: int = 1) -> torch.Tensor:
    x = torch.nn.functional.normalize(rand(batch, n, 64), dim=-1)
    return x @ x.transpose(1, 2)


def greedy() -> Iterator[Case]:
    from vlmprune.kernels import reference

    maxmin_steps, dpp_steps = changed(maxmin, "MAX_BLOCK", 0), changed(dpp, "_BLOCK", 0)
    for n, k in some(((576, 64), (576, 192), (2880, 640))):
        n, k = size(n, 24), size(k, 4)
        ours = lambda sim, k=k: ops.greedy_maxmin(sim, k)  # noqa: E731
        variants = {"ours": ours, "ours again": ours, "ours, a launch per pick": maxmin_steps(ours)}
        variants["torch loop"] = lambda sim, k=k: maxmin_loop(sim, k)
        yield Case("greedy", f"maxmin N={n} k={k}", lambda n=n: (unit_gram(n),), variants, 4 * n * k)
        relevance = torch.rand(1, n, device=DEVICE) + 0.1
        ours = lambda sim, k=k, r=relevance: ops.greedy_dpp(sim, r, k)  # noqa: E731
        single = changed(dpp, "_HISTORY", 2**40)
        variants = {
            "ours": ours,
            "ours again": ours,
            "ours, one launch": single(ours),
            "ours, a launch per pick": dpp_steps(ours),
        }
        variants["torch loop"] = lambda sim, k=k, r=relevance: reference.greedy_dpp(sim, r, k)
        yield Case("greedy", f"dpp N={n} k={k}", lambda n=n: (unit_gram(n),), variants)
    n, k, width = size(100_000, 40), size(1000, 4), size(256, 16)
    name, streaming = f"maxmin by features N={n} k={k}", {"ours": lambda x: ops.greedy_maxmin_features(x, k)}
    yield Case(
        "greedy",
        name,
        lambda: (torch.nn.functional.normalize(rand(1, n, width), dim=-1),),
        streaming,
        graph=False,
    )


def sensitivity() -> Iterator[Case]:
    n, width = size(576, 8), size(4096, 32)
    matrix = rand(width, width, dtype=HALF)
    variants = {
        "ours": lambda g: ops.zoo_sensitivity(g, matrix),
        "torch": lambda g: ((g @ matrix).float() * g).sum(-1),
    }
    yield Case("sensitivity", f"N={n} H={width}", lambda: (rand(1, n, width, dtype=HALF),), variants)


SECTIONS = {f.__name__: f for f in (floors, select, prune, greedy, sensitivity)}


# --- what is written ------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    known = {name: importlib.metadata.version(name) for name in ("torch", "triton", "vlmprune")}
    run = lambda command: subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: E731
    return {
        "gpu": "none (dry run)" if DRY else torch.cuda.get_device_name(),
        "driver": "" if DRY else run(smi),
        "cuda": str(torch.version.cuda),
        **known,
        "python": platform.python_version(),
        "commit": run(git),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--dry-run", action="store_true", help="run every variant once without a GPU; writes nothing"
    )
    only = parser.parse_args().only
    if not DRY and not torch.cuda.is_available():
        print("no CUDA device; --dry-run checks this script without one", file=sys.stderr)
        return 2
    table, facts = [], machine()
    with torch.inference_mode() if not DRY else nullcontext():
        for section in only:
            for case in SECTIONS[section]():
                for row in rows(case):
                    table.append({**row, **facts})
                    times = f"gpu {row['gpu_us_p50']:>9} us  host {row['host_us_p50']:>9} us"
                    what = "DRY RUN, not a measurement" if DRY else times
                    print(
                        f"{section:11s} {case.name:34s} {row['variant']:30s} {what} {row['note']}", flush=True
                    )
    if DRY or only != list(SECTIONS):
        print(f"{len(table)} rows, not written")
        return 0
    path = HERE / "results" / f"{facts['gpu'].replace(' ', '-').replace('/', '-')}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(f"wrote {path.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
