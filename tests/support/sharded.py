# SPDX-License-Identifier: Apache-2.0
"""Weights in two processes, under either FSDP: a forward keeps the tokens of a whole model. A program; exit
code 0 where that is so.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import vlmprune
from vlmprune.testing.tiny import tiny_inputs, tiny_model

KINDS = ("FSDP1", "FSDP1 by layers", "FSDP2")
# the last two read the projector's weights, of which each process has a half
SPECS = ("fastervlm@9", "fastv(layer=2)@9", "zooprune@9", "zooprune(estimator=zo)@9")


def sharded(model: Any, kind: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    layers = model.model.language_model.layers
    if kind == "FSDP2":
        mesh = init_device_mesh("cpu", (2,))
        for part in (*layers, model):
            fully_shard(part, mesh=mesh)
        return model
    by_layers = ModuleWrapPolicy({type(layers[0])}) if "layers" in kind else None
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=by_layers
    )


def kept(model: Any, spec: str) -> tuple[list[list[int]], Tensor]:
    """What stays of the picture, and the last logits."""
    with vlmprune.prune(model, spec) as run, torch.no_grad():
        logits = model(**tiny_inputs("llava")).logits[:, -1]
    return [one.keep_idx.tolist() for one in run.last.keep], logits


def one_of_two(rank: int, meet: str) -> None:
    """What each process does; an error in it ends the test."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    want = {spec: kept(tiny_model("llava"), spec) for spec in SPECS}
    for kind, spec in itertools.product(KINDS, SPECS):
        model = tiny_model("llava")
        whole = sum(weight.numel() for weight in model.parameters())
        found = sharded(model, kind)
        held = [getattr(weight, "to_local", lambda weight=weight: weight)() for weight in found.parameters()]
        assert sum(weight.numel() for weight in held) < 0.6 * whole, f"{kind} shards nothing"
        keep, logits = kept(found, spec)
        assert keep == want[spec][0], f"{kind}, {spec}, process {rank}"
        torch.testing.assert_close(logits, want[spec][1])
    distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_of_two, (str(Path(folder) / "meet"),), nprocs=2)
