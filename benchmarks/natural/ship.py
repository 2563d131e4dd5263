# SPDX-License-Identifier: Apache-2.0
"""Write the model of a run as the files of the package, with what was measured on them:
``python benchmarks/natural/ship.py RUN_FOLDER OUT``. Of the second architecture only its files, with
``--bare``; its processor needs torchvision.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # PYTHONSAFEPATH leaves the folder of a script out
sys.path.append(str(HERE.parent / "tiny"))  # files.py: what transformers reads; shipping.py: what a card says

from files import write  # noqa: E402
from model import ROPE_THETA, Natural, processor  # noqa: E402
from properties import properties  # noqa: E402
from qwen import NaturalQwen, build_processor  # noqa: E402
from shipping import bullets, by_stage, finish, making, table, told  # noqa: E402

from vlmprune.evaluation.leaderboard.config import Config  # noqa: E402
from vlmprune.evaluation.leaderboard.run import Settings, leaderboard  # noqa: E402
from vlmprune.evaluation.stats.ranks import spearman  # noqa: E402
from vlmprune.evaluation.tasks.scenes import scenes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
HALVES = ROOT / "vlmprune" / "evaluation" / "tasks" / "scenes" / "designed_with.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=600, help="Test questions of the comparison.")
    parser.add_argument("--inside", type=int, default=120, help="Test questions whose attention is measured.")
    parser.add_argument(
        "--keep", type=int, nargs="+", default=[16, 32, 48], help="Budgets of the comparison."
    )
    parser.add_argument("--bare", action="store_true", help="Write the model alone: nothing is measured.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = making(options.folder)
    second = made["recipe"].get("architecture") == "qwen2_vl"
    if second and not options.bare:
        parser.error("there is no card of the second architecture; write its files alone with --bare")
    net = (NaturalQwen if second else Natural)(made["recipe"]["seed"])
    net.load_state_dict(torch.load(options.folder / "joint.pt", weights_only=True)["net"])
    if second:
        net.qwen.save_pretrained(options.out)
        build_processor().save_pretrained(options.out)
        return
    write(net.llava, processor(), options.out, ROPE_THETA)
    if options.bare:
        return
    found = {
        **made,
        "log": by_stage(made["log"]),
        "properties": properties(options.out, options.inside),
        "keep": options.keep,
        **compared(options.out, options.folder / "board", options.limit, options.keep),
    }
    finish(options.out, found, card(found))


def compared(model: Path, board: Path, limit: int, keep: list[int]) -> dict[str, Any]:
    """Rows of a leaderboard over the methods of both halves: accuracy, share of dense, interval."""
    halves = json.loads(HALVES.read_text())["natural"]
    names = [name for name in halves["designed_with"] + halves["held_out"] if name != "random"]
    config = Config.of(
        {"models": [str(model)], "specs": ["blind", *names], "keep": keep, "tasks": ["scenes"]}
        | {"limit": limit}
    )
    # a run with more budgets goes on in the folder of one with fewer
    rows = leaderboard(config, board, Settings(threads=1, replace=True))["rows"]
    kept = ("accuracy", "ci", "retained", "layer_tokens", "on_object")
    dense = next(row for row in rows if row["spec"] == "dense")
    return {
        "halves": halves,
        "questions": dense["n"],
        "families": dense["families"],
        "blind": dict(scenes().blind),
        "fingerprint": scenes().fingerprint,
        "rows": {row["spec"]: {key: row[key] for key in kept} for row in rows},
    }


def card(found: dict[str, Any]) -> str:
    """Fill the template: every figure comes from the provenance."""
    published = yaml.safe_load((HERE / "published.yaml").read_text())["averages"]
    rows, halves = found["rows"], found["halves"]
    agreement = {}
    for name, methods in {**halves, "all": [*halves["designed_with"], *halves["held_out"]]}.items():
        both = [m for m in methods if m in published]
        ours = [rows[f"{m}@16"]["accuracy"] for m in both]
        agreement[name] = (len(both), spearman(np.array([published[m] for m in both]), np.array(ours)))
    stages = {name: stage[-1] for name, stage in found["log"].items()}
    blocks, layers = found["properties"]["tower"], found["properties"]["decoder"]
    return (
        (HERE / "card_template.md")
        .read_text()
        .format(
            families=table(
                ("family", "blind", "dense"),
                [(f, f"{found['blind'][f]:.3f}", f"{value:.3f}") for f, value in found["families"].items()],
            ),
            retention=retention(found, published),
            agreement=bullets(
                [
                    f"{name.replace('_', ' ')}: {rho:.2f} over {count} methods"
                    for name, (count, rho) in agreement.items()
                ]
            ),
            tower=table(("of the tower", "mean"), [(name, f"{value:.3f}") for name, value in blocks.items()]),
            decoder=table(
                ("layer", *layers[0]),
                [(str(i), *(f"{value:.3f}" for value in layer.values())) for i, layer in enumerate(layers)],
            ),
            training=table(
                ("stage", "steps", "CPU s", "wall s"),
                [(name, s["step"], s["cpu_seconds"], s["wall_seconds"]) for name, s in stages.items()],
            ),
            questions=found["questions"],
            inside=found["properties"]["questions"],
            fingerprint=found["fingerprint"],
            dense=f"{rows['dense']['accuracy']:.3f}",
            blind=f"{rows['blind']['accuracy']:.3f}",
            random=f"{rows['random@16']['retained']:.3f}",
            auc=f"{blocks['cls auc asked']:.3f}",
            norms=f"{blocks['norm max by median']:.2f}",
            late=f"{layers[1]['share of last quarter']:.3f}",
            slope=f"{layers[1]['rank correlation with place']:.2f}",
            early_auc=f"{layers[1]['auc asked']:.3f}",
            first=f"{max(layer['mass on first token'] for layer in layers):.3f}",
            massive=f"{max(layer['value max by median'] for layer in layers):.0f}",
            designed=", ".join(halves["designed_with"]),
            held_out=", ".join(halves["held_out"]),
            others=others(),
            **told(found),
        )
    )


def others() -> str:
    """How far other seeds are from this one, by the rows of benchmarks/accuracy.md."""
    runs = []
    for path in sorted(RESULTS.glob("natural*.json")):
        if re.fullmatch(r"natural(_[0-9]+)?", path.stem):
            runs.append({row["spec"]: row for row in json.loads(path.read_text())["rows"]})
    dense = ", ".join(f"{100 * rows['dense']['accuracy']:.1f}" for rows in runs)
    kept = [[rows[spec]["retained"] for rows in runs] for spec, row in runs[0].items() if row["keep"]]
    apart = sorted(100 * (max(shares) - min(shares)) for shares in kept)
    return (
        f"The first of {len(runs)} seeds, trained by one recipe on the same pictures. With all tokens they "
        f"answer {dense} % of the test questions. The share of it that a method keeps differs between the "
        f"lowest and the highest seed by {np.median(apart):.1f} points, the median over methods and budgets, "
        f"and by {apart[-1]:.1f} at most: benchmarks/accuracy.md."
    )


def retention(found: dict[str, Any], published: dict[str, float]) -> str:
    """Share of the dense accuracy that each method keeps, in the order of the smallest budget."""
    rows, halves, budgets = found["rows"], found["halves"], found["keep"]
    lines = []
    for name in (*halves["designed_with"], *halves["held_out"], "uniform", "pool"):
        shares = [rows[f"{name}@{keep}"]["retained"] for keep in budgets]
        half = next((half for half, names in halves.items() if name in names), "baseline")
        paper = f"{published[name]:.1f}" if name in published else ""
        lines.append((name, half.replace("_", " "), *(f"{100 * share:.1f}" for share in shares), paper))
    lines.sort(key=lambda line: -float(line[2]))
    return table(("method", "half", *(f"@{keep}" for keep in budgets), "LLaVA-1.5-7B at 64 of 576"), lines)


if __name__ == "__main__":
    main()
