# SPDX-License-Identifier: Apache-2.0
"""Stories: what is seen in each frame of a clip, and a question whose answer is known. Nothing is rendered.

In every clip some things stand still from the first frame to the last, and one or a few do what the family of
the question is about. No two things share a shape, but for those that are counted, so that a shape names one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..shapes.scene import CANVAS, PITCH, TEXTURES, Scene, Thing
from ..shapes.vocabulary import COLORS, PLURALS, SHAPES

FRAMES = 8
STILL = 3  # things that stand still, where nothing says otherwise
COUNTS = ("1", "2", "3", "4")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
YES_NO = ("yes", "no")
FIRST_OR_SECOND = ("0", "1")  # which of the two things that are named comes first
_TRIES = 60  # places tried for a thing
_LARGE, _SMALL = (14.0, 17.0), (9.5, 11.5)  # radius in pixels of what happens, and of what stands still


@dataclass(frozen=True)
class Story:
    """A clip and what is asked about it.

    Args:
        frames: the scene of every frame.
        asked: in every frame the numbers of the things asked about.
        seed: of the noise of the camera, which differs from frame to frame.
    """

    frames: tuple[Scene, ...]
    asked: tuple[tuple[int, ...], ...]
    question: str
    answer: str
    seed: int


@dataclass(frozen=True)
class Kind:
    """One kind of question; ``answers`` are equally frequent, so that a guesser gets ``1 / len(answers)``."""

    name: str
    answers: tuple[str, ...]
    tell: Callable[[np.random.Generator, str], Story | None]


class _Stage:
    """A clip in the making: things are put where nothing else ever is."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.shapes = [str(one) for one in rng.permutation(SHAPES)]
        self.colors = [str(one) for one in rng.permutation(list(COLORS))]
        self.taken: list[tuple[float, float, float]] = []  # (x, y, radius) of all things, of any frame
        self.things: list[list[Thing]] = [[] for _ in range(FRAMES)]  # by frame
        self.asked: list[list[int]] = [[] for _ in range(FRAMES)]  # by frame: places in the list of things

    def place(self, radius: float, quadrant: str | None = None) -> tuple[float, float] | None:
        """A free place, near the middle of a patch; None where there is hardly one."""
        for _ in range(_TRIES):
            x, y = (
                PITCH * (int(self.rng.integers(CANVAS // PITCH)) + 0.5) + float(self.rng.uniform(-2, 2))
                for _ in range(2)
            )
            # the whole thing is on the canvas
            inside = all(radius + 2 < value < CANVAS - radius - 2 for value in (x, y))
            # not near a line between quadrants, or it would be hard to say which
            clear = quadrant is None or (
                min(abs(x - CANVAS / 2), abs(y - CANVAS / 2)) > 10 and _quadrant(x, y) == quadrant
            )
            if inside and clear and all(_apart(x, y, radius, one) for one in self.taken):
                self.taken.append((x, y, radius))
                return x, y
        return None

    def thing(self, shape: str, color: str, radius: float, place: tuple[float, float]) -> Thing:
        red, green, blue = np.clip(np.array(COLORS[color]) + self.rng.integers(-12, 13, 3), 0, 255).tolist()
        angle = float(self.rng.uniform(-0.2, 0.2))
        return Thing(shape, color, "large", *place, radius, angle, (red, green, blue))

    def new(self, shape: str, color: str, large: bool = True) -> Thing | None:
        """A thing where there is room for it."""
        radius = float(self.rng.uniform(*(_LARGE if large else _SMALL)))
        place = self.place(radius)
        return None if place is None else self.thing(shape, color, radius, place)

    def show(self, thing: Thing, frames: Sequence[int], asked: bool = False) -> None:
        for t in frames:
            self.things[t].append(thing)
            if asked:
                self.asked[t].append(len(self.things[t]) - 1)  # the number of the thing in this frame

    def stand_still(self, shapes: Sequence[str], colors: Sequence[str]) -> bool:
        """Things that are there all the time; False where one finds no room."""
        for shape, color in zip(shapes, colors, strict=True):
            made = self.new(shape, color, large=False)
            if made is None:
                return False
            self.show(made, range(FRAMES))
        return True

    def story(self, question: str, answer: str) -> Story:
        texture, texture_seed = str(self.rng.choice(TEXTURES)), int(self.rng.integers(2**31))
        # the scene without things; the same ground in every frame
        bare = Scene(
            "clip",
            (),
            (0, 0, CANVAS, CANVAS),
            (0, 0, 0),
            texture,
            int(self.rng.integers(8)),
            0.0,  # no noise: the camera adds its own to every frame
            texture_seed,
        )
        frames = tuple(replace(bare, things=tuple(things)) for things in self.things)
        asked = tuple(map(tuple, self.asked))
        return Story(frames, asked, question, answer, int(self.rng.integers(2**31)))


def _quadrant(x: float, y: float) -> str:
    return f"{'top' if y < CANVAS / 2 else 'bottom'} {'left' if x < CANVAS / 2 else 'right'}"


def _apart(x: float, y: float, radius: float, other: tuple[float, float, float]) -> bool:
    # boxes, not circles: apart along one axis is enough
    gap = radius + other[2] + 3
    return abs(x - other[0]) > gap or abs(y - other[1]) > gap


def _article(color: str) -> str:
    return "an" if color == "orange" else "a"


def _moment(rng: np.random.Generator, answer: str) -> Story | None:
    """A thing is there in one frame only; "no" asks for its shape or its colour on something else."""
    stage = _Stage(rng)
    shape, color = stage.shapes[0], stage.colors[0]
    made = stage.new(shape, color)
    if made is None or not stage.stand_still(stage.shapes[1:4], stage.colors[1:4]):
        return None
    # drawn for both answers, which must be about the same clip
    crossed = (shape, stage.colors[1]) if rng.random() < 0.5 else (stage.shapes[1], color)
    named = (shape, color) if answer == "yes" else crossed
    stage.show(made, [int(rng.integers(FRAMES))], asked=True)
    return stage.story(f"is there {_article(named[1])} {named[1]} {named[0]} ?", answer)


def _named(name: str) -> Callable[[np.random.Generator, str], Story | None]:
    """What colour is a thing that stands still, that appears half-way, or that changes its colour there?"""

    def tell(rng: np.random.Generator, answer: str) -> Story | None:
        stage = _Stage(rng)
        # no other thing has the colour that is the answer
        others = [color for color in stage.colors if color != answer]
        made = stage.new(stage.shapes[0], answer)
        if made is None or not stage.stand_still(stage.shapes[1 : 1 + STILL], others[:STILL]):
            return None
        # half-way, or a frame earlier or later
        turn = int(rng.integers(FRAMES // 2 - 1, FRAMES // 2 + 2))
        end = " in the last frame" if name == "change" else ""
        # the same thing in another colour, at the same place, until it changes
        if name == "change":
            before = stage.thing(made.shape, others[STILL], made.radius, (made.x, made.y))
            stage.show(replace(before, angle=made.angle), range(turn))
        stage.show(made, range(0 if name == "still" else turn, FRAMES), asked=True)
        return stage.story(f"what color is the {made.shape}{end} ?", answer)

    return tell


def _count(rng: np.random.Generator, answer: str) -> Story | None:
    """Things of one shape, each in one frame and in a place of its own."""
    stage = _Stage(rng)
    shape, number = stage.shapes[0], int(answer)
    made = [stage.new(shape, str(rng.choice(list(COLORS)))) for _ in range(number)]
    if None in made or not stage.stand_still(stage.shapes[1:3], stage.colors[1:3]):
        return None
    # strict=False: there are fewer things than frames, and each gets a frame of its own
    for one, t in zip(made, rng.permutation(FRAMES), strict=False):
        if one is not None:
            stage.show(one, [int(t)], asked=True)
    return stage.story(f"how many {PLURALS[shape]} are there ?", answer)


def _move(rng: np.random.Generator, answer: str) -> Story | None:
    """A thing goes in a straight line from one quadrant to another; where is it in the end?"""
    stage = _Stage(rng)
    shape, color = stage.shapes[0], stage.colors[0]
    start = str(rng.choice([one for one in QUADRANTS if one != answer]))
    radius = float(rng.uniform(*_SMALL))
    begin = stage.place(radius, start)
    end = stage.place(radius, answer)
    if begin is None or end is None:
        return None
    (x0, y0), (x1, y1) = begin, end
    way = [t / (FRAMES - 1) for t in range(FRAMES)]
    line = [(x0 + s * (x1 - x0), y0 + s * (y1 - y0)) for s in way]
    # nothing may stand anywhere on its way
    stage.taken += [(*place, radius) for place in line]
    if not stage.stand_still(stage.shapes[1:3], stage.colors[1:3]):
        return None
    made = stage.thing(shape, color, radius, line[0])
    for t, (x, y) in enumerate(line):
        stage.show(replace(made, x=x, y=y), [t], asked=True)
    return stage.story(f"where is the {color} {shape} in the last frame ?", answer)


def _order(rng: np.random.Generator, answer: str) -> Story | None:
    """Two things are there for a while, one after the other."""
    stage = _Stage(rng)
    made = [stage.new(stage.shapes[i], stage.colors[i]) for i in range(2)]
    if made[0] is None or made[1] is None or not stage.stand_still(stage.shapes[2:4], stage.colors[2:4]):
        return None
    # the first is gone when the second comes
    early, late = int(rng.integers(0, 3)), int(rng.integers(4, 7))
    stage.show(made[0], range(early, early + 2), asked=True)
    stage.show(made[1], range(late, min(late + 2, FRAMES)), asked=True)
    # "0": the question names the earlier one first
    names = [f"{one.color} {one.shape}" for one in made if one is not None]
    said = names if answer == "0" else names[::-1]
    return stage.story(f"which comes first , the {said[0]} or the {said[1]} ?", names[0])


FAMILIES = (
    Kind("still", tuple(COLORS), _named("still")),
    Kind("moment", YES_NO, _moment),
    Kind("appear", tuple(COLORS), _named("appear")),
    Kind("count", COUNTS, _count),
    Kind("change", tuple(COLORS), _named("change")),
    Kind("move", QUADRANTS, _move),
    Kind("order", FIRST_OR_SECOND, _order),
)
