# SPDX-License-Identifier: Apache-2.0
"""Debiasing: masks of padding, corrected scores and kept sets of three base methods, and fits of the
trend."""

from __future__ import annotations

import numpy as np
import torch

from vlmprune.core.select import choose, top_k
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.debias import Debias
from vlmprune.methods.debias.fit import fit_exponential, fit_log_linear
from vlmprune.methods.debias.padding import real_patches
from vlmprune.methods.debias.trend import weights
from vlmprune.methods.fastv import FastV
from vlmprune.methods.pyramiddrop import PyramidDrop
from vlmprune.methods.sparsevlm import SparseVLM

THRESHOLDS = {"fastv": 0.5, "pyramiddrop": 0.01}  # of the area rule, in the official code


def padding_mask(case):
    side = case.hyper["grid"]
    sizes = list(zip(case.arrays["width"].tolist(), case.arrays["height"].tolist(), strict=True))

    def masks(rule, *threshold):
        return torch.stack(
            [real_patches(rule, side, size, *threshold).view(side, side) for size in sizes]
        ).byte()

    case.check(
        "mask_area",
        torch.stack([masks("area", threshold) for threshold in case.arrays["threshold"].tolist()], 1),
    )
    case.check("mask_unpad", masks("integer"))
    case.check("mask_resize", masks("resize"))


def wrapped(case, inner, rule, trend=True):
    """The method of a case: its trend, and its padding if the size of the picture is given."""
    hyper, size = case.hyper, case.hyper.get("image_size_wh")
    decay = hyper.get("decay_per_index")
    n = hyper.get("n_visual", hyper.get("n_visual_now"))
    strength = {"sigma": decay * n} if trend and decay is not None else {"trend": "none"}
    if rule.startswith("area threshold"):
        padding = {"pad": "area", "threshold": float(rule.split()[-1])}
    else:
        padding = {"pad": "integer" if "integer" in rule else "resize"}
    return Debias(inner, **strength, **(padding | {"image_size": tuple(size)} if size else {}))


def check_scores(case, method, tokens):
    """Raw scores, the mask, the weights and their product; padding scores zero in the official code."""
    raw = method.inner.score(tokens)
    case.check("scores_raw", raw[0], word="scores")
    real = method.real(tokens)
    if "pad_mask" in case.arrays:
        case.check(
            "pad_mask", torch.ones(raw.shape[1]).byte() if real is None else real.byte(), word="indices"
        )
    if "weight" in case.arrays and method.trend != "none":
        case.check(
            "weight", weights(method.curve, raw.shape[1])[0].to(case.tensor("weight").dtype), word="scores"
        )
    case.check("scores_debiased", method.score(tokens)[0].clamp_min(0), word="scores")
    return raw.shape[1] if real is None else int(real.sum())


def fastv(case):
    hyper, first, n = case.hyper, case.hyper["sys_len"], case.hyper["n_visual"]
    method = wrapped(case, FastV(hyper["K"]), hyper["pad_rule"])
    attention = case.tensor("attn_last")[None, :, None, first : first + n]
    side = round(n**0.5)
    tokens = VisualTokens(text_attention=attention, grids=((side, side),))
    real = check_scores(case, method, tokens)
    clamped = min(hyper["keep"], real)  # the official code
    case.check("effective_keep", torch.tensor(clamped), word="indices")
    kept = choose(method, tokens, clamped)[0]
    case.check("kept_visual", kept + first, word="indices")
    assert set(kept.tolist()) <= set(
        choose(method, tokens, hyper["keep"])[0].tolist()
    )  # here padding comes behind


