# SPDX-License-Identifier: Apache-2.0
"""VAR against a literal transcription of its three steps; inside a model it is held by
tests/core/test_reweight.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vlmprune
from vlmprune.errors import SpecError
from vlmprune.methods.var import VAR, mass_and_portion, sink_strength
from vlmprune.methods.var.sinks import SINK_DIMS
from vlmprune.testing.tiny import tiny_inputs, tiny_model

FIRST, LAST, KEYS = 4, 16, 22  # the picture stands at 4..15


def columns(*where):
    """(1, KEYS) bool."""
    return torch.zeros(1, KEYS, dtype=torch.bool).index_fill(1, torch.tensor(where, dtype=torch.long), True)


VISUAL = columns(*range(FIRST, LAST))
SINKS = columns(0, 6, 9, 18)  # BOS, two patches, a word


def attention(heads=6, rows=8, seed=0):
    logits = np.random.default_rng(seed).normal(scale=1.5, size=(1, heads, rows, KEYS))
    return (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)


def strength(x, dims):
    """Section "sinks" for one hidden state."""
    rms = np.sqrt(np.mean(x.astype(np.float64) ** 2) + 1e-6)
    return max(abs(x[d]) for d in dims) / rms


def transcription(row, sinks, visual, keep, rho, least):
    """Sections "heads" and "redistribution" for one attention row: the edited row, None where it is left
    alone.
    """
    on_picture = [j for j in range(KEYS) if visual[j]]
    picture_sinks = [j for j in on_picture if sinks[j]]
    others = [j for j in on_picture if not sinks[j]]
    mass = sum(row[j] for j in on_picture)
    portion = sum(row[j] for j in picture_sinks) / (mass + len(on_picture) * 1e-6)
    if not picture_sinks or not others or portion > rho or mass < least:
        return None
    budget = (1 - keep) * sum(row[j] for j in range(KEYS) if sinks[j])
    rest = sum(row[j] for j in others)
    out = row.copy()
    for j in range(KEYS):
        if sinks[j]:
            out[j] = keep * row[j]
        elif visual[j]:
            out[j] = row[j] * (1 + budget / rest)
    return out


# --- the definition -------------------------------------------------------------------------------


def test_sinks_follow_the_transcription():
    x = np.random.default_rng(1).normal(size=(2, 30, 640)).astype(np.float32)
    x[0, 3, 100], x[0, 7, 300], x[1, 0, 100], x[1, 5, 200] = (
        60.0,
        -90.0,
        150.0,
        150.0,
    )  # 200 is no sink dimension
    expected = np.array([[strength(token, (100, 300)) for token in row] for row in x])
    np.testing.assert_allclose(sink_strength(torch.from_numpy(x), (100, 300)).numpy(), expected, rtol=1e-5)
    marked = VAR(dims=(100, 300)).mark(torch.from_numpy(x), None)
    assert marked.tolist() == (expected > 20).tolist()
    assert marked.nonzero().tolist() == [[0, 3], [0, 7], [1, 0]]


@pytest.mark.parametrize(
    ("keep", "rho", "least"), [(0.6, 0.5, 0.2), (0.4, 0.2, 0.5), (0.0, 1.0, 0.0), (1.0, 0.5, 0.2)]
)
def test_edited_rows_follow_the_transcription(keep, rho, least):
    rows = attention()
    method = VAR(sink_keep=keep, max_sink_portion=rho, min_visual_mass=least)
    edited = method.reweight(torch.from_numpy(rows), SINKS, VISUAL)
    chosen = method.image_centric(torch.from_numpy(rows), SINKS, VISUAL)
    mass, portion = mass_and_portion(torch.from_numpy(rows), SINKS, VISUAL)
    for head, line in np.ndindex(rows.shape[1:3]):
        row = rows[0, head, line]
        expected = transcription(row, SINKS[0], VISUAL[0], keep, rho, least)
        assert bool(chosen[0, head, line]) == (expected is not None)
        np.testing.assert_allclose(
            edited[0, head, line].numpy(), row if expected is None else expected, rtol=1e-5, atol=1e-8
        )
    np.testing.assert_allclose(edited.sum(-1).numpy(), 1.0, atol=2e-6)
    np.testing.assert_allclose(mass.numpy(), rows[..., FIRST:LAST].sum(-1), rtol=1e-5)
    np.testing.assert_allclose(
        portion.numpy(), rows[..., [6, 9]].sum(-1) / rows[..., FIRST:LAST].sum(-1), rtol=1e-4
    )


def test_some_rows_are_edited_and_some_are_not():
    chosen = VAR(max_sink_portion=0.2).image_centric(torch.from_numpy(attention()), SINKS, VISUAL)
    assert 0 < int(chosen.sum()) < chosen.numel()


def test_samples_of_a_batch_have_their_own_sinks():
    rows = torch.from_numpy(np.concatenate([attention(seed=2), attention(seed=3)]))
    sinks, visual = torch.cat([SINKS, columns(1, 12)]), torch.cat([VISUAL, columns(*range(8, 20))])
    method = VAR()
    together = method.reweight(rows, sinks, visual)
    for i in range(2):
        alone = method.reweight(rows[i : i + 1], sinks[i : i + 1], visual[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_a_bias_of_the_logits_gives_the_same_edit():
    z = torch.from_numpy(np.random.default_rng(4).normal(scale=1.5, size=(1, 6, 8, KEYS))).float()
    a = z.softmax(-1)
    method = VAR()
    chosen = method.image_centric(a, SINKS, VISUAL)[..., None]
    others = VISUAL & ~SINKS
    b = (1 - method.sink_keep) * (a * SINKS).sum(-1, keepdim=True) / (a * others).sum(-1, keepdim=True)
    bias = torch.where(SINKS, np.log(method.sink_keep), torch.where(others, torch.log1p(b), 0.0))
    torch.testing.assert_close(
        (z + bias * chosen).softmax(-1), method.reweight(a, SINKS, VISUAL), rtol=1e-5, atol=1e-7
    )
    assert chosen.any()


# --- what is left alone ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sinks",
    [columns(), columns(0, 18), columns(0, *range(FIRST, LAST))],
    ids=["no sinks", "text sinks only", "every patch a sink"],
)
def test_rows_without_both_kinds_of_patches_are_unchanged(sinks):
    rows = torch.from_numpy(attention())
    assert torch.equal(VAR(max_sink_portion=1.0, min_visual_mass=0.0).reweight(rows, sinks, VISUAL), rows)


def test_a_vanishing_rest_still_takes_the_whole_budget():
    rows = torch.zeros(1, 1, 1, KEYS)
    rows[..., 6], rows[..., 7], rows[..., 8] = 1.0, 3e-30, 1e-30
    edited = VAR(max_sink_portion=1.0).reweight(rows, SINKS, VISUAL)
    torch.testing.assert_close(edited[0, 0, 0, 6:9], torch.tensor([0.6, 0.3, 0.1]))


def test_padding_is_never_a_sink(monkeypatch):
    model, inputs = tiny_model(), tiny_inputs(images=(1, 2))
    padding = inputs["attention_mask"] == 0
    assert padding.any()
    pad = int(inputs["input_ids"][padding][0])
    with torch.no_grad():
        model.get_input_embeddings().weight[pad, 7] = 500.0
    marks, seen = [], []
    mark, reweight = VAR.mark, VAR.reweight
    monkeypatch.setattr(VAR, "mark", lambda self, *given: marks.append(mark(self, *given)) or marks[-1])
    monkeypatch.setattr(
        VAR, "reweight", lambda self, a, sinks, v: seen.append(sinks) or reweight(self, a, sinks, v)
    )
    with vlmprune.prune(model, "var(dims=[7,21],tau=2.0,first_layer=1)"), torch.no_grad():
        model(**inputs)
    assert marks and len(marks) == len(seen)
    for marked, sinks in zip(marks, seen, strict=True):
        assert marked[padding].any(), "no padding looks like a sink: the test says nothing"
        assert torch.equal(sinks, marked & ~padding)


# --- options, backbones, registry -----------------------------------------------------------------


def backbone(**known):
    shape = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_key_value_heads": 32}
    return SimpleNamespace(config=SimpleNamespace(**shape | {"bos_token_id": None} | known))


def test_published_sink_dimensions_are_used_for_their_backbones():
    assert VAR().prepare(backbone()).dims == (1415, 2533)
    assert VAR().prepare(backbone(hidden_size=5120, num_hidden_layers=40, num_key_value_heads=40)).dims == (
        2100,
        4743,
    )
    assert VAR(dims=(3, 5)).prepare(backbone()).dims == (3, 5)
    assert all(max(dims) < width for (_, width, _, _), dims in SINK_DIMS.items())


def test_llama_3_does_not_pass_for_llama_2():
    with pytest.raises(vlmprune.VlmPruneError, match="no BOS token"):
        VAR().prepare(backbone(num_key_value_heads=8))


def test_a_threshold_that_nothing_can_exceed_is_refused():
    narrow = backbone(hidden_size=400)
    with pytest.raises(SpecError, match=r"tau=20\.0; expected less than 20\.0"):
        VAR(dims=(3,)).prepare(narrow)
    assert VAR(dims=(3,), tau=19.9).prepare(narrow).tau == 19.9


@pytest.mark.parametrize(
    "options",
    [
        {"sink_keep": -0.1},
        {"sink_keep": 1.5},
        {"max_sink_portion": 2.0},
        {"min_visual_mass": float("nan")},
        {"tau": 0.0},
        {"tau": float("nan")},
        {"first_layer": -1},
        {"dims": ()},
        {"dims": (7, -1)},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match=f"{next(iter(options))}="):
        VAR(**options)


def test_layers_are_those_of_the_paper():
    assert VAR().acts_on(32) == range(2, 31)
    assert VAR(skip_last_layer=False).acts_on(32) == range(2, 32)
    with pytest.raises(SpecError, match="first_layer=2 leaves no layer of 3"):
        VAR().acts_on(3)


def test_the_registry_describes_it():
    info = vlmprune.method_info("var")
    assert (info.slot, info.budgeted, info.query_aware, info.needs, info.kind) == (
        "attention",
        False,
        True,
        (),
        "reweight",
    )
    assert [option.name for option in info.options] == [
        "dims",
        "tau",
        "sink_keep",
        "max_sink_portion",
        "min_visual_mass",
        "first_layer",
        "skip_last_layer",
        "recipe",
    ]
    assert all(option.help for option in info.options)


@pytest.mark.parametrize(
    "text", ["var", "var+fastervlm@128", "var(dims=[7,21],tau=4.0,skip_last_layer=False)"]
)
def test_specs_round_trip(text):
    spec = vlmprune.parse(text)
    assert vlmprune.parse(str(spec)) == spec
    assert isinstance(spec.build()[0].method, VAR)
    assert spec.build()[0].budget is None
