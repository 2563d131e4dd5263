# SPDX-License-Identifier: Apache-2.0
"""DyCoke: thinned frames against a literal transcription, counts, and what a decode step sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vlmprune
from vlmprune.core.method import Look
from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.methods.dycoke import DyCoke, DyCokeDecode, official_thinned, thinned
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model


def clip_of(frames: int, n: int, seed: int, width: int = 6) -> VisualTokens:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, width, generator=random) + torch.randn(frames, n, width, generator=random)
    return VisualTokens(features=x.flatten(0, 1)[None], grids=((1, n),) * frames, frames=True)


def test_groups_are_thinned_against_their_first_and_third_frames() -> None:
    assert [tuple(one) for one in thinned(7)] == [(1, 0), (2, 0), (3, 2), (5, 4), (6, 4)]
    # there the third frame of the last group stays whole, and an odd last frame is lost
    assert [tuple(one) for one in official_thinned(8)] == [(1, 0), (2, 0), (3, 2), (5, 4), (7, 6)]
    assert [tuple(one) for one in official_thinned(9)] == [(1, 0), (2, 0), (3, 2), (5, 4), (6, 4), (7, 6)]


@pytest.mark.parametrize(("frames", "n", "k"), [(4, 10, 22), (9, 7, 40), (2, 6, 7), (6, 5, 29)])
def test_kept_sets_are_those_of_a_transcription(frames: int, n: int, k: int) -> None:
    tokens = clip_of(frames, n, seed=k)
    x = tokens.features[0].view(frames, n, -1).double().numpy()
    u = x / np.linalg.norm(x, axis=-1, keepdims=True)
    whole = [t for t in range(frames) if t % 4 == 0]
    left, pairs = k - len(whole) * n, [t for t in range(frames) if t % 4]
    counts = {t: left // len(pairs) + (i < left % len(pairs)) for i, t in enumerate(pairs)}
    want = [t * n + i for t in whole for i in range(n)]
    for t in pairs:
        like = t - 2 if t % 4 == 2 else t - 1
        order = np.argsort((u[t] * u[like]).sum(-1), kind="stable")
        want += [t * n + int(i) for i in order[: counts[t]]]
    assert choose(DyCoke(), tokens, k)[0].tolist() == sorted(want)


def test_too_few_tokens_are_refused_and_the_least_is_named() -> None:
    tokens = clip_of(6, 5, seed=0)
    with pytest.raises(SpecError, match=r"13 tokens of 6 frames are too few for dycoke.*keep at least 14"):
        choose(DyCoke(), tokens, 13)
    assert len(choose(DyCoke(), tokens, 14)[0]) == 14


def test_the_official_count_has_no_answer_for_four_frames() -> None:
    with pytest.raises(UnsupportedError, match="no answer for 4 frames"):
        choose_own(DyCoke(variant="official"), clip_of(4, 5, seed=0))
    kept = choose_own(DyCoke(variant="official"), clip_of(5, 10, seed=0))[0]
    assert torch.bincount(kept // 10).tolist() == [10, 3, 3, 3]  # an odd last frame is lost


def test_a_single_frame_cannot_be_thinned() -> None:
    with pytest.raises(SpecError, match="keep at least 9"):
        vlmprune.select("dycoke@8", features=torch.randn(1, 9, 4), grid=((3, 3),), frames=True)


# --- while decoding -------------------------------------------------------------------------------


def test_a_step_that_looks_elsewhere_chooses_anew_and_another_one_goes_on() -> None:
    visual = torch.tensor([[False, True, True, True, True, False]])
    first = torch.tensor([[0.0, 0.4, 0.3, 0.2, 0.1, 0.0]])
    near = torch.tensor([[0.0, 0.3, 0.4, 0.2, 0.1, 0.0]])
    far = torch.tensor([[0.0, 0.0, 0.0, 0.1, 0.9, 0.0]])
    method = DyCokeDecode(drop=0.75)
    before = Look(first, method.look(first, visual, None))
    assert before.visible.nonzero()[:, 1].tolist() == [1]
    assert method.look(near, visual, before).nonzero()[:, 1].tolist() == [1]
    assert method.look(far, visual, before).nonzero()[:, 1].tolist() == [4]
    assert torch.equal(DyCokeDecode(drop=0.75, reuse=False).look(near, visual, before), visual)


def test_rows_without_pictures_are_dense_and_nothing_stays() -> None:
    model, inputs = tiny_model(), tiny_inputs(images=(1, 0))
    dense = generate(model, inputs, max_new_tokens=6)
    with vlmprune.prune(model, "dycoke_decode(drop=0.9)"):
        ids = generate(model, inputs, max_new_tokens=6)
    assert torch.equal(ids[1], dense[1]) and not torch.equal(ids[0], dense[0])
    assert torch.equal(ids[:, 0], dense[:, 0]), "the first token is of the prompt"
    assert torch.equal(generate(model, inputs, max_new_tokens=6), dense)


def test_without_a_cache_and_behind_a_cut_inside_it_is_refused() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with (
        vlmprune.prune(model, "dycoke_decode"),
        pytest.raises(UnsupportedError, match="generate with a cache"),
    ):
        generate(model, inputs, use_cache=False)
    with (
        vlmprune.prune(model, "fastv(layer=1)@9+dycoke_decode"),
        pytest.raises(UnsupportedError, match="combine it with a cut before it"),
    ):
        generate(model, inputs)
    with pytest.raises(SpecError, match=r"layer=4 but the language model has layers 0..3"):
        vlmprune.prune(model, "dycoke_decode(layer=4)")


def test_a_second_turn_starts_to_look_anew() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with vlmprune.prune(model, "dycoke_decode(threshold=-1.0)"), torch.no_grad():
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        state = first.past_key_values._vlmprune_state
        assert int(state.look.visible.sum()) == 10  # of 36
        question = torch.cat([first.sequences, torch.full((1, 3), 7)], dim=1)
        model(input_ids=question[:, -4:], past_key_values=first.past_key_values, use_cache=True)
        assert state.look is None