def pyramiddrop(case):
    hyper, first, n = case.hyper, case.hyper["sys_len"], case.hyper["n_visual_now"]
    side = round(n**0.5)
    tokens = VisualTokens(
        text_attention=last_row(case)[None, :, None, first : first + n],
        grids=((side, side),) if side * side == n else (),
        cut=hyper["stage"],
    )
    method = wrapped(case, PyramidDrop(), "area threshold 0.01", trend=hyper["tag"] == "after")
    if hyper["stage"] == 0:
        real = check_scores(case, method, tokens)
        assert real == hyper.get("valid_patches", real)
    else:
        raw = method.inner.score(tokens)[0]
        case.check("scores_raw", raw, word="scores")
        case.check("scores_debiased", method.score(tokens)[0], word="scores")
    kept = choose(method, tokens, hyper["keep"])[0] + first
    length = case.arrays["features"].shape[1]
    case.check(
        "kept_indices",
        torch.cat([torch.arange(first), kept, torch.arange(first + n, length)]),
        word="indices",
    )


def last_row(case):
    """(H, L) attention of the last token, from the hidden states that enter the layer."""
    hidden = case.tensor("features")[0].float()
    normed = (
        hidden
        * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        * case.tensor("input_layernorm").float()
    )
    heads, length = case.hyper["heads"], len(hidden)

    def project(name, rows):
        x = (rows @ case.tensor(name).float().T).unflatten(-1, (-1, hidden.shape[1] // heads)).transpose(0, 1)
        return x.repeat_interleave(heads // x.shape[0], dim=0)  # (H, rows, d)

    query, keys = project("q_proj", normed[-1:]), project("k_proj", normed)
    query, keys = rotate(query, torch.tensor([length - 1])), rotate(keys, torch.arange(length))
    return (query @ keys.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)[:, 0]


def rotate(x, positions, base=10000.0):
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat(
        [x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1
    )


def sparsevlm(case):
    hyper, first, n = case.hyper, case.hyper["sys_len"], case.hyper["n_visual"]
    side, attention = round(n**0.5), case.tensor("attn_text")[None, ..., first : first + n]
    mask = torch.zeros(1, attention.shape[2], dtype=torch.bool).index_fill(
        1, case.tensor("text_rater_index"), True
    )
    tokens = VisualTokens(
        text_attention=attention,
        query_mask=mask,
        grids=((side, side),) if side * side == n else (),
        cut=(2, 6, 15).index(hyper.get("layer", 2)),
    )
    method = wrapped(case, SparseVLM(), "resize rule")
    raw, corrected = method.inner.score(tokens), method.score(tokens)
    if tokens.cut == 0 and "weight" in case.arrays:
        real = method.real(tokens)
        weight = weights(method.curve, raw.shape[1])[0] * (1 if real is None else real)
        case.check("weight", weight.float())
    # ours is summed in another order
    torch.testing.assert_close(raw[0], case.tensor("relation_returned"), rtol=1e-5, atol=0.0)
    case.checked.add("relation_returned")
    kept = top_k(corrected, hyper["budget"])
    case.check("keep_mask", torch.zeros(n, dtype=torch.bool).index_fill(0, kept[0], True))


def trend_fit(case):
    mean, n = case.arrays["mean_attention"], case.hyper["length"]
    np.testing.assert_allclose(np.arange(n) / n, case.arrays["x"])
    case.check("mu_sigma_loglinear", torch.tensor(fit_log_linear(mean), dtype=torch.float64))
    mu, sigma = fit_exponential(mean)
    case.check("mu_sigma_nonlinear", torch.tensor([mu, sigma], dtype=torch.float64))
    raw = case.tensor("attention")[None]
    method = Debias(FastV(), sigma=sigma)
    case.check("weight", weights(method.curve, raw.shape[1])[0])
    order = (raw[0] * weights(method.curve, raw.shape[1])[0]).sort(descending=True, stable=True).indices
    case.check("debiased_rank", order, word="parameters")


RUNNERS = {
    "padding_mask": padding_mask,
    "fastv_debiased": fastv,
    "fastv_padding_only": fastv,
    "pyramiddrop_debiased": pyramiddrop,
    "sparsevlm_debiased": sparsevlm,
    "trend_fit_reference": trend_fit,
}
