# SPDX-License-Identifier: Apache-2.0
"""The five places where a method acts, and the one protocol of what acts there.

``encoder`` shortens inside the vision tower, ``before_lm`` at the entrance of the language model,
``inside_lm`` at the input of decoder layers, ``attention`` edits what rows attend to, ``decode`` hides held
tokens from later steps. A session attaches one slot per method and knows none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from ...core.budget import Budget
from ...core.combine import by_slot
from ...core.method import Method, Positions, SlotName
from ...errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn

    from ..adapter import Adapter
    from ..state import ForwardState
    from ..vision.capture import Record


class Handle(Protocol):
    """What a hook or a tap leaves behind to take it off again."""

    def remove(self) -> None: ...


@contextmanager
def all_or_none(handles: Sequence[Handle]) -> Iterator[None]:
    """Take off what was put on so far where the next one fails."""
    try:
        yield
    except BaseException:
        for handle in handles:
            handle.remove()
        raise


@dataclass(frozen=True)
class Attachment:
    """What slots know of the session that they belong to.

    Args:
        adapter: the model.
        spec: what was attached, for messages.
        strict: refuse pictures with fewer tokens than an absolute budget.
        override: position policy that the user asked for.
        state: gives the forward that runs in this thread, None outside of one.
        record: gives what is recorded of the encoder call that runs in this thread, None outside of one.
        frames: the images of a prompt are frames of one clip.
        notes: what slots have to say in every report.
    """

    adapter: Adapter
    spec: str
    strict: bool
    override: Positions | None
    state: Callable[[], ForwardState | None]
    record: Callable[[], Record | None]
    frames: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return self.adapter.language_model.config.num_hidden_layers

    def policy(self, method: Method) -> Positions:
        """Position policy of a method; a family that knows one only imposes it."""
        allowed = self.adapter.positions
        return self.override or (method.positions if method.positions in allowed else allowed[0])

    def refuse_checkpointing(self, part: nn.Module, method: Method, does: str) -> None:
        """Refuse a part of the model whose layers run a second time for their gradients, outside of the
        forward that says what a method does there.
        """
        # read off the modules: transformers renamed the property that says it
        modules = part.modules() if part.training else ()
        if any(getattr(module, "gradient_checkpointing", False) for module in modules):
            raise UnsupportedError(
                f"{method.name} {does}, which gradient checkpointing would recompute without it; call "
                "model.gradient_checkpointing_disable(), or prune before the language model, e.g. with "
                "'divprune@64'"
            )

    def check_numbers(self, method: Method, state: ForwardState) -> None:
        """Refuse a method that reads the numbers of positions where the model numbered padding, too."""
        view = state.views.at(0)
        numbers = view.position_ids.expand(view.new.shape)  # (B, n)
        first = view.new.int().argmax(dim=1, keepdim=True)  # (B, 1) columns of the first tokens
        if bool(((first > 0) & (numbers.gather(1, first) - numbers[:, :1] == first)).any()):
            raise UnsupportedError(
                f"{method.name} reads what depends on the numbers of positions, and "
                f"{self.adapter.model_type} numbers padding too, so that a row of a padded batch would keep "
                f"other tokens than alone; use {method.sliding}, or give one prompt at a time"
            )


class Slot(Protocol):
    """A method attached in one place of one model.

    Attributes:
        attachment: the session that it belongs to.
        method, budget: what acts.
        in_tower: whether it changes what the vision tower computes, so that no other session can use it.
    """

    attachment: Attachment
    method: Method
    budget: Budget | None
    in_tower: ClassVar[bool]

    def hooks(self) -> list[Handle]:
        """Install what acts inside the model while it runs; on a failure nothing stays."""

    def enter(self, state: ForwardState) -> None:
        """Act where the merged sequence, ``state.embeds``, is about to enter the language model."""

    def missed(self, state: ForwardState) -> set[int]:
        """Decoder layers that ran in this forward without the slot having acted, though it should have."""


def build_slots(
    attachment: Attachment, plans: Sequence[tuple[Method, Budget | None]]
) -> dict[SlotName, Slot]:
    """One slot per method, in the order in which a forward reaches them."""
    # imported here: the slots import this module for what they are attached with
    from .attention import attention_slot
    from .before_lm import BeforeLM
    from .decode import DecodeSlot
    from .encoder import EncoderSlot
    from .exits import inside_slot

    makers: dict[SlotName, Callable[[Attachment, Method, Budget | None], Slot]] = {
        "encoder": EncoderSlot,
        "before_lm": BeforeLM,
        "inside_lm": inside_slot,
        "attention": attention_slot,
        "decode": DecodeSlot,
    }
    given = by_slot(plans)
    for name, why in attachment.adapter.closed.items():
        if name in given:
            raise UnsupportedError(
                f"{attachment.spec!r} acts inside the language model of {attachment.adapter.model_type!r}, "
                f"{why}; prune before the language model, e.g. with 'divprune@64'"
            )
    for method, _ in given.values():
        if attachment.adapter.added is not None and method.kind() == "merge":
            raise UnsupportedError(
                f"{method.name} puts rows of its own in place of tokens, and layers of "
                f"{attachment.adapter.model_type!r} add features to tokens, which such rows have none of; "
                "use a method that keeps tokens, e.g. 'divprune@64'"
            )
    return {name: maker(attachment, *given[name]) for name, maker in makers.items() if name in given}
