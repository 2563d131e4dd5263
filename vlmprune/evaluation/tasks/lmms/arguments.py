# SPDX-License-Identifier: Apache-2.0
"""``--model_args`` of the plug-in, read from its text: lmms-eval would split specs at their commas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ....errors import SpecError, did_you_mean
from ....spec import parse

_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Arguments:
    """What may stand in ``--model_args``.

    Args:
        pretrained: "tiny", a folder, or an HF id.
        prune: a spec, as in ``fastervlm@64``; "dense" prunes nothing and still counts.
        positions, strict: as in ``vlmprune.prune``.
        device: such as "cuda:1"; by default the GPU of this process, or the CPU where there is none.
        dtype: "auto" is what the checkpoint says.
        batch_size: questions answered together.
        max_new_tokens: cap over what tasks ask for; several ask for 1024 where one word is wanted.
        max_frames: frames of a clip.
        image_pad: pad pictures to a square with their processor's mean colour, as the original LLaVA-1.5 did.
        chat_template: a Jinja file, for processors that have none.
        attn_implementation: such as "flash_attention_2".
        trust_remote_code: run Python code that comes with the checkpoint.
    """

    pretrained: str = "tiny"
    prune: str = "dense"
    positions: str | None = None
    strict: bool = False
    device: str | None = None
    dtype: str = "auto"
    batch_size: int = 1
    max_new_tokens: int | None = None
    max_frames: int = 8
    image_pad: bool = False
    chat_template: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        spec = parse(self.prune)
        spec.build(require_budget=True)  # what is wrong with it is said before a model is read
        object.__setattr__(self, "prune", str(spec))
        for name in ("batch_size", "max_new_tokens", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f"{name}={value}; expected at least 1")

    @classmethod
    def read(cls, text: str, flags: Mapping[str, Any] | None = None) -> Arguments:
        """From the text of ``--model_args`` and what lmms-eval adds from its own flags."""
        given: dict[str, Any] = {}
        for piece in split(text):
            name, found, value = piece.partition("=")
            if not found:
                raise SpecError(f"model argument {piece!r}; expected name=value, as in prune=fastervlm@64")
            if name in given:
                raise SpecError(
                    f"model argument {name!r} is given twice: {given[name]!r} and {value!r}; give it once"
                )
            given[name] = value
        # as text, so that what lmms-eval adds is checked like what was typed
        given |= {
            name: str(value)
            for name, value in (flags or {}).items()
            if value is not None and name != "max_batch_size"
        }
        return cls(**{name: _typed(name, value.strip()) for name, value in given.items()})


# name -> "str", "int" or "bool": annotations are text in this file
_TYPES = {field.name: str(field.type).removesuffix(" | None") for field in fields(Arguments)}
_BOOLS = {"true": True, "false": False, "1": True, "0": False}


def _typed(name: str, text: str) -> Any:
    if name not in _TYPES:
        budget = name in ("keep", "method")
        hint = (
            " Write the budget into the spec: prune=fastervlm@64." if budget else did_you_mean(name, _TYPES)
        )
        raise SpecError(f"model argument {name!r} is unknown; expected one of {sorted(_TYPES)}.{hint}")
    kind = _TYPES[name]
    if kind == "bool":
        if text.lower() not in _BOOLS:
            raise SpecError(f"{name}={text!r}; expected true or false")
        return _BOOLS[text.lower()]
    if kind == "int":
        if not text.isdecimal():
            raise SpecError(f"{name}={text!r}; expected a whole number")
        return int(text)
    return text


def split(text: str) -> list[str]:
    """Pieces between commas that stand outside brackets."""
    # depth: brackets that are open
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces if piece.strip()]
