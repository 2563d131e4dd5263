# SPDX-License-Identifier: Apache-2.0
"""The entry point of vLLM's plug-ins: names our classes, imports nothing heavy.

vLLM calls ``register`` in every one of its processes. Its own classes stay in their places unless the
variable VLMPRUNE says what to prune.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from uuid import uuid4

from ...errors import UnsupportedError
from ..names import FALLBACKS_VARIABLE, PREFIX, UNTESTED_VARIABLE, VARIABLE
from .families import ALSO, EXPERTS, MARKED, NOT_SERVED, OWN, PLACED, WRAPPED, architecture

TESTED = ("0.32.0", "0.33.0")
_HERE = "vlmprune.serving.vllm"
# architecture -> class
FAMILIES = {architecture(start): f"{_HERE}.{file}:{architecture(start)}" for file, start in OWN.values()}
FAMILIES |= {name: FAMILIES[architecture(OWN[kind][1])] for name, kind in ALSO.items()}
WRAPPER = "TransformersMultiModalForCausalLM"
FAMILIES |= {architecture(start): f"{_HERE}.wrapped:{WRAPPER}" for start, _, _ in WRAPPED.values()}
FAMILIES |= {
    architecture(
        start
    ): f"{_HERE}.wrapped_mrope:PlacedMultiModal{'MoE' if kind in EXPERTS else ''}ForCausalLM"
    for kind, (start, _, _) in PLACED.items()
}
FAMILIES |= {
    architecture(start): f"{_HERE}.wrapped_marks:MarkedMultiModalForCausalLM"
    for start, _, _ in MARKED.values()
}
REFUSED = f"{_HERE}.refused"
RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"  # vLLM's: names of variables that Ray's workers are given


def register() -> None:
    """Tell vLLM of our classes; a wrong VLMPRUNE or an untested release ends the start of the server."""
    from vllm import ModelRegistry

    _speak()
    # the first process names it, those that it starts inherit it; made when there is something to say
    os.environ.setdefault(FALLBACKS_VARIABLE, str(Path(tempfile.gettempdir(), f"vlmprune-{uuid4().hex}")))
    _hand_on()
    for name, path in FAMILIES.items():
        # a path, not a class: vLLM imports it when the model is asked for
        ModelRegistry.register_model(PREFIX + name, path)
    default = os.environ.get(VARIABLE)
    if not default:
        return
    from ..request import read

    check_release()
    # raises for a wrong spec, rather now than at the first request
    read(default)
    for name in multimodal_names():
        # a family that cannot be pruned must not be served whole in silence
        ModelRegistry.register_model(name, FAMILIES.get(name, f"{REFUSED}:{name}"))


def _speak() -> None:
    """Let our lines go where those of vLLM go, which shows none of other loggers by itself."""
    from vllm.logger import init_logger

    ours = logging.getLogger("vlmprune")
    # else somebody has said where ours go
    if not ours.hasHandlers():
        # no copy of its handlers: vLLM may set them later than it asks us
        ours.parent = init_logger("vllm")


def _hand_on() -> None:
    """Let vLLM copy our variables to workers of Ray, which would run its own classes without them."""
    given = [name for name in os.environ.get(RAY_COPIES, "").split(",") if name]
    ours = (VARIABLE, UNTESTED_VARIABLE, FALLBACKS_VARIABLE)
    os.environ[RAY_COPIES] = ",".join(dict.fromkeys([*given, *ours]))


def multimodal_names() -> list[str]:
    """Architectures of this vLLM that see pictures, its wrappers of models of transformers among them."""
    from vllm.model_executor.models import registry

    # name -> (module, class)
    wrapped = {**registry._TRANSFORMERS_BACKEND_MODELS, **registry._TRANSFORMERS_SUPPORTED_MODELS}
    wrappers = [name for name, (_, held) in wrapped.items() if "MultiModal" in held]
    return sorted({*registry._MULTIMODAL_MODELS, *wrappers, *FAMILIES})


def check_release() -> None:
    """Refuse a vLLM that was not tested: its processors change between releases."""
    import vllm

    # 0.32.0+cpu -> 0.32.0
    release = vllm.__version__.split("+")[0]
    if release not in TESTED and not os.environ.get(UNTESTED_VARIABLE):
        raise UnsupportedError(
            f"vLLM {release} was not tested with this vlmprune; tested: {', '.join(TESTED)}. Install one of "
            f"them, or set {UNTESTED_VARIABLE}=1 to try it"
        )


def refusal(name: str) -> UnsupportedError:
    """Why a family is not served, by the name of its class or its model type."""
    known = (why for kind, (start, why) in NOT_SERVED.items() if name in (kind, architecture(start)))
    why = next(known, None)
    return UnsupportedError(
        f"{name} cannot be pruned in vLLM yet{f': {why}' if why else ''}; served are {', '.join(FAMILIES)}. "
        f"Unset {VARIABLE} to serve it whole, or use vlmprune.prune with transformers"
    )
