# SPDX-License-Identifier: Apache-2.0
"""FlashVLM: relevance, fused score, both halves in their order, and kept sets."""

from __future__ import annotations

import torch

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods import flashvlm
from vlmprune.methods.flashvlm import FlashVLM

OPTIONS = ("eta", "text_temperature", "sharpen_temperature", "gamma", "top_p")


def selection(case):
    hyper, encoded = case.hyper, case.tensor("image_features")
    assert hyper["eps"] == flashvlm.EPS
    method = FlashVLM(
        important=hyper["important_ratio"],
        step=hyper["prune_step"],
        dim=hyper["dim_factor"],
        **{name: hyper[name] for name in OPTIONS},
    )
    features = encoded @ case.tensor("proj_weight") + case.tensor("proj_bias")
    text = [case.tensor(f"text_embeds/{row}") for row in range(len(encoded))]
    lengths = torch.tensor([len(words) for words in text])
    tokens = VisualTokens(
        features=features,
        encoder_features=encoded,
        cls_attention=case.tensor("cls_attentions"),
        text_embeds=torch.nn.utils.rnn.pad_sequence(text, batch_first=True),
        query_mask=torch.arange(int(lengths.max())) < lengths[:, None],
    )
    important, diverse = method.halves(tokens, hyper["visual_token_num"])
    kept = choose(method, tokens, hyper["visual_token_num"])
    case.check("text_sim", method.relevance(tokens))
    case.check("fused_score", method.fused(tokens))
    case.check("important_indices", important)
    case.check("diverse_indices", diverse)
    case.check("kept_indices", kept)
    if "output_features" in case.arrays:
        rows = torch.stack([row[index] for row, index in zip(features, kept, strict=True)])
        torch.testing.assert_close(rows, case.tensor("output_features"), rtol=1e-5, atol=1e-6)


RUNNERS = {"selection": selection}
