# SPDX-License-Identifier: Apache-2.0
"""Under which conditions a number was measured: versions, machine, load, commit and date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__


def conditions() -> dict[str, Any]:
    """Versions, machine and date."""
    names = processors()
    return {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vlmprune": __version__,
            "python": platform.python_version(),
        },
        "processor": f"{len(names)} x {names[0]}" if names else platform.machine(),
        "load_before": system_load(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def system_load() -> float | None:
    """Processes that ran or waited in the last minute; None where the system counts none, as on Windows."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def processors() -> list[str]:
    """Model name of every processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]


def commit() -> str | None:
    """Commit of the package, with "-dirty" when its files differ from it; None outside a checkout."""
    # the folder above vlmprune/, which an editable install finds through a link that git does not see
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            [*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if status else "")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
