# SPDX-License-Identifier: Apache-2.0
"""CDPruner: relevance from given text and patches of the CLIP joint space, order of picking and kept sets.

The official code scales relevance over the whole batch; here every picture is scaled for itself, so that the
pictures of a batch are laid end to end for this step.
"""

from __future__ import annotations

import torch

from vlmprune.methods.cdpruner import CDPruner, conditional_dpp, likeness


def relevance(case, method, dtype):
    image, text = case.tensor("image_embeds").to(dtype), case.tensor("text_embeds").to(dtype)
    alike = likeness(image, text.expand(image.shape[0], -1, -1))  # (B, N)
    return method.weighted(alike.flatten()[None]).view_as(alike)


def selection(case):
    hyper = case.hyper
    assert hyper["relevance_eps"] == 1e-6 and hyper["minmax_scope"] == "whole batch", "written into scaled"
    method = CDPruner(sign="negative" if hyper["negate_similarity"] else "positive", theta=hyper["theta"])
    features, k = case.tensor("visual_tokens"), hyper["visual_token_num"]
    r = relevance(case, method, torch.float32)
    case.check("relevance", r)
    case.check("kept_indices", conditional_dpp(features, r, k)[0].sort(dim=1).values)
    exact = relevance(case, method, torch.float64)
    case.check("selection_order", conditional_dpp(features.double(), exact, k)[0])


RUNNERS = {"selection": selection}
