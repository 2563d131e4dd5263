# SPDX-License-Identifier: Apache-2.0
"""Kept sets audited: does the choice matter, or only the number of tokens, their places, their positions?"""

# %% [markdown]
# # An audit of kept sets
#
# A method keeps 18 of 144 tokens and the answers stay right. Is that because it chose *these* tokens? The
# question of [arXiv 2608.00077](https://arxiv.org/abs/2608.00077) is answered by cutting *other* sets in
# the same way: store a kept set, replay it, and change one thing at a time.
#
# * **original positions**: the same tokens, but their position ids keep the gaps;
# * **grey twin**: the set that the method chooses on a grey picture, which can only come from habit;
# * **wrong picture**: the set that it chooses on another picture;
# * **random twin**: as many tokens by lot.
#
# Each is a few lines here, since a kept set is a method: `keep.replay`.

# %%
from PIL import Image

import vlmprune
from vlmprune.evaluation.tasks.sample import normalise
from vlmprune.viz.notebook import beside, sheet

METHOD, KEEP = "fastervlm", 18
model, processor = vlmprune.load("tiny")


def kept(picture, question, method=METHOD):
    """The set that a method keeps of a picture."""
    inputs = vlmprune.encode(model, processor, picture, question)
    return vlmprune.score(model, inputs, method, image=picture)[0].keep(KEEP)


def ask(picture, question, method, **options):
    """What the model answers under a method."""
    inputs = vlmprune.encode(model, processor, picture, question)
    with vlmprune.prune(model, method, **options):
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def is_right(said, answer):
    """Whether an answer is right; what is read letter by letter is compared without the blanks."""
    return answer in (normalise(said), normalise(said, compact=True))


# %% [markdown]
# ## One picture

# %%
picture, question, answer = vlmprune.example()
other, _, _ = vlmprune.example(number=1)
grey = Image.new("RGB", picture.size, (128, 128, 128))

chosen = kept(picture, question)
twins = {
    "chosen": chosen,
    "grey twin": kept(grey, question).on(picture),
    "wrong picture": kept(other, question).on(picture),
    "random twin": kept(picture, question, "random(seed=0)"),
}
beside(twins.values(), [f"{name}, overlap {chosen.overlap(twin):.2f}" for name, twin in twins.items()])

# %% [markdown]
# Original positions:

# %%
for positions in ("compact", "original"):
    print(positions, "->", ask(picture, question, chosen.replay, positions=positions))

# %% [markdown]
# Grey twin, wrong picture, random twin:

# %%
for name in ("grey twin", "wrong picture", "random twin"):
    print(name, "->", ask(picture, question, twins[name].replay))

# %% [markdown]
# ## Thirty questions
#
# One question proves nothing. The same over thirty, six of each kind. *lost* and *won* are questions that
# changed against the chosen set: paired counts, which say more than two accuracies.

# %%
KINDS = ("text", "attribute", "count", "needle", "position")
questions = [vlmprune.example(kind, number) for kind in KINDS for number in range(6)]
others = [questions[number - 6][0] for number in range(len(questions))]  # a picture of another kind

right = {}
for (picture, question, answer), other in zip(questions, others, strict=True):
    grey = Image.new("RGB", picture.size, (128, 128, 128))
    chosen = kept(picture, question)
    answers = {
        "all 144 tokens": ask(picture, question, "dense"),
        "chosen": ask(picture, question, chosen.replay),
        "original positions": ask(picture, question, chosen.replay, positions="original"),
        "grey twin": ask(picture, question, kept(grey, question).replay),
        "wrong picture": ask(picture, question, kept(other, question).replay),
        "random twin": ask(picture, question, kept(picture, question, "random(seed=0)").replay),
    }
    for name, said in answers.items():
        right.setdefault(name, []).append(is_right(said, answer))

sheet(
    [
        {
            "kept set": name,
            "right": f"{sum(marks)} of {len(marks)}",
            "lost against chosen": sum(a and not b for a, b in zip(right["chosen"], marks, strict=True)),
            "won": sum(b and not a for a, b in zip(right["chosen"], marks, strict=True)),
        }
        for name, marks in right.items()
    ]
)

# %% [markdown]
# How to read it: where the grey twin does as well as the chosen set, the method keeps places out of habit
# and not because of what they show. Where the random twin does as well, the number of tokens is all that
# mattered. Where original and compact positions differ, a comparison of two methods must say which it used;
# `vlmprune.prune(..., positions=...)` sets it, and `run.positions` says it.
#
# These numbers are of the small model, which was told in training where to look. Run the same cells with
# your checkpoint: `vlmprune.load("llava-hf/llava-1.5-7b-hf")` and your own questions.
