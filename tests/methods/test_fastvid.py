# SPDX-License-Identifier: Apache-2.0
"""FastVID: exact counts, rows against a literal transcription, clips that the official code cannot take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

import vlmprune
from vlmprune.core.method import Merged
from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, SpecError, UnsupportedError
from vlmprune.methods.fastvid import FastVID, anchors, cuts, segments_of
from vlmprune.testing.tiny import tiny_inputs, tiny_model


def clip_of(frames: int, n: int, seed: int, width: int = 8, scenes: int = 2) -> VisualTokens:
    random = torch.Generator().manual_seed(seed)
    scene = torch.randn(scenes, n, width, generator=random).repeat_interleave(-(-frames // scenes), dim=0)
    x = scene[:frames] + 0.2 * torch.randn(frames, n, width, generator=random)
    return VisualTokens(
        features=x.flatten(0, 1)[None],
        received_attention=torch.rand(1, frames * n, generator=random),
        grids=((1, n),) * frames,
        frames=True,
    )


@pytest.mark.parametrize(("frames", "n"), [(1, 9), (2, 5), (3, 16), (7, 4), (12, 10)])
def test_every_budget_gives_exactly_as_many_rows(frames: int, n: int) -> None:
    tokens = clip_of(frames, n, seed=frames)
    for k in range(1, frames * n):
        merged = choose(FastVID(), tokens, k)
        assert merged.features.shape[1] == k and bool((merged.slots[0].diff() > 0).all())


def row_by_hand(own: np.ndarray, pool: np.ndarray, row: int, beta: float) -> np.ndarray:
    """The row of one context token among those of an anchor, own (C, D), from the pool (P, D)."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    mine = pool[(unit(pool) @ unit(own).T).argmax(1) == row]
    if not len(mine):
        return own[row]
    w = max(1 / (len(mine) + 1), beta)
    return w * own[row] + (1 - w) * mine.mean(0)


