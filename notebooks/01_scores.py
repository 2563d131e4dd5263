# SPDX-License-Identifier: Apache-2.0
"""Scores and kept tokens, as tensors and as pictures."""

# %% [markdown]
# # Scores and kept tokens
#
# A vision-language model reads a picture as a list of *visual tokens*, one for each patch. A pruning method
# decides which of them stay. Here you see its scores and its choice, as plain tensors and drawn on the
# picture.
#
# Everything runs offline on a CPU: the package has a small trained model and questions that it can answer.

# %%
import torch

import vlmprune
from vlmprune.viz.notebook import beside, slider

model, processor = vlmprune.load("tiny")
picture, question, answer = vlmprune.example()
print(question, "->", answer)
picture.resize((320, 320), 0)

# %% [markdown]
# ## Scores
#
# `score` runs the vision tower alone. The language model does not run. `image=` gives the map the picture
# that it is drawn on. `fastervlm` ranks patches by the attention that [CLS], the summary token of the
# tower, pays to them. Light is high.

# %%
inputs = vlmprune.encode(model, processor, picture, question)
(scores,) = vlmprune.score(model, inputs, "fastervlm", image=picture)
scores

# %% [markdown]
# The map holds plain tensors: one score per token, the grid of patches, and the box of each patch as shares
# of the picture.

# %%
print(scores.scores.shape, scores.scores.dtype, "grid", scores.grid)
best = scores.scores.topk(3)
for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
    row, column = divmod(index, scores.grid[1])
    box = [round(side, 2) for side in scores.boxes[index].tolist()]
    print(f"token {index:3} (row {row}, column {column}): score {value:.4f}, box {box}")

# %% [markdown]
# ## Kept tokens
#
# `keep` takes a number of tokens, or a share of them. What is dropped is dark.

# %%
keep = scores.keep(18)
keep

# %%
print(keep.keep_idx)  # (K,) ascending indices
print(keep.mask.reshape(keep.grid).int())  # (rows, columns), 1 where kept
print(f"kept {keep.share:.3f} of the tokens, in {keep.coverage(4):.2f} of the 4 x 4 coarse cells")

# %% [markdown]
# In a running notebook this is a slider. (A page that is only read shows where it stood.)

# %%
slider(scores, keep=36)

# %% [markdown]
# ## Cut a model with it
#
# A kept set is a method itself: `replay` keeps exactly these tokens. Outside of the `with` block the model
# is what it was.

# %%
with vlmprune.prune(model, keep.replay) as run:
    ids = model.generate(**inputs, max_new_tokens=8)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
run.last

# %% [markdown]
# `prune` with the name of the method does the same in one step. The report remembers what was kept; `on`
# gives it the picture back.

# %%
with vlmprune.prune(model, "fastervlm@18") as run:
    model.generate(**inputs, max_new_tokens=8)
(again,) = run.last.keep
print("the same tokens:", again.overlap(keep) == 1.0)
with vlmprune.prune(model, "fastv(layer=2)@18") as run:
    model.generate(**inputs, max_new_tokens=8)
(inside,) = run.last.keep
print(f"overlap with fastv, which looks inside the language model: {inside.overlap(keep):.2f}")
beside([again.on(picture), inside.on(picture)], ["fastervlm@18", "fastv(layer=2)@18"])

# %% [markdown]
# ## Without any model
#
# `select` takes plain tensors, here features of 36 tokens of two pictures, and gives the indices that stay.

# %%
features = torch.randn(2, 36, 16, generator=torch.Generator().manual_seed(0))  # (B, N, D)
vlmprune.select("divprune", keep=8, features=features)

# %% [markdown]
# Specs and methods explain themselves:

# %%
vlmprune.parse("debias+fastv(layer=2)@0.25")

# %%
vlmprune.method_info("fastervlm")
