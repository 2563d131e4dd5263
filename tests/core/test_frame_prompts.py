# SPDX-License-Identifier: Apache-2.0
"""Images of a prompt that the user calls the frames of one clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlmprune
from vlmprune.core.budget import Budget
from vlmprune.core.method import Merged, Method, needs_of
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.evaluation.tasks.clips import clips
from vlmprune.hooks.slots.before_lm import cut_pictures
from vlmprune.hooks.vision.pictures import Picture
from vlmprune.testing.conformance import generate, shared_model
from vlmprune.testing.reference import greedy, kept_by_hand
from vlmprune.testing.tiny import tiny_inputs, tiny_row


def image(values: list[float], special: list[int] | None = None, **more: Any) -> Picture:
    """A picture of one row of tokens; the first feature of each is given, slots ``special`` are none."""
    marks = torch.zeros(len(values) + len(special or []), dtype=torch.bool)
    marks[special or []] = True
    features = torch.zeros(len(marks), 2)
    features[~marks, 0] = torch.tensor(values, dtype=torch.float)
    more = {"grids": ((1, len(values)),), **more}
    return Picture(features, special=marks if special else None, **more)


def cut(pictures: list[Picture], keep: int, method: Method, scope: str = "image") -> list[Any]:
    """What is cut of pictures that are the frames of one clip."""
    sample = list(range(len(pictures)))
    budget, needs = Budget(keep, scope), needs_of(method)
    return cut_pictures(pictures, [sample], method, budget, lambda x: x, needs=needs, frames=True)


def kept(cuts: list[Any]) -> list[list[int]]:
    return [one.keep_idx.tolist() for one in cuts]


class First(Method):
    """Scores tokens by their first feature."""

    name, needs = "first", ("features",)

    def score(self, tokens: Any) -> torch.Tensor:
        return tokens.need("features")[..., 0]


class Last(Method):
    """Merged rows 0, 1, ... at the last tokens, the last one first."""

    name = "last"

    def merge(self, tokens: Any, k: int) -> Merged:
        slots = torch.arange(tokens.count - 1, tokens.count - 1 - k, -1)[None]
        return Merged(torch.arange(k, dtype=torch.float)[None, :, None].expand(1, k, 2).clone(), slots)


class Placeless(Last):
    """The same, but for the first row, which stands for no token."""

    name = "placeless"

    def merge(self, tokens: Any, k: int) -> Merged:
        merged = super().merge(tokens, k)
        merged.slots[:, 0] = -1
        return merged


FAMILIES = ("llava", "internvl", "smolvlm", "qwen2_5_vl")
SQUARE = (168, 168)


def clip_inputs(family: str, images: tuple[int, ...]) -> dict[str, Any]:
    return tiny_inputs(family, images=images, size=SQUARE if family.startswith("qwen") else None)


def projected(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """(N, D) what the language model would read of all images, in order."""
    with vlmprune.prune(model, "dense") as run, torch.no_grad():
        seen: list[Picture] = []
        pictures = run.adapter.pictures

        def watched(*args: Any) -> list[Picture]:
            made = pictures(*args)
            seen.extend(made)
            return made

        run.adapter.pictures = watched
        model(**inputs)
    return torch.cat([picture.features for picture in seen])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_for_clips_chooses_among_all_frames_together(family: str) -> None:
    model, inputs = shared_model(family, None, None), clip_inputs(family, (3,))
    with vlmprune.prune(model, "evs@0.5", frames=True) as run:
        got = generate(model, inputs, max_new_tokens=4)
    maps, positions = run.last.keep, run.positions
    x = projected(model, inputs)
    whole = vlmprune.select("evs@0.5", features=x[None], frames=True, grid=tuple(one.grid for one in maps))
    found, start = [], 0
    for one in maps:
        found += [start + i for i in one.keep_idx.tolist()]
        start += one.total
    assert found == whole[0].tolist() and len(maps) == 3
    by_hand = kept_by_hand(model, inputs, maps, positions)[0]
    assert got[0].tolist() == greedy(model, by_hand, 4)


@pytest.mark.parametrize(
    "spec", ["evs@0.5", "holitom@0.5", "fastvid@40", "prunevid@0.5", "pool@30", "random@7"]
)
def test_a_row_of_clips_of_different_length_is_answered_as_it_is_alone(spec: str) -> None:
    images = (3, 2)
    model, inputs = shared_model("llava", None, None), clip_inputs("llava", images)
    with vlmprune.prune(model, spec, frames=True) as run:
        both = generate(model, inputs, max_new_tokens=4)
        tokens = run.last.realised_tokens
    budget = vlmprune.parse(spec).parts[0].budget
    assert [sum(tokens[:3]), sum(tokens[3:])] == [budget.count(36 * count) for count in images]
    for row in range(2):
        with vlmprune.prune(model, spec, frames=True):
            alone = generate(model, tiny_row(inputs, "llava", row, images), max_new_tokens=4)
        assert torch.equal(alone[0], both[row])


def test_a_frame_may_lose_all_its_tokens_and_one_budget_per_crop_is_one_per_frame() -> None:
    model, inputs = shared_model("llava", None, None), clip_inputs("llava", (3,))
    with vlmprune.prune(model, "evs@36", frames=True) as run:
        got = generate(model, inputs, max_new_tokens=4)
    assert run.last.realised_tokens == [36, 0, 0]
    by_hand = kept_by_hand(model, inputs, run.last.keep, run.positions)[0]
    assert got[0].tolist() == greedy(model, by_hand, 4)
    with vlmprune.prune(model, "fastervlm@5/crop", frames=True) as run, torch.no_grad():
        model(**inputs)
    assert run.last.realised_tokens == [5, 5, 5]


def test_a_method_that_counts_by_itself_keeps_newlines_of_empty_frames() -> None:
    class Chosen(Method):
        name, counts, needs = "chosen", "own", ("features",)

        def own(self, tokens: Any) -> torch.Tensor:
            assert tokens.frames
            return tokens.need("features")[..., 0] > 2

    pictures = [image([3, 1], [2]), image([0, 1], [2])]
    needs = needs_of(Chosen())
    found = cut_pictures(pictures, [[0, 1]], Chosen(), None, lambda x: x, needs=needs, frames=True)
    assert [one.kept_slots.tolist() for one in found] == [[0, 2], [2]]


def test_merged_rows_go_to_the_frame_whose_token_they_take() -> None:
    pictures = [image([0, 1, 2]), image([3, 4, 5]), image([6, 7])]
    found = cut(pictures, 4, Last())
    assert kept(found) == [[], [2, 1], [1, 0]]
    assert [one.rows[:, 0].tolist() for one in found] == [[], [2, 3], [0, 1]]
    with pytest.raises(UnsupportedError, match=r"stand for no single token.*16/crop"):
        cut(pictures, 4, Placeless())


def test_what_cannot_be_a_frame_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="image 1 was cut into 2 blocks of tokens"):
        cut([image([0, 1]), image([0, 1], grids=((1, 1), (1, 1)))], 1, First())
    with pytest.raises(UnsupportedError, match="holds a clip already"):
        cut([image([0, 1], frames=True)], 1, First())
    assert kept(cut([image([0, 5]), image([7, 1])], 2, First(), "total")) == [[1], [0]]
    model = shared_model("llava", None, None)
    with pytest.raises(UnsupportedError, match=r"fastv cuts inside the language model.*frames=True"):
        vlmprune.prune(model, "fastv@0.5", frames=True)
    with pytest.raises(SpecError, match="frames=3 is unknown; expected one of"):
        vlmprune.prune(model, "evs@0.5", frames=3)
    with pytest.raises(UnsupportedError, match="say so by frames=True"):
        vlmprune.prune(model, "evs@0.5")
    frames = shared_model("llava_next", None, None)
    with (
        vlmprune.prune(frames, "evs@0.5", frames=True),
        pytest.raises(UnsupportedError, match="without tiles"),
    ):
        frames(**tiny_inputs("llava_next", images=(2,)))


class Twos(Method):
    """Merged rows of two neighbours each, in the place of the first, from the first token on."""

    name = "twos"

    def merge(self, tokens: Any, k: int) -> Merged:
        number = torch.arange(tokens.count) // 2
        joins = torch.where(number < k, number, -1)[None]
        return Merged(torch.zeros(1, k, 2), 2 * torch.arange(k)[None], joins=lambda: joins)


def test_what_a_row_is_made_of_is_counted_in_the_clip() -> None:
    cuts = cut([image([1, 2, 3]), image([4, 5, 6]), image([7, 8])], 3, Twos())
    assert kept(cuts) == [[0, 2], [1], []]
    assert [one.joins().tolist() for one in cuts] == [[0, 0, 2], [2, 4, 4], [-1, -1]]


def test_it_is_in_the_report_of_a_forward() -> None:
    """On the model of the package: pool drops nothing, and each frame knows what its patches are part of."""
    model, processor = vlmprune.load("tiny")
    sample = clips().samples("dev", 1)[0]
    text = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
    inputs = processor(images=sample.load_images(), text=text, return_tensors="pt")
    with vlmprune.prune(model, "pool@80", frames=True) as run, torch.no_grad():
        model(**inputs)
    maps = run.last.keep
    assert len(maps) == 8 and sum(map(len, maps)) == 80
    for number, one in enumerate(maps):
        assert one.merged is not None and bool((one.merged | one.mask).all())
        for token in one.keep_idx.tolist():
            assert token in one.members(number * one.total + token).tolist()
    with vlmprune.prune(model, "vidcom2@80", frames=True) as run, torch.no_grad():
        model(**inputs)
    assert all(one.merged is None for one in run.last.keep)
