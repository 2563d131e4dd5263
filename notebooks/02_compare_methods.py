# SPDX-License-Identifier: Apache-2.0
"""Eight methods on one picture: what each keeps, what the model then says, and how alike the choices are."""

# %% [markdown]
# # Eight methods on one picture
#
# The same question, the same budget of 18 of 144 tokens, eight rules for what stays.

# %%
import vlmprune
from vlmprune.viz.notebook import beside, sheet

model, processor = vlmprune.load("tiny")
picture, question, answer = vlmprune.example()
inputs = vlmprune.encode(model, processor, picture, question)
print(question, "->", answer)
picture.resize((320, 320), 0)

# %%
METHODS = ("random", "uniform", "fastervlm", "divprune", "visionzip", "holov", "zooprune", "fastv(layer=2)")
maps, said = {}, {}
for method in ("dense", *METHODS):
    spec = method if method == "dense" else f"{method}@18"
    with vlmprune.prune(model, spec) as run:
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said[method] = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if method != "dense":
        maps[method] = run.last.keep[0].on(picture)
beside(maps.values(), [f"{method}: {said[method]}" for method in maps])

# %% [markdown]
# The map of VisionZip has 17 tokens: its 18th row is the [CLS] feature, which stands for no patch.
#
# ## How alike are the choices?
#
# `overlap` is the Jaccard index of two kept sets: 1 for the same tokens, 0 for none in common. Two random
# sets of 18 of 144 tokens have about 0.07. `coverage(4)` says how far a set is spread: the share of the 16
# coarse cells of the picture in which at least one token stays.

# %%
sheet(
    [
        {"method": method, "answer": said[method], "coverage": f"{maps[method].coverage(4):.2f}"}
        | {f"overlap with {other}": f"{maps[method].overlap(maps[other]):.2f}" for other in METHODS}
        for method in METHODS
    ]
)

# %% [markdown]
# One picture shows *how* methods choose, not how good they are: for that, look at many questions, at
# intervals and at the baselines. That is notebook 5.
