# SPDX-License-Identifier: Apache-2.0
"""Encode pictures without the language model: once, and reused by every session that compares methods on
them.

The vision tower and the projector do the same work for every method. Who compares methods runs them once per
picture, with everything captured that any of the sessions needs; while ``EncodedImages`` serves a session,
``get_image_features`` is answered from it. All that follows (choice, cut, masks, positions, cache) is the
session's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.deferred import NOW
from ...errors import InvariantError, UnsupportedError
from .capture import VisionCapture
from .pictures import Picture, compressed

if TYPE_CHECKING:
    from ..adapter import Adapter, Modality
    from ..session import Session

# what a tower returns beside the features is of no use to the language model
_SPARE = {"last_hidden_state", "pooler_output", "hidden_states", "attentions"}


def run_encoder(
    adapter: Adapter, modality: Modality, inputs: Mapping[str, Any], captures: Sequence[VisionCapture]
) -> tuple[Any, list[list[Picture]]]:
    """Encode the pictures of ``inputs``: the encoder's output, and the pictures as each capture saw them."""
    encode = getattr(adapter.inner, modality.encode)
    encode = getattr(encode, "original", encode)  # what a session put there would wait for a forward
    names = list(inspect.signature(encode).parameters)
    # transformers 4.57 names the pixels of clips otherwise and has no defaults there
    given = {
        **{name: getattr(adapter.config, name, None) for name in names},
        **inputs,
        names[0]: inputs[modality.pixels],
    }
    arguments = {name: given[name] for name in names if given[name] is not None}
    adapter.check(arguments, modality)
    with torch.no_grad(), ExitStack() as stack:
        # all captures watch the same run
        records = [stack.enter_context(capture) for capture in captures]
        output = encode(**arguments)
    # under the name by which adapters look for them
    arguments[modality.pixels] = inputs[modality.pixels]
    return output, [adapter.pictures(modality, output, arguments, record.take(), NOW) for record in records]


def left_of(
    adapter: Adapter, modality: Modality, pictures: list[Picture], arguments: Mapping[str, Any]
) -> list[Picture]:
    """Pictures without what the model itself leaves out of them in front of its language model.

    Args:
        arguments: of the call of the model.
    """
    leaves = adapter.leaves(modality, pictures, arguments) if modality.name in adapter.compresses else None
    if leaves is None:
        return pictures
    return [compressed(picture, stays) for picture, stays in zip(pictures, leaves, strict=True)]


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One encoded image: its features (length, D), and the picture as each kind of capture saw it."""

    features: Tensor
    seen: dict[tuple[object, ...], Picture]


class EncodedImages:
    """Encodes images for ``sessions`` of one model that share its tower, and answers their encoder calls."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.adapter = sessions[0].adapter
        self.modality = self.adapter.modalities[0]
        self._captures = {session.capture.key: session.capture for session in sessions}
        self._like: Any = None  # an output of the encoder

    def encode(self, inputs: Mapping[str, Any]) -> list[EncodedImage]:
        """Run tower and projector on the images of ``inputs``; no session may be attached."""
        output, seen = run_encoder(self.adapter, self.modality, inputs, list(self._captures.values()))
        # what else the language model reads, such as DeepStack features, is not kept with a picture
        spare = set(output.keys()) - _SPARE if isinstance(output, Mapping) else set()
        if spare:
            raise UnsupportedError(
                f"{type(self.adapter.model).__name__} returns {sorted(spare)} with its features, which "
                "cannot be used again; encode the images anew for every method"
            )
        self._like = output
        keys = list(self._captures)
        rows = zip(*seen, strict=True)
        return [EncodedImage(row[0].features, dict(zip(keys, row, strict=True))) for row in rows]

    @contextmanager
    def serving(self, session: Session, images: Sequence[EncodedImage]) -> Iterator[None]:
        """Let ``session`` take these images, in the order in which they stand in the batch."""

        if session.in_tower:
            raise UnsupportedError(
                f"{session.spec!r} shortens inside the vision tower and cannot take images that were encoded "
                "without it; encode them anew for it"
            )

        def serve(modality: Modality) -> tuple[Any, list[Picture]]:
            if modality.name != self.modality.name or not images:
                raise InvariantError(
                    f"the model asks for {modality.name} features; {len(images)} images were encoded before"
                )
            features = [image.features for image in images]
            return output_like(self._like, features), [image.seen[session.capture.key] for image in images]

        session.serve = serve
        try:
            yield
        finally:
            session.serve = None


def output_like(like: Any, features: list[Tensor]) -> Any:
    """Features as the model's own encoder returns them in this version of transformers."""
    pooled = getattr(like, "pooler_output", like)
    if isinstance(pooled, Tensor):
        again: Any = torch.stack(features) if pooled.ndim == 3 else torch.cat(features)
    else:
        again = type(pooled)(features)
    return again if pooled is like else type(like)(pooler_output=again)
