# SPDX-License-Identifier: Apache-2.0
"""What ``pip install -e .`` puts on the path: ``.editable/``, a folder that holds a link to the package and
nothing else.

Type checkers and editors follow a plain path and no import hook. The root itself cannot be that path:
``kernels/``, ``methods/`` and ``benchmarks/`` would become importable, see CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE, FOLDER = "vlmprune", ".editable"


class EditableLink(BuildHookInterface[Any]):
    """Makes the link before an editable install; other builds take the package where it is."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            link(Path(self.root))


def link(root: Path) -> None:
    """``root/.editable/vlmprune``, which leads to ``root/vlmprune``."""
    package, place = root / PACKAGE, root / FOLDER / PACKAGE
    if place.exists() and place.samefile(package):
        return
    place.parent.mkdir(exist_ok=True)
    if place.is_symlink():  # leads elsewhere
        place.unlink()
    if sys.platform == "win32":  # a symlink needs a right there that few users have, a junction needs none
        import _winapi

        _winapi.CreateJunction(str(package), str(place))
    else:
        place.symlink_to(os.path.relpath(package, place.parent), target_is_directory=True)
