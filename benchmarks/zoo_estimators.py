# SPDX-License-Identifier: Apache-2.0
"""How the estimators of ZOO-Prune rank tokens, against the paper's with 1024 directions; on the CPU, no
download.

Projectors: those of the tiny models (random weights, tokens from the tiny vision tower), and random
Linear-GELU-Linear maps whose singular values fall as i^-alpha, up to the shape of LLaVA-1.5-7B. No trained
projector is among them.

For each estimator: the rank correlation of sensitivities (Spearman), and the share of kept tokens in common
at one ninth of the tokens. "zo" and "jvp" have 64 directions of another seed than the reference; "jvp_same"
has those of the reference. At the shape of LLaVA-1.5 the reference is "jvp" with 1024 directions, which is
2.5 times cheaper than "zo" with the same directions.

    python benchmarks/zoo_estimators.py --out benchmarks/results/zoo_estimators.json       # some twenty
    minutes on one core python benchmarks/zoo_estimators.py --small
    # without the LLaVA-1.5 shape
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmprune.methods.zooprune import hybrid_greedy, scaled
from vlmprune.methods.zooprune.sensitivity import closed_form, directional, finite_difference, unit_directions
from vlmprune.testing.tiny import tiny_inputs, tiny_model

M, REFERENCE, STEP = 64, 1024, 0.01
ALPHAS = (0.0, 0.5, 1.0, 1.5)


def tiny_cases() -> Iterator[tuple[str, nn.Module, Tensor]]:
    for family in ("llava", "llava_next", "llava_onevision", "vipllava"):
        model, given = tiny_model(family), []
        hook = model.model.multi_modal_projector.register_forward_hook(
            lambda module, args, output, given=given: given.append(args[0])
        )
        with torch.no_grad():
            model(**tiny_inputs(family, images=(4, 4)))
        hook.remove()
        x = torch.cat([part.flatten(0, -2) for part in given])[None]
        yield f"tiny {family}", model.model.multi_modal_projector, x


def synthetic_cases(small: bool) -> Iterator[tuple[str, nn.Module, Tensor]]:
    shapes = [(64, 128, 576), (256, 1024, 288)] + [(1024, 4096, 144)] * (not small)
    for width, hidden, tokens in shapes:
        for alpha in ALPHAS:
            torch.manual_seed(0)
            projector = nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
            ).requires_grad_(False)
            for layer in (projector[0], projector[2]):
                fill(layer.weight, alpha)
            yield f"{width}-{hidden}-{hidden}, alpha {alpha}", projector, torch.randn(1, tokens, width)


def fill(weight: Tensor, alpha: float) -> None:
    """Singular values in proportion to i^-alpha, and outputs of about unit size for unit inputs."""
    rows, cols = weight.shape
    size = min(rows, cols)
    left, right = (torch.linalg.qr(torch.randn(side, size))[0] for side in (rows, cols))
    weight.copy_((left * torch.arange(1, size + 1) ** -alpha) @ right.T)
    weight.mul_(math.sqrt(rows) / weight.norm())


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def measure(name: str, projector: nn.Module, x: Tensor) -> dict:
    started, (width, tokens) = time.perf_counter(), (x.shape[-1], x.shape[1])
    many, few = unit_directions(REFERENCE, width, seed=1), unit_directions(M, width, seed=0)
    large = width >= 1024
    reference = directional(projector, x, many) if large else finite_difference(projector, x, many, STEP)
    found = {
        "exact": closed_form(projector, x),
        "zo": finite_difference(projector, x, few, STEP),
        "jvp": directional(projector, x, few),
        "jvp_same": reference if large else directional(projector, x, many),
        "norm": projector(x).norm(dim=-1),
    }
    k = max(1, tokens // 9)
    picks = {
        key: set(hybrid_greedy(scaled(s), projector(x), k)[0][0].tolist())
        for key, s in {**found, "reference": reference}.items()
    }
    row = {
        "projector": name,
        "tokens": tokens,
        "spread": round((reference.max() / reference.min()).item(), 3),
        "keep": k,
    }
    row["spearman"] = {key: round(spearman(s[0], reference[0]), 5) for key, s in found.items()}
    row["kept_in_common"] = {key: round(len(picks[key] & picks["reference"]) / k, 3) for key in found}
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="leave out the LLaVA-1.5 shape")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows = []
    with torch.no_grad():
        for case in (*tiny_cases(), *synthetic_cases(options.small)):
            rows.append(measure(*case))
            print(json.dumps(rows[-1]), flush=True)
    conditions = {
        "reference": f"zo, m={REFERENCE}, h={STEP}",
        "m": M,
        "dtype": "float32",
        "device": "cpu",
        "torch": torch.__version__,
    }
    conditions |= {
        "machine": platform.machine(),
        "command": "python benchmarks/zoo_estimators.py" + " --small" * options.small,
    }
    if options.out:
        options.out.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
