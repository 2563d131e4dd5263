# SPDX-License-Identifier: Apache-2.0
"""ZOO-Prune: sensitivities and picks for plain projectors, mergers of four patches, low rank and tiles.

Vectors are compared in float64, where the tolerance is tight. In float32 sensitivities may differ by 2e-4 and
picks not at all.
"""

from __future__ import annotations

import torch
from torch import nn

from vlmprune.methods.zooprune import hybrid_greedy, scaled
from vlmprune.methods.zooprune.sensitivity import finite_difference, unit


class Merger(nn.Module):
    """Four patches become one token: RMSNorm of each patch and four in a row, or 2 x 2 cells of the grid and
    their LayerNorm.
    """

    def __init__(self, mlp, gain, shift, grid):
        super().__init__()
        self.mlp, self.grid = mlp, grid
        self.gain, self.shift = nn.Parameter(gain), None if shift is None else nn.Parameter(shift)

    def forward(self, x):  # (..., P, C)
        if len(self.gain) == x.shape[-1]:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain
            return self.mlp(x.unflatten(-2, (-1, 4)).flatten(-2))
        rows, cols = self.grid
        cells = (
            x.unflatten(-2, (rows // 2, 2, cols // 2, 2)).transpose(-4, -3).flatten(-3).flatten(-3, -2)
        )  # (..., N, 4C)
        return self.mlp(nn.functional.layer_norm(cells, self.gain.shape, self.gain, self.shift, 1e-5))


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def projector_of(case):
    mlp = linear(case.tensor("w1"), case.tensor("b1"))
    if "w2" in case.arrays:
        mlp = nn.Sequential(mlp, nn.GELU(), linear(case.tensor("w2"), case.tensor("b2")))
    if "norm_weight" not in case.arrays:
        return mlp
    shift = case.tensor("norm_bias") if "norm_bias" in case.arrays else None
    side = round(len(case.arrays["features"]) ** 0.5)
    return Merger(mlp, case.tensor("norm_weight"), shift, case.hyper.get("grid", (side, side)))


@torch.no_grad()
def answers(case, dtype):
    """Expected names -> what this package makes of the inputs."""
    projector, x = projector_of(case).to(dtype), case.tensor("features").to(dtype)[None]
    directions, h = unit(case.tensor("directions_raw").to(dtype)), case.hyper["h"]
    found = finite_difference(projector, x, directions, h, case.hyper.get("rank"))[0]  # (N,)
    features = projector(x)[0]
    tile = (
        case.tensor("tile") if "tile" in case.arrays else torch.zeros(len(found), dtype=torch.int64)
    )  # -1: newline
    quota = case.hyper.get("quota", case.hyper.get("k"))
    order, weight = [], torch.zeros_like(found)
    for number in range(int(tile.max()) + 1):
        member = (tile == number).nonzero()[:, 0]
        weight[member] = scaled(found[None, member])[0]
        picks, _ = hybrid_greedy(weight[None, member], features[None, member], min(quota, len(member)))
        order.append(member[picks[0]])
    order = torch.cat(order)
    return {
        "sensitivity": found.where(tile >= 0, 0),
        "sensitivity_norm": weight,
        "keep_order": order,
        "keep_sorted": torch.cat([order, (tile < 0).nonzero()[:, 0]]).sort().values,
    }


def run(case):
    exact, single = answers(case, torch.float64), answers(case, torch.float32)
    for name, value in exact.items():
        if name in case.arrays:
            case.check(name, value)
    torch.testing.assert_close(single["sensitivity"].double(), exact["sensitivity"], rtol=2e-4, atol=1e-12)
    torch.testing.assert_close(
        single["sensitivity_norm"].double(), exact["sensitivity_norm"], rtol=0, atol=2e-4
    )
    torch.testing.assert_close(single["keep_order"], exact["keep_order"])


def select(case):
    """The choice alone, from sensitivities that are given."""
    case.checked.add("sensitivity")  # an input here
    for dtype in (torch.float64, torch.float32):
        s = scaled(case.tensor("sensitivity").to(dtype)[None])
        order, _ = hybrid_greedy(s, case.tensor("projected").to(dtype)[None], case.hyper["k"])
        case.check("sensitivity_norm", s[0])
        case.check("keep_order", order[0])
        case.check("keep_sorted", order[0].sort().values)


KINDS = (
    "mlp",
    "linear",
    "lowrank",
    "mlp_lowrank",
    "merger",
    "shuffle",
    "pixel_shuffle",
    "tiles",
    "tiles_lowrank",
)
RUNNERS = {**dict.fromkeys(KINDS, run), "select": select}