@pytest.mark.parametrize("beta", [0.6, 0.1])
def test_rows_are_those_of_a_transcription(beta: float) -> None:
    frames, n, k = 8, 12, 40
    tokens, method = clip_of(frames, n, seed=5), FastVID(beta=beta, segments=2, tau=-1.0)
    merged = choose(method, tokens, k)
    x = tokens.features[0].view(frames, n, -1).double().numpy()
    a = tokens.received_attention[0].view(frames, n).numpy()
    # five a frame, two segments of four frames with one anchor each: 8 of 20 are merged, 3 of each frame stay
    kept = [set(np.argsort(-row, kind="stable")[:3]) for row in a]
    slots = merged.slots[0].tolist()
    for start in (0, 4):
        anchor = start + 3
        context = [s - anchor * n for s in slots if s // n == anchor and s % n not in kept[anchor]]
        assert len(context) == 8
        others = [(t, i) for t in range(start, start + 4) for i in range(n) if i not in kept[t]]
        pool = np.array([x[t, i] for t, i in others if t != anchor or i not in context])
        for number, i in enumerate(context):
            want = row_by_hand(x[anchor][context], pool, number, beta)
            got = merged.features[0, slots.index(anchor * n + i)].numpy()
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    salient = [t * n + i for t in range(frames) for i in kept[t]]
    at = [slots.index(s) for s in salient]
    assert torch.equal(merged.features[0, at], tokens.features[0, salient])


def test_cuts_are_the_lowest_cosines_and_all_below_the_threshold() -> None:
    s = torch.tensor([0.99, 0.2, 0.99, 0.5, 0.98])
    assert cuts(s, 1, 0.6) == [1, 3] and cuts(s, 4, 0.6) == [1, 3, 4] and cuts(s, 5, 0.0) == [0, 1, 3, 4]
    assert cuts(s[:0], 8, 0.9) == []
    assert segments_of([1, 3], 6) == [range(2), range(2, 4), range(4, 6)]
    assert anchors(range(3, 12), 4) == [3, 7, 11]


def test_copies_are_one_peak_and_the_first_of_them() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens(
        features=x.repeat_interleave(3, dim=0)[None],
        received_attention=torch.zeros(1, 18),
        grids=((3, 6),),
        frames=True,
    )
    merged = choose(FastVID(d=1.0), tokens, 6)
    assert merged.slots[0].tolist() == list(range(0, 18, 3))
    torch.testing.assert_close(merged.features[0], x)


@pytest.mark.parametrize("rule", ["onevision", "video", "qwen"])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_official_counts_exist_for_clips_that_crash_there(rule: str, frames: int) -> None:
    (merged,) = choose_own(FastVID(variant="official", rule=rule), clip_of(frames, 16, seed=1))
    assert 0 < merged.slots.shape[0] <= 4 * frames


def test_frame_vectors_decide_where_a_segment_ends() -> None:
    tokens = clip_of(4, 12, seed=2, scenes=1)
    vectors = torch.eye(4)[None, [0, 0, 1, 1]]
    given = {name: getattr(tokens, name) for name in ("features", "received_attention", "grids", "frames")}
    method = FastVID(segments=1)
    own = choose(method, tokens, 12).slots[0] // 12
    told = choose(method, VisualTokens(frame_vectors=vectors, **given), 12).slots[0] // 12
    assert torch.bincount(own).tolist() == [2, 2, 2, 6] and torch.bincount(told).tolist() == [2, 4, 2, 4]


def with_head() -> Any:
    """A tiny LLaVA-OneVision whose tower has its pooling head, as its config allows."""
    model = tiny_model("llava_onevision")
    tower = next(one for one in model.model.vision_tower.modules() if hasattr(one, "use_head"))
    torch.manual_seed(3)
    tower.use_head, tower.head = True, SiglipMultiheadAttentionPoolingHead(tower.config)
    tower.head.attention.in_proj_weight.data.normal_(0, 0.5)
    return model.eval()


def test_vectors_and_attention_are_those_of_the_head_of_the_tower() -> None:
    model = with_head()
    inputs = tiny_inputs("llava_onevision", images=(0,), video=True)
    seen: list[tuple[Tensor, Tensor]] = []
    head = next(one for one in model.model.vision_tower.modules() if hasattr(one, "head")).head

    def read(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        hidden = args[0]  # (T, n, C)
        probe = head.probe.expand(len(hidden), -1, -1)
        weights = torch.nn.functional.multi_head_attention_forward(
            *(x.transpose(0, 1) for x in (probe, hidden, hidden)),
            hidden.shape[2],
            head.attention.num_heads,
            head.attention.in_proj_weight,
            head.attention.in_proj_bias,
            None,
            None,
            False,
            0.0,
            head.attention.out_proj.weight,
            head.attention.out_proj.bias,
            average_attn_weights=False,
        )[1]
        seen.append((weights[:, :, 0].mean(dim=1), output))

    found: list[VisualTokens] = []

    class Spy(FastVID):
        def merge(self, tokens: VisualTokens, k: int) -> Merged:
            found.append(tokens)
            return super().merge(tokens, k)

    handle = head.register_forward_hook(read)
    method = Spy(by="head")
    with torch.no_grad(), vlmprune.prune(model, method, keep=0.25) as run:
        model(**inputs)
        assert run.last is not None and run.last.pruned
    handle.remove()
    (tokens,), (weights, vectors) = found, seen[-1]
    frames, side = len(tokens.grids), int(weights.shape[1] ** 0.5)
    packed = model.model.apply_pooling(weights.view(frames, side * side, 1)).flatten()
    torch.testing.assert_close(tokens.need("pooling_attention")[0], packed)
    torch.testing.assert_close(tokens.need("frame_vectors")[0], vectors)
    # both decide: other vectors cut the clip elsewhere, other attention keeps other tokens
    assert vectors.std(dim=0).max() > 0 and weights.std() > 0


def test_a_tower_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"no pooling head.*vision_use_head=False.*without by=head"):
        vlmprune.attach(tiny_model("llava_onevision"), "fastvid(by=head)@0.25")


def test_attention_and_vectors_of_a_head_decide() -> None:
    tokens = clip_of(4, 12, seed=2, scenes=1)
    vectors = torch.eye(4)[None, [0, 0, 1, 1]]
    other = 1 - tokens.need("received_attention")
    given = VisualTokens(
        features=tokens.features,
        received_attention=other,
        pooling_attention=tokens.received_attention,
        frame_vectors=vectors,
        grids=tokens.grids,
        frames=True,
    )
    plain = replace(given, received_attention=tokens.received_attention)
    one, two = FastVID(segments=1, by="head"), FastVID(segments=1)
    assert torch.equal(choose(one, given, 12).slots, choose(two, plain, 12).slots)
    assert not torch.equal(choose(one, given, 12).slots, choose(two, given, 12).slots)
    with pytest.raises(CaptureError, match="frame_vectors"):
        choose(one, replace(given, frame_vectors=None), 12)


@pytest.mark.parametrize("text", ["rule=image", "by=both", "d=1.5", "p=0", "tau=2", "variant=paper"])
def test_bad_options_are_refused(text: str) -> None:
    name, value = text.split("=")
    number = (float if "." in value else int)(value) if value[0].isdigit() else value
    with pytest.raises(SpecError, match=name):
        FastVID(**{name: number})
