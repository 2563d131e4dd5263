# SPDX-License-Identifier: Apache-2.0
"""Method: the one interface that all pruning methods share.

A method is a frozen dataclass whose fields are its options. It says in which slot it acts and what it
``needs``, and overrides the verb of that slot:

* before and inside the language model one of ``score(tokens) -> (B, N)`` (higher is kept),
  ``select(tokens, k) -> keep_idx (B, k)`` (the method chooses a set) and ``merge(tokens, k) -> Merged`` (it
  changes features), of several the last, see ``kind``; where the data may say how many tokens stay,
  ``own(tokens)`` beside or in place of it;
* in the attention slot one of ``reweight``, ``relogit`` and ``head_scales``, with at most one source of marks
  (``mark``, ``mark_columns``, ``mark_tokens``); in the decode slot ``visible`` or ``look``, in the encoder
  slot ``shorten``;
* outside of a model, ``shrink`` in the picture slot, which is before the processor, and ``region`` in the
  answer slot, which asks the model again.

It never turns final scores into kept indices, counts budgets or sees a model: that is done once, for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import Tensor
from torch.nn.functional import pad

from ..checks import one_of
from ..errors import SpecError
from .merged import Merged as Merged
from .tokens import VisualTokens

if TYPE_CHECKING:
    from .budget import Budget
    from .encoder import EncoderBlock, Shortened

SlotName = Literal["picture", "encoder", "before_lm", "inside_lm", "attention", "decode", "answer"]
Cutting = Literal["score", "select", "merge"]
Verb = Literal[
    Cutting, "shrink", "shorten", "reweight", "relogit", "head_scales", "visible", "look", "region"
]
Layout = Literal["packed", "spatial"]
Positions = Literal["compact", "original"]  # position ids of the kept sequence: re-counted, or with gaps
Counts = Literal["budget", "own", "both"]
Rows = Literal["text", "last", "all"]  # of a prompt: after the last picture, its last token, every token
Text = Literal["question", "prompt"]  # what stands after the last picture, or all text of the prompt

SLOTS: tuple[SlotName, ...] = get_args(SlotName)
_CUTS: tuple[Verb, ...] = get_args(Cutting)
VERBS: dict[SlotName, tuple[Verb, ...]] = {
    "picture": ("shrink",),
    "encoder": ("shorten",),
    "before_lm": _CUTS,
    "inside_lm": _CUTS,
    "attention": ("reweight", "relogit", "head_scales"),
    "decode": ("visible", "look"),
    "answer": ("region",),
}

What = Literal[
    "features",  # (B, N, D) tokens as the language model would get them
    "encoder_features",  # (B, N, C) patches as the projector takes them
    "cls_attention",  # (B, H, N) attention of [CLS]
    "received_attention",  # (B, N) attention that each patch receives
    "keys",  # (B, N, d) attention keys, mean over heads
    "wide_keys",  # (B, N, C) attention keys of all heads side by side
    "wide_attention",  # (B, N) attention of [CLS], all heads read as one of their full width
    "pooling_attention",  # (B, N) attention of the pooling head of a tower that has one, mean over heads
    "frame_vectors",  # (B, T, C) what that head makes of each frame
    "cls_features",  # (B, T, C) [CLS] rows of the crops
    "projector",  # the projector as a function
    "tile_features",  # (T, n, D) projected rows of the raw crops of a tiled picture
    "text_embeds",  # (B, R, D) embeddings of the text, as the language model would get them
    "text_attention",  # (B, H, R, N) attention of text to the patches, inside the language model
    "text_to_text",  # (B, H, R, R) of the same layer: attention of that text to itself
    "lm_received",  # (B, N) of the same layer: what tokens of a picture get from it, by its strongest head
    "lm_keys",  # (B, N, Hk, d) keys of the layer that ranks, as its attention gets them
    "lm_states",  # (B, N, D) what enters the layer that is cut, through the final norm of the language model
    "layer_inputs",  # (B, N, D) the same through the norm of that layer itself
    "text_inputs",  # (B, R, D) what enters that layer of the text, without a norm
    "text_keys",  # (B, R, Hk, d) and
    "text_states",  # (B, R, D): the same of the text
    "present",  # (B, N, 1) 1 for patches that went through the whole tower, 0 for those left out on the way
]
NEEDS: tuple[What, ...] = get_args(What)
OF_TOWER: tuple[What, ...] = (
    "cls_attention",
    "received_attention",
    "keys",
    "wide_keys",
    "wide_attention",
)  # read from one block of the tower
OF_HEAD: tuple[What, ...] = ("pooling_attention", "frame_vectors")  # read from its pooling head


@dataclass(frozen=True)
class Need:
    """One quantity that a method reads.

    Args:
        what: its name, a field of ``VisualTokens``.
        layer: which layer of the tower, as an index into its hidden states such as -2, or as a share of its
            depth such as 0.375: the first layer from there on that attends to the whole picture; None: the
            one that the model takes its features from. Inside the language model the cut says which layer.
        text: which text, where the quantity is about text.
    """

    what: What
    layer: int | float | None = None
    text: Text | None = None

    def __post_init__(self) -> None:
        one_of("need", self.what, NEEDS)

    def __str__(self) -> str:
        return self.what + ("" if self.layer is None else f"@{self.layer}")


@dataclass(frozen=True, eq=False)
class Look:
    """What a decode step looked at.

    Args:
        attention: (B, S) to the slots held by the layer that was watched, mean over heads, 0 for what is not
            visual.
        visible: (B, S) bool, visual slots that later layers saw.
    """

    attention: Tensor
    visible: Tensor

    def select(self, rows: Tensor) -> Look:
        """The rows of a batch that beam search goes on with."""
        rows = rows.to(self.visible.device)
        return Look(self.attention[rows], self.visible[rows])

    def fit(self, width: int) -> Look:
        """The same over ``width`` slots: later ones are no visual tokens."""
        more = (0, width - self.visible.shape[1])
        return Look(pad(self.attention, more), pad(self.visible, more))


@dataclass(frozen=True)
class CutPoint:
    """One cut inside the language model.

    Args:
        layer: the cut is made at the input of this decoder layer (0-based).
        keep: tokens of the unit that go on; with 0 all leave, and the method is not asked.
        source: the layer whose attention ranks the tokens: ``layer - 1`` or ``layer`` itself; None where no
            attention is read.
    """

    layer: int
    keep: int
    source: int | None


@dataclass(frozen=True)
class Method:
    """Base of all methods; subclasses are frozen dataclasses registered with ``@vlmprune.register(name)``.

    What they answer is on the device of the tokens, or on the CPU where no value of the tokens was read.
    """

    name: ClassVar[str] = ""  # set by register
    slot: ClassVar[SlotName] = "before_lm"
    needs: ClassVar[tuple[Need | What, ...]] = ()  # what to capture; a property where it depends on options
    counts: ClassVar[Counts] = "budget"  # who says how many tokens stay: "@", the data, or either
    query_aware: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    nested: ClassVar[bool] = True  # more budget never removes a token
    budgeted: ClassVar[bool] = True  # takes a keep budget
    positions: ClassVar[Positions] = "compact"
    layout: ClassVar[Layout] = "packed"  # "spatial": choose per raw tile, interleave, drop newlines
    rows: ClassVar[Rows] = "text"  # rows of a prompt that the attention slot edits; afterwards every new one
    skips: ClassVar[tuple[int, ...]] = ()  # ids of tokens whose rows do not rank, where all text does
    # the option with the layers of its cuts, whose default may move, and how far each is behind what ranks
    landing: ClassVar[tuple[str, int] | None] = None
    gated: ClassVar[bool] = False  # is asked by ``leaves`` where ``cuts`` names a layer
    repairs: ClassVar[bool] = False  # is asked by ``repair`` behind its cuts
    # options under which numbers of positions do not matter, where they do: only differences are sure
    sliding: ClassVar[str] = ""
    mark_values: ClassVar[int] = 1  # the largest mark of ``mark_tokens``
    wraps: ClassVar[bool] = False  # takes another method as its field `inner`
    clips: ClassVar[bool] = False  # reads the frames of one clip; images and parts of clips are refused
    paper: ClassVar[str] = ""
    licence: ClassVar[str] = ""  # of the code that was read for facts, if any

    def __init_subclass__(cls) -> None:
        if not cls.__dict__.get("name"):
            cls.name = cls.__name__.lower()  # for messages, until register gives it a name for specs
        if cls.counts == "own":
            cls.budgeted = False

    # --- before and inside the language model -----------------------------------------------------

    def score(self, tokens: VisualTokens) -> Tensor:
        """(B, N) float scores; higher is kept."""
        raise NotImplementedError

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        """(B, k) distinct token indices, any order."""
        raise NotImplementedError

    def ranking(self, tokens: VisualTokens, k: int) -> Tensor:
        """(B, N) finite numbers whose order is that in which ``select`` takes tokens at a budget of k.

        Overridden where a method that chooses a set prefers some tokens to others, for wrappers that re-rank.
        """
        raise NotImplementedError

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        """k rows that replace the tokens."""
        raise NotImplementedError

    def merge_ranked(self, tokens: VisualTokens, k: int, ranking: Tensor) -> Merged:
        """``merge`` that keeps the best of a wrapper's ranking (B, N); overridden where that can be done."""
        raise NotImplementedError

    def own(self, tokens: VisualTokens) -> Tensor | Sequence[Merged]:
        """What stays where no budget is given and ``counts`` is "own" or "both": (B, N) bool, or of a merging
        method one ``Merged`` of one unit for each of the B units. Every unit keeps at least one row, unless
        ``least`` says 0, and its answer must not depend on the other units.
        """
        raise NotImplementedError

    # --- inside the language model ----------------------------------------------------------------

    def later(self, budget: Budget | None) -> tuple[tuple[Method, Budget | None], ...]:
        """Methods of later slots, with their budgets, as which this one goes on; asked when attached."""
        return ()

    def cuts(self, depth: int, budget: Budget | None, count: int) -> tuple[CutPoint, ...]:
        """Where a language model of ``depth`` layers is cut for a unit of ``count`` tokens.

        Layers and sources must not depend on ``count``: hooks are placed before any unit is known.
        """
        raise NotImplementedError

    def leaves(self, text: Tensor, layer: int) -> Tensor:
        """(B,) bool, whether all visual tokens leave at the input of a layer that ``cuts`` names.

        Args:
            text: (B, T, D) states of the text behind the last picture that enter the layer, T at least 2.
        """
        raise NotImplementedError

    def raters(self, text: Tensor, visual: Tensor) -> Tensor | None:
        """(T,) bool, text (T, D) after the picture (N, D) that queries it.

        None: the last token of the prompt, or all of them for a need of ``text="question"``.
        """
        return None

    def repairs_on(self, depth: int) -> Mapping[int, int]:
        """Layers at whose output the answer is repaired, each with the layer whose cut it repairs."""
        raise NotImplementedError

    def repair_context(self, alive: Tensor, dropped: Tensor) -> Tensor:
        """(U, r) what repairs know of U pictures: patches left (U, N), mean state that left (U, D)."""
        raise NotImplementedError

    def repair(self, layer: int, rows: Tensor, context: Tensor) -> Tensor:
        """Repaired rows (B, R, D) of the output of a layer, under the contexts (B, r) of their prompts."""
        raise NotImplementedError

    # --- attention and decode ---------------------------------------------------------------------

    def acts_on(self, depth: int) -> Sequence[int]:
        """Decoder layers that a method of the attention slot edits."""
        raise NotImplementedError

    def heads_of(self, layer: int) -> Sequence[int] | None:
        """Query heads of a decoder layer that the attention slot edits; None: all of them."""
        return None

    def prepare(self, language_model: Any) -> Method:
        """This method with what it must know of a backbone; asked once, when it is attached."""
        return self

    def mark(self, hidden: Tensor, language_model: Any) -> Tensor:
        """(B, n) bool, tokens of a prompt that enter a layer (B, n, D) and that the edit treats apart."""
        raise NotImplementedError

    def mark_columns(self, mean: Tensor, seen: Tensor, visual: Tensor, layer: int) -> Tensor:
        """(B, H, S) bool, marks of a prompt by what its queries give each slot.

        Args:
            mean: (B, H, S) attention that each slot gets in this layer, mean over the queries that see it, of
                the heads that ``heads_of`` names.
            seen: (B, S) number of these queries, 0 for padding.
            visual: (B, S) bool, slots of visual tokens.
        """
        raise NotImplementedError

    def mark_tokens(self, tokens: VisualTokens) -> Tensor:
        """(B, N) int8, marks of the patches of B crops, from what the tower saw; 0 is no mark."""
        raise NotImplementedError

    def reweight(self, attention: Tensor, marked: Tensor, visual: Tensor) -> Tensor:
        """Edited attention (B, H, R, S) for marked slots (B, S), or (B, H, S) where columns were marked, and
        visual ones (B, S).
        """
        raise NotImplementedError

    def relogit(self, logits: Tensor, marked: Tensor, visual: Tensor) -> Tensor:
        """Edited logits (B, H, R, S), scaled and capped, 0 where a row may not look, for the same slots."""
        raise NotImplementedError

    def head_scales(self, with_image: Tensor, without: Tensor, layer: int) -> Tensor:
        """(B, H) factors of the outputs of the heads of a layer.

        Args:
            with_image: (B, H, d) these outputs at the last token of the prompt, before the output projection.
            without: (B, H, d) the same where the prompt is read without its pictures, and nothing is scaled.
        """
        raise NotImplementedError

    def visible(self, held: Tensor, step: int) -> Tensor:
        """(B, S) bool, which of the held visual tokens (B, S) the decode step number ``step`` sees."""
        raise NotImplementedError

    def looks_from(self, depth: int) -> int:
        """The first of ``depth`` layers that ``look`` hides tokens from; the layer before it is watched."""
        raise NotImplementedError

    def look(self, attention: Tensor, visual: Tensor, before: Look | None) -> Tensor:
        """(B, S) bool, which visual slots (B, S) a decode step sees from a layer on.

        Args:
            attention: (B, S) of the new token in the layer before, mean over heads, 0 for what is not visual.
            before: of the step before; None at the first step behind a prompt.
        """
        raise NotImplementedError

    # --- encoder ----------------------------------------------------------------------------------

    def shortens_at(self, depth: int) -> Sequence[int]:
        """Blocks behind which the method is asked, of the ``depth`` that feed the features."""
        raise NotImplementedError

    def shorten(self, block: EncoderBlock, k: int) -> Shortened:
        """What goes on behind a block where k patches of every crop shall be left in the end."""
        raise NotImplementedError

    # --- outside of a model ---------------------------------------------------------------------------

    def shrink(self, grid: tuple[int, int], k: int) -> tuple[int, int]:
        """(rows, cols) of the tokens, at most k, that a picture of ``grid`` rows and columns shall become."""
        raise NotImplementedError

    def region(self, values: Tensor) -> Tensor:
        """(H, W) bool, pixels that a second look shows, by how much more (H, W) they draw a question."""
        raise NotImplementedError

    # --- checks -----------------------------------------------------------------------------------

    def least(self, count: int) -> int:
        """The fewest tokens of ``count`` that this method can keep; 0 where ``own`` may keep none."""
        return 1

    def check_unit(self, count: int) -> None:
        """Raise when this method cannot act on ``count`` tokens; asked even where everything is kept."""

    def check_model(self, config: Any) -> None:
        """Raise when this method is not meant for a model with this ``config``; asked first of all."""

    @classmethod
    def kind(cls) -> Verb:
        """Which verb of its slot this method overrides."""
        verbs = VERBS[cls.slot]
        kinds = [verb for verb in verbs if getattr(cls, verb) is not getattr(Method, verb)]
        if not kinds and cls.own is not Method.own:
            return "select"  # a mask of its own is all that there is
        if not kinds:
            raise SpecError(f"method {cls.__name__} overrides none of {', '.join(verbs)}; override one")
        # a merging or set method may also score, for notebooks: the strongest verb decides how tokens are cut
        return kinds[-1]


def as_needs(needs: Sequence[Need | What]) -> tuple[Need, ...]:
    """Names written out as needs."""
    return tuple(need if isinstance(need, Need) else Need(need) for need in needs)


def needs_of(method: Method) -> tuple[Need, ...]:
    """What a method needs."""
    return as_needs(method.needs)


def needs(method: Method, what: What) -> bool:
    """Whether a method needs a quantity, of whatever layer."""
    return any(need.what == what for need in needs_of(method))
