# SPDX-License-Identifier: Apache-2.0
"""Questions about scenes: one function per family, each of which can be asked for a given answer.

A question names its *mentions*: which word of it stands for which things. They say where the asked objects
are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from .scene import CANVAS, Scene, Thing
from .vocabulary import COLORS, COUNTS, DIGITS, ORDER, PLURALS, SHAPES, SIGN, SIZES

Places = tuple[tuple[int, int], ...]  # (image, thing) pairs
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
YES_NO = ("yes", "no")
T = TypeVar("T")


@dataclass(frozen=True)
class Mention:
    """Word number ``word`` of the question, split at spaces, stands for ``things``; maybe for none."""

    word: int
    things: Places


@dataclass(frozen=True)
class Question:
    """A question with its answer. ``history`` holds earlier questions about the same images."""

    family: str
    template: str
    text: str
    answer: str
    mentions: tuple[Mention, ...]
    history: tuple[Question, ...] = ()

    @property
    def asked(self) -> Places:
        """The things asked about in the last turn, or before where it only refers back."""
        # "what size is it ?" names nothing: "it" was named in the turn before
        mentions = self.mentions or self.history[-1].mentions
        # each place once, in order
        return tuple(dict.fromkeys(place for mention in mentions for place in mention.things))


@dataclass(frozen=True)
class Template:
    """``answers`` are equally frequent in the benchmark: 1 / len(answers) is what a guesser gets."""

    family: str
    name: str
    kind: str  # of the scenes it is asked about
    answers: tuple[str, ...]  # empty: free strings
    make: Callable[[Sequence[Scene], np.random.Generator, str], Question | None]
    images: int = 1


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T | None:
    return options[int(rng.integers(len(options)))] if options else None


def _unique(things: Sequence[Thing], key: Callable[[Thing], object]) -> list[int]:
    """Indices of things that no other thing shares the key with."""
    counts = Counter(key(thing) for thing in things)
    # a sign counts, so that nothing is unique that shares its colour, but is never asked about
    return [i for i, thing in enumerate(things) if counts[key(thing)] == 1 and not thing.text]


def _pair(thing: Thing) -> tuple[str, str]:
    return thing.color, thing.shape


def _shape(thing: Thing) -> str:
    return thing.shape


def _color(thing: Thing) -> str:
    return thing.color


def _name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _with_article(color: str, shape: str) -> str:
    return f"{'an' if color == 'orange' else 'a'} {color} {shape}"


_NAMING: dict[str, tuple[str, Callable[[Thing], object], Callable[[Thing], str]]] = {
    # property asked for -> (question, what must be unique, how the thing is then called)
    "color": ("what color is the {} ?", _shape, _shape),
    "shape": ("what shape is the {} object ?", _color, _color),
    "size": ("what size is the {} ?", _pair, _name),
    "where": ("where is the {} ?", _pair, _name),
}
PROPERTIES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "where": QUADRANTS,
}


def _property(thing: Thing, name: str) -> str | None:
    """What is true of a thing; None where it is too close to a border between two answers."""
    if name != "where":
        return getattr(thing, name)
    # from the centre of the thing to the nearer line between quadrants
    near = min(abs(thing.x - CANVAS / 2), abs(thing.y - CANVAS / 2)) < 6
    return None if near else " ".join(thing.place())


def _about(
    scene: Scene, rng: np.random.Generator, name: str, answer: str, only: Sequence[int] | None = None
) -> Question | None:
    """Ask for a property of one thing that is named uniquely and has this answer."""
    text, key, call = _NAMING[name]
    named = [i for i in _unique(scene.things, key) if only is None or i in only]
    fitting = [i for i in named if _property(scene.things[i], name) == answer]
    i = _pick(rng, fitting)
    if i is None:
        return None
    words = text.format(call(scene.things[i]))
    # the last word but one: the question mark is a word
    return Question("", name, words, answer, (Mention(len(words.split()) - 2, ((0, i),)),))


def _family(family: str, name: str) -> Callable[[Sequence[Scene], np.random.Generator, str], Question | None]:
    # the first thing of such a scene is the needle
    only = (0,) if family == "needle" else None

    def make(scenes: Sequence[Scene], rng: np.random.Generator, answer: str) -> Question | None:
        question = _about(scenes[0], rng, name, answer, only)
        return question and replace(question, family=family)

    return make


def _exist(scenes: Sequence[Scene], rng: np.random.Generator, answer: str) -> Question | None:
    things = [thing for thing in scenes[0].things if not thing.text]
    present = sorted({_pair(thing) for thing in things})
    if answer == "yes":
        pair = _pick(rng, present)
    else:  # four of five: both words are true of something, but not of one thing
        colors, shapes = {c for c, _ in present}, {s for _, s in present}
        crossed = [(c, s) for c in sorted(colors) for s in sorted(shapes) if (c, s) not in present]
        absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
        pair = _pick(rng, crossed if rng.random() < 0.8 else absent)
    if pair is None:
        return None
    return Question(
        "exist",
        "exist",
        f"is there {_with_article(*pair)} ?",
        answer,
        (Mention(4, _matching(scenes, 0, *pair)),),  # word 4 of "is there a red circle ?"
    )


def _matching(scenes: Sequence[Scene], image: int, color: str | None, shape: str | None) -> Places:
    shapes = [(i, thing) for i, thing in enumerate(scenes[image].things) if not thing.text]
    return tuple((image, i) for i, t in shapes if color in (None, t.color) and shape in (None, t.shape))


def _count(scenes: Sequence[Scene], rng: np.random.Generator, answer: str) -> Question | None:
    by = str(rng.choice(("color", "shape")))
    counts = Counter(getattr(thing, by) for thing in scenes[0].things)
    word = _pick(rng, sorted(value for value, n in counts.items() if n == int(answer)))
    if word is None:
        return None
    name = f"{word} objects" if by == "color" else PLURALS[word]
    found = _matching(scenes, 0, word if by == "color" else None, word if by == "shape" else None)
    # the noun: "how many red objects", "how many circles"
    return Question(
        "count", "count", f"how many {name} are there ?", answer, (Mention(3 if by == "color" else 2, found),)
    )


_RELATIONS = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}


def _two(
    scenes: Sequence[Scene],
    rng: np.random.Generator,
    answer: str,
    family: str,
    relation: str,
    holds: Callable[[Thing, Thing], bool | None],
) -> Question | None:
    """Is the first thing in this relation to the second? ``holds`` is None where it is too close to call."""
    things = scenes[0].things
    unique = _unique(things, _pair)
    fitting = [
        (i, j) for i in unique for j in unique if i != j and holds(things[i], things[j]) is (answer == "yes")
    ]
    pair = _pick(rng, fitting)
    if pair is None:
        return None
    text = f"is the {_name(things[pair[0]])} {relation} the {_name(things[pair[1]])} ?"
    mentions = (Mention(3, ((0, pair[0]),)), Mention(len(text.split()) - 2, ((0, pair[1]),)))
    return Question(family, family, text, answer, mentions)


def _spatial(scenes: Sequence[Scene], rng: np.random.Generator, answer: str) -> Question | None:
    relation = str(rng.choice(list(_RELATIONS)))
    axis, sign = _RELATIONS[relation]

    def holds(a: Thing, b: Thing) -> bool | None:
        ahead = sign * (getattr(b, axis) - getattr(a, axis))
        return None if abs(ahead) < 24 else ahead > 0

    return _two(scenes, rng, answer, "spatial", relation, holds)


def _compare(scenes: Sequence[Scene], rng: np.random.Generator, answer: str) -> Question | None:
    relation, order = str(rng.choice(("larger", "smaller"))), list(SIZES).index

    def holds(a: Thing, b: Thing) -> bool | None:
        return None if a.size == b.size else (order(a.size) > order(b.size)) is (relation == "larger")

    return _two(scenes, rng, answer, "compare", f"{relation} than", holds)


def _text(scenes: Sequence[Scene], rng: np.random.Generator, answer: str) -> Question | None:
    i = _pick(rng, [i for i, thing in enumerate(scenes[0].things) if thing.text])
    if i is None:
        return None
    sign = scenes[0].things[i]
    digits = set(sign.text) <= set(DIGITS)
    text = (
        f"what number is on the {sign.color} {SIGN} ?"
        if digits
        else f"what does the {sign.color} {SIGN} say ?"
    )
    # letter by letter: each is a word of the tokenizer
    return Question(
        "text", "text", text, " ".join(sign.text.lower()), (Mention(6 if digits else 4, ((0, i),)),)
    )


def _second_turn(
    name: str, text: str
) -> Callable[[Sequence[Scene], np.random.Generator, str], Question | None]:
    """First ask what the thing is or whether it is there, then ask for ``name`` of "it"."""

    def make(scenes: Sequence[Scene], rng: np.random.Generator, answer: str) -> Question | None:
        things = scenes[0].things
        fits = [i for i in _unique(things, _pair) if _property(things[i], name) == answer]
        if name == "color" or rng.random() < 0.5:  # the first turn must not tell the answer
            other = "size" if name == "color" else "shape"
            # the first turn names it by one word, which must be its own
            fits = [i for i in fits if i in _unique(things, _shape if name == "color" else _color)]
            i = _pick(rng, fits)
            if i is None:
                return None
            call = things[i].shape if name == "color" else f"{things[i].color} object"
            first = Question("", other, f"what {other} is the {call} ?", getattr(things[i], other), ())
        else:
            i = _pick(rng, fits)
            if i is None:
                return None
            first = Question("", "exist", f"is there {_with_article(*_pair(things[i]))} ?", "yes", ())
        first = replace(first, mentions=(Mention(len(first.text.split()) - 2, ((0, i),)),))
        return Question("two_turn", name, text, answer, (), (first,))

    return make


def _in_image(scenes: Sequence[Scene], rng: np.random.Generator, answer: str, name: str) -> Question | None:
    """Questions about one of two images whose other image would give another answer."""
    k = int(rng.integers(2))
    here, other = scenes[k].things, scenes[1 - k].things
    prefix = f"in the {ORDER[k]} image , "
    if name == "color":
        # the other image has such a shape in another colour
        shared = [t.shape for t in (other[j] for j in _unique(other, _shape)) if t.color != answer]
        fits = [i for i in _unique(here, _shape) if here[i].color == answer and here[i].shape in shared]
        i = _pick(rng, fits)
        if i is None:
            return None
        return Question(
            "multi_image",
            name,
            prefix + f"what color is the {here[i].shape} ?",
            answer,
            (Mention(9, ((k, i),)),),  # in the first image , what color is the circle ?
        )
    # in one of the images and not in the other
    pairs_here, pairs_other = ({_pair(t) for t in things if not t.text} for things in (here, other))
    yes = answer == "yes"
    pair = _pick(rng, sorted(pairs_here - pairs_other if yes else pairs_other - pairs_here))
    if pair is None:
        return None
    text = prefix + f"is there {_with_article(*pair)} ?"
    return Question("multi_image", name, text, answer, (Mention(9, _matching(scenes, k, *pair)),))


def _which(scenes: Sequence[Scene], rng: np.random.Generator, answer: str) -> Question | None:
    k = ORDER.index(answer)
    here, other = ({_pair(t) for t in scene.things if not t.text} for scene in (scenes[k], scenes[1 - k]))
    pair = _pick(rng, sorted(here - other))
    if pair is None:
        return None
    text = f"which image has {_with_article(*pair)} ?"
    return Question("multi_image", "which", text, answer, (Mention(5, _matching(scenes, k, *pair)),))


TEMPLATES: tuple[Template, ...] = (
    Template("exist", "exist", "common", YES_NO, _exist),
    *(
        Template("attribute", name, "common", PROPERTIES[name], _family("attribute", name))
        for name in ("color", "shape", "size")
    ),
    Template("count", "count", "count", COUNTS, _count),
    Template("spatial", "spatial", "common", YES_NO, _spatial),
    Template("compare", "compare", "common", YES_NO, _compare),
    Template("text", "text", "text", (), _text),
    *(
        Template("needle", name, "needle", PROPERTIES[name], _family("needle", name))
        for name in ("color", "shape", "where")
    ),
    Template("position", "where", "common", QUADRANTS, _family("position", "where")),
    Template("two_turn", "size", "common", tuple(SIZES), _second_turn("size", "what size is it ?")),
    Template("two_turn", "where", "common", QUADRANTS, _second_turn("where", "where is it ?")),
    Template("two_turn", "color", "common", tuple(COLORS), _second_turn("color", "what color is it ?")),
    Template(
        "multi_image", "color", "common", tuple(COLORS), lambda s, r, a: _in_image(s, r, a, "color"), images=2
    ),
    Template("multi_image", "exist", "common", YES_NO, lambda s, r, a: _in_image(s, r, a, "exist"), images=2),
    Template("multi_image", "which", "common", ORDER, _which, images=2),
)
FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(template.family for template in TEMPLATES))
