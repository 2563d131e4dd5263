# SPDX-License-Identifier: Apache-2.0
"""Pruning inside an inference engine that serves many clients; nothing here imports an engine."""

from __future__ import annotations

from functools import partial
from typing import Any

from .names import DENSE, KEY, PREFIX

__all__ = ["overrides"]


def overrides(spec: str = DENSE) -> Any:
    """``LLM(model, hf_overrides=vlmprune.serving.overrides("fastervlm@64"))``: prune in vLLM, by default so.

    Args:
        spec: what holds for requests that name none; ``"dense"`` prunes nothing unless a request asks.
    """
    from .request import read

    # read here, so that a wrong spec fails before an engine starts; a function of the module can be pickled
    return partial(_override, read(spec).text)


def _override(spec: str, config: Any) -> Any:
    """Name our class of the model's family in the config; called by vLLM, which pickles it."""
    from .vllm.plugin import FAMILIES, check_release, refusal

    check_release()
    # vLLM asks first with a config without a name
    names = [name for name in getattr(config, "architectures", None) or [] if name]
    if names and not names[0].startswith(PREFIX):
        if names[0] not in FAMILIES:
            raise refusal(names[0])
        config.architectures = [PREFIX + names[0]]
    setattr(config, KEY, spec)
    return config
