# SPDX-License-Identifier: Apache-2.0
"""Run a small leaderboard and read it without fooling yourself."""

# %% [markdown]
# # Read a leaderboard honestly
#
# A leaderboard asks every question under every spec. This one is small on purpose, so that you see what 100
# questions can say and what they cannot. On the command line: `vlmprune leaderboard --specs
# 'fastervlm@16,divprune@16,fastv(layer=2)@16' --limit 100`.

# %%
import tempfile
from pathlib import Path

from IPython.display import Markdown

from vlmprune.evaluation.leaderboard.config import Config
from vlmprune.evaluation.leaderboard.run import leaderboard
from vlmprune.evaluation.report import write_report
from vlmprune.viz.notebook import sheet

SPECS = ["fastervlm", "divprune", "fastv(layer=2)"]
config = Config.of({"models": ["tiny"], "specs": SPECS, "keep": [16], "limit": 100})
folder = Path(tempfile.mkdtemp()) / "run"
found = leaderboard(config, folder)
print(len(found["rows"]), "rows over", found["rows"][0]["n"], "questions")


def percent(value):
    return "" if value is None else f"{100 * value:.1f}"


# %% [markdown]
# ## 1. Accuracy comes with an interval
#
# Baselines are in every table, asked for or not: dense, random under three seeds, uniform and pool. Two
# rows whose 95 % intervals overlap widely are not ranked by this run, whatever their order.

# %%
rows = sorted(found["rows"], key=lambda row: -row["accuracy"])
sheet(
    [
        {
            "spec": f"``{row['spec']}``",
            "accuracy, %": percent(row["accuracy"]),
            "95 % interval": f"{percent(row['ci'][0])} to {percent(row['ci'][1])}",
            "% of dense": percent(row["retained"]),
        }
        for row in rows
    ]
)

# %% [markdown]
# ## 2. Differences are paired
#
# All specs answer the same questions, so a difference can be found that two intervals hide. `lost` and
# `won` are questions that changed against dense. The *least difference that would have been found* says
# what this run is blind to: a smaller "no difference" means nothing. p is corrected for the number of
# comparisons: who compares twenty methods finds one by luck.

# %%
sheet(
    [
        {
            "spec": f"``{row['spec']}``",
            "against dense, points": f"{100 * row['vs_dense']['difference']:+.1f}",
            "95 % interval": " to ".join(f"{100 * end:+.1f}" for end in row["vs_dense"]["ci"]),
            "p, corrected": f"{row['vs_dense']['p_holm']:.3g}",
            "lost": row["flips"]["lost"] if row["flips"] else "",
            "won": row["flips"]["won"] if row["flips"] else "",
            "least difference found": percent(row["mdd"]),
        }
        for row in rows
        if row["vs_dense"]
    ]
)

# %% [markdown]
# ## 3. Beat the baselines first
#
# A method that does not beat `random` at its budget chose nothing. A method that does not beat `uniform` or
# `pool` chose nothing that a smaller picture would not give.

# %%
sheet(
    [
        {
            "spec": f"``{row['spec']}``",
            "against random, points": f"{100 * row['vs_random']['difference']:+.1f}",
            "95 % interval": " to ".join(f"{100 * end:+.1f}" for end in row["vs_random"]["ci"]),
        }
        for row in rows
        if row["vs_random"]
    ]
)

# %% [markdown]
# ## 4. The same budget is not the same work
#
# `fastv(layer=2)@16` reads all 144 tokens in its first two layers. Per layer it read more than 16 on
# average, and that is what it should be compared at.

# %%
sheet(
    [
        {
            "spec": f"``{row['spec']}``",
            "tokens at the end": f"{row['realised_tokens']:g}",
            "tokens per layer": "" if row["layer_tokens"] is None else f"{row['layer_tokens']:.1f}",
        }
        for row in rows
    ]
)

# %% [markdown]
# ## 5. An average hides what broke
#
# By kind of question. Reading small text, or counting, often breaks long before the average moves.

# %%
sheet(
    [
        {"spec": f"``{row['spec']}``"} | {name: percent(value) for name, value in row["families"].items()}
        for row in rows
    ]
)

# %% [markdown]
# ## 6. Whose numbers are these?
#
# The model is small, and in training it was told where to look. The table compares ways of pruning on it;
# it does not predict a model of 7 billion parameters. `vlmprune leaderboard configs/llava-1.5-7b.yaml
# --device cuda` runs the protocol of the papers, with their numbers beside yours.
#
# The run folder becomes one offline page, or a table for a README:

# %%
page = write_report(folder, out=folder / "report.html")
print(page.name, page.stat().st_size // 1024, "KiB")
text = write_report(folder, out=folder / "report.md").read_text(encoding="utf-8")
Markdown("\n".join(line for line in text.splitlines() if line.startswith("|")))
