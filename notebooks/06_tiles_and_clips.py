# SPDX-License-Identifier: Apache-2.0
"""Budgets where a picture is several crops, a prompt several pictures, or the input a clip."""

# %% [markdown]
# # Budgets on tiles and clips
#
# `@64` keeps 64 tokens *of each image*. Many models cut a large picture into tiles, or read clips; then one
# has to say what a budget is spent on: `@64/crop` is per tile or frame, `@64/total` per prompt.
#
# The models here are tiny, with random weights: counts and shapes are real, the choices mean nothing.

# %%
import vlmprune
from vlmprune.example_picture import picture
from vlmprune.testing.tiny import tiny_bundle, tiny_inputs, tiny_model
from vlmprune.viz.notebook import beside, sheet

model, processor = tiny_bundle("llava_next")
wide = picture(seed=1, size=(672, 336))
inputs = vlmprune.encode(model, processor, wide, "What is this?")
with vlmprune.prune(model, "dense") as run:
    model(**inputs)
(whole,) = run.last.keep
print(whole.grids, "together", whole.total, "tokens")
wide.resize((448, 224))

# %% [markdown]
# LLaVA-NeXT reads the whole picture once, small, and then in tiles. Its tokens form several grids, which
# are drawn side by side.

# %%
specs = ("fastervlm@18", "fastervlm@0.25", "fastervlm@9/crop")
lines, maps = [], []
for spec in specs:
    with vlmprune.prune(model, spec) as run:
        model(**inputs)
    (keep,) = run.last.keep
    per_grid = [int(part.sum()) for part in keep.mask.split([rows * cols for rows, cols in keep.grids])]
    lines.append({"spec": f"``{spec}``", "kept": f"{len(keep)} of {keep.total}", "per grid": per_grid})
    maps.append(keep.on(wide))
sheet(lines)

# %%
beside(maps, specs)

# %% [markdown]
# ## Several pictures in one prompt
#
# `/total` lets pictures compete for one budget.

# %%
two = processor(images=[picture(0), picture(2)], text="<image> <image> Which is larger?", return_tensors="pt")
lines = []
for spec in ("fastervlm@18", "fastervlm@36/total"):
    with vlmprune.prune(model, spec) as run:
        model(**two)
    lines.append(
        {
            "spec": f"``{spec}``",
            "kept of each": run.last.realised_tokens,
            "together": sum(run.last.realised_tokens),
        }
    )
sheet(lines)

# %% [markdown]
# ## Clips
#
# Methods for clips look at all frames at once: a frame that shows nothing new keeps less. `run.last.keep`
# has one map per frame. The clip is five random frames, of which the third repeats the second.

# %%
model = tiny_model("llava_onevision")
inputs = tiny_inputs("llava_onevision", images=(0,), video=True, frames=5)
inputs["pixel_values_videos"][:, 2] = inputs["pixel_values_videos"][:, 1]
lines = []
for spec in ("dense", "fastervlm(cls=mean)@0.25", "evs@0.25", "vidcom2@0.25", "dycoke@0.5"):
    try:
        with vlmprune.prune(model, spec) as run:
            model(**inputs)
    except vlmprune.VlmPruneError as error:
        lines.append({"spec": f"``{spec}``", "kept per frame": str(error)})
        continue
    lines.append({"spec": f"``{spec}``", "kept per frame": [len(frame) for frame in run.last.keep]})
sheet(lines)

# %% [markdown]
# What cannot be done is refused with the reason, and never done by halves:

# %%
for spec in ("evs@16/crop", "divprune@0", "fastervlm@1.5"):
    try:
        vlmprune.prune(model, spec)
    except vlmprune.VlmPruneError as error:
        print(f"{spec}: {error}")
