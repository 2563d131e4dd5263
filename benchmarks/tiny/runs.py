# SPDX-License-Identifier: Apache-2.0
"""Resumable runs: schedules, optimisers, checkpoints in safetensors, progress and a log of every stage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn


def optimisers(net: nn.Module, options: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW for everything else; AdamW alone where ``muon`` is 0."""
    matrices, rest = [], []
    for name, weight in net.named_parameters():
        if weight.requires_grad:
            stacked = ".layers." in name or ".blocks." in name
            inner = weight.ndim == 2 and stacked and "embed" not in name
            (matrices if inner and options.get("muon") else rest).append(weight)
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=options["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    ]
    if matrices:
        rules = {"weight_decay": 0.02, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 4}
        found.append(torch.optim.Muon(matrices, lr=options["muon"], **rules))
    for optimiser in found:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return found


def rank() -> tuple[int, int]:
    """``(rank, world)``: (0, 1) without torchrun."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def average_gradients(net: nn.Module) -> None:
    """Mean over ranks, in one message; every rank must have a gradient for the same parameters."""
    if rank()[1] > 1:
        grads = [weight.grad for weight in net.parameters() if weight.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat)
        flat /= rank()[1]
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


class Run:
    """A folder with checkpoints of the stages and ``log.jsonl``. A finished stage is loaded, a broken one
    resumed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def log(self, **row: Any) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def generator(self, stage: str, seed: int) -> np.random.Generator:
        """Random numbers of a stage: others on every rank, and others after a resume."""
        path = self.folder / f"{stage}.pt"
        step = torch.load(path, weights_only=True)["step"] if path.exists() else 0
        return np.random.default_rng([seed, sum(stage.encode()), rank()[0], step])

    def loop(
        self,
        stage: str,
        net: nn.Module,
        steps: list[torch.optim.Optimizer],
        step: Callable[[int], dict[str, float]],
        options: dict[str, Any],
        evaluate: Callable[[], dict[str, float]],
    ) -> None:
        """Train ``options['steps']`` steps; the learning rate rises, stays, and falls to zero over the last
        ``decay``.
        """
        path, total = self.folder / f"{stage}.pt", options["steps"]
        first, spent = 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            net.load_state_dict(state["net"])
            for optimiser, saved in zip(steps, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            first, spent = state["step"], state["cpu"]
            print(f"{stage}: resumed at {first} of {total}", flush=True)
        begin, wall = time.process_time(), time.perf_counter()
        means: dict[str, float] = {}
        for number in range(first, total):
            scale = schedule(number, total, options["warmup"], options["decay"])
            for optimiser in steps:
                for group in optimiser.param_groups:
                    group["lr"] = group["peak"] * scale
            for key, value in step(number).items():
                means[key] = value if key not in means else 0.95 * means[key] + 0.05 * value
            average_gradients(net)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            for optimiser in steps:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            done = number + 1
            first_rank = rank()[0] == 0
            if done % options["report"] == 0 and first_rank:
                figures = " ".join(f"{key} {value:.3f}" for key, value in means.items())
                cpu, waited = spent + time.process_time() - begin, time.perf_counter() - wall
                print(f"{stage} {done}/{total} cpu {cpu:.0f} wall {waited:.0f} {figures}", flush=True)
            if done % options["save"] == 0 or done == total:
                net.eval()
                scores = evaluate()
                net.train()
                if not first_rank:
                    continue
                cpu = spent + time.process_time() - begin
                print(
                    f"{stage} {done} DEV " + " ".join(f"{key} {value:.3f}" for key, value in scores.items()),
                    flush=True,
                )
                waited = time.perf_counter() - wall
                self.log(
                    stage=stage,
                    step=done,
                    cpu_seconds=round(cpu),
                    wall_seconds=round(waited),
                    train=means,
                    dev=scores,
                )
                half, states = path.with_suffix(".part"), [optimiser.state_dict() for optimiser in steps]
                torch.save({"net": net.state_dict(), "optimisers": states, "step": done, "cpu": cpu}, half)
                half.rename(path)


def schedule(number: int, total: int, warmup: int, decay: float) -> float:
    """Warm-up, plateau, then a straight line to (almost) zero: a longer run shares all but its end with a
    shorter one.
    """
    left = (total - number) / max(1.0, decay * total)
    return (
        min(1.0, (number + 1) / warmup, max(0.02, left))
        if decay < 1
        else min((number + 1) / warmup, _cosine(number / total))
    )


def _cosine(done: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
