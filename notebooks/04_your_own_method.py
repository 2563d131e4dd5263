# SPDX-License-Identifier: Apache-2.0
"""Write a method, try it, and verify it."""

# %% [markdown]
# # Your own method
#
# A method is one small frozen dataclass with one formula. Its fields are its options. Budgets, ties, order,
# positions, masks, caches and hooks are the library's.
#
# This one keeps patches that differ from their neighbours: the mean distance of a patch's features to those
# of the patches above, below, left and right of it.

# %%
from dataclasses import dataclass
from typing import ClassVar

import torch

import vlmprune
from vlmprune.testing.conformance import run_checks
from vlmprune.viz.notebook import beside, sheet


@vlmprune.register("contrast")
@dataclass(frozen=True)
class Contrast(vlmprune.Method):
    """Keeps the patches that are least like their neighbours.

    Args:
        power: of the distance; larger values count single strong edges more.
    """

    power: float = 1.0

    needs: ClassVar = ("features",)

    def score(self, tokens: vlmprune.VisualTokens) -> torch.Tensor:
        rows, cols = tokens.need("grids")[0]
        x = tokens.need("features").float().unflatten(1, (rows, cols))  # (B, rows, cols, D)
        down = (x[:, 1:] - x[:, :-1]).norm(dim=-1) ** self.power  # (B, rows - 1, cols)
        right = (x[:, :, 1:] - x[:, :, :-1]).norm(dim=-1) ** self.power  # (B, rows, cols - 1)
        pad = torch.nn.functional.pad
        total = pad(down, (0, 0, 1, 0)) + pad(down, (0, 0, 0, 1)) + pad(right, (1, 0)) + pad(right, (0, 1))
        one = torch.ones_like(total)
        edges = torch.zeros_like(one)  # patches at the border have fewer neighbours
        edges[:, 0] += 1
        edges[:, -1] += 1
        edges[:, :, 0] += 1
        edges[:, :, -1] += 1
        return (total / (4 * one - edges)).flatten(1)  # (B, N), higher is kept


vlmprune.method_info("contrast")

# %% [markdown]
# It has a name now, and works wherever a spec does: in `prune`, in a leaderboard, with options, combined
# with others.

# %%
model, processor = vlmprune.load("tiny")
picture, question, answer = vlmprune.example()
inputs = vlmprune.encode(model, processor, picture, question)
maps = [vlmprune.score(model, inputs, spec, image=picture)[0] for spec in ("contrast", "contrast(power=4.0)")]
beside([*maps, maps[0].keep(18)], ["contrast", "contrast(power=4.0)", "contrast@18"])

# %%
for spec in ("contrast@18", "fastervlm@18", "random@18"):
    with vlmprune.prune(model, spec) as run:
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{run.last} -> {said} (right: {answer})")

# %% [markdown]
# ## Verify it
#
# Every method must hold the same invariants: keeping all tokens is the dense model, a row of a batch gives
# what it gives alone, nothing stays on the model, generation works with beams, sampling and caches, and
# more. `run_checks` tries them on tiny random models of real families. On the command line it is `vlmprune
# verify contrast`.

# %%
results = run_checks("contrast@9", families=["llava"])
sheet([{"check": one.check, "status": one.status, "detail": one.detail} for one in results])

# %% [markdown]
# A family with tiled pictures has several grids per picture. `contrast` looks only at the first one, and
# the checks find that out:

# %%
tiled = run_checks("contrast@9", families=["llava_next"])
failed = [one for one in tiled if one.status == "fail"]
print(f"{len(failed)} of {len(tiled)} checks fail")
print(failed[0].check, "->", failed[0].detail.splitlines()[0][:160])

# %% [markdown]
# The repair is a loop over the grids. `vlmprune new mine` writes the files of a method that is to stay:
# module, card, ledger and test.


# %%
@vlmprune.register("contrast_all")
@dataclass(frozen=True)
class ContrastAll(Contrast):
    """Keeps the patches that are least like their neighbours, in every block of a picture."""

    def score(self, tokens: vlmprune.VisualTokens) -> torch.Tensor:
        features, found, start = tokens.need("features"), [], 0
        for rows, cols in tokens.need("grids"):
            block = features[:, start : start + rows * cols]
            one = vlmprune.VisualTokens(features=block, grids=((rows, cols),))
            found.append(super().score(one))
            start += rows * cols
        return torch.cat(found, dim=1)


repaired = run_checks("contrast_all@9", families=["llava", "llava_next"])
print({status: sum(one.status == status for one in repaired) for status in ("pass", "fail", "unsupported")})
