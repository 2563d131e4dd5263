# SPDX-License-Identifier: Apache-2.0
"""Files that make up a model or a plug-in, in the same order on every machine, and their digests."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")  # of a training


def files_below(folder: Path) -> list[Path]:
    """Files of a folder and its sub-folders, sorted; links are followed.

    Left out are hidden files, caches of Python, prose, and sub-folders that are something else: runs of this
    package, whose growth would change the fingerprint under their own feet, and the checkpoints of a
    training.
    """
    found: list[Path] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(where)
        here = Path(where)
        # links can form a loop. Written in place: this is how os.walk is told where to go
        folders[:] = [] if real in seen else [name for name in folders if _belongs(here / name)]
        found += [] if real in seen else [here / name for name in names if not name.startswith(".")]
        seen.add(real)
    files = [file for file in found if file.suffix not in (".md", ".pyc") and file.is_file()]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _belongs(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name == "__pycache__" or _CHECKPOINT.fullmatch(folder.name):
        return False
    return not ((folder / "cells").is_dir() and (folder / "run.json").is_file())


def source_files(file: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and all files that code in ``file`` is made of.

    That is the whole package that the file is in. A module outside of packages counts with the modules of its
    own folder that it imports, and those that they import.
    """
    file = file.resolve(strict=True)
    package = None
    folder = file.parent
    # up to the outermost package
    while (folder / "__init__.py").is_file():
        package, folder = folder, folder.parent
    # of lmms-eval the version counts already, and it has thousands of files
    if package is not None and package.name != "lmms_eval":
        return folder, files_below(package)
    found = [file]
    for module in found:  # grows meanwhile
        found += [one for one in _imported(module) if one not in found]
    return file.parent, sorted(found)


def _imported(file: Path) -> list[Path]:
    """Modules beside a file that it imports, wherever in its text."""
    if file.suffix != ".py":
        return []
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # then nothing can have imported it
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` names no module: x may be one
            names += [node.module] if node.module else [alias.name for alias in node.names]
    found: list[Path] = []
    # of a.b.c, a lies beside the file
    for name in sorted({name.partition(".")[0] for name in names} - _neighbours(file)):
        module, package = file.parent / f"{name}.py", file.parent / name
        if module.is_file():
            found.append(module)
        elif (package / "__init__.py").is_file():
            found += files_below(package)
    return found


def _neighbours(file: Path) -> set[str]:
    """Names beside a module that are other distributions, where it lies among installed packages."""
    if file.parent.name not in ("site-packages", "dist-packages"):
        return set()
    owners = metadata.packages_distributions()
    # distributions that the file belongs to; names that any of them shares are its own
    mine = set(owners.get(file.stem, ()))
    return {name for name, those in owners.items() if not mine & set(those)}


def top_level(made: Any) -> str | None:
    """The package that a class or function comes from; None for the standard library and what is built in."""
    # None for methods of built-in types
    name = (getattr(made, "__module__", None) or "builtins").partition(".")[0]
    return None if name in sys.stdlib_module_names else name


def read_once(folder: Path, files: Sequence[Path]) -> str:
    """Digest of large files, read once as long as sizes and times stay: 7B weights take seconds."""
    # ctime too: the other time can be set
    stats = [(file, file.stat()) for file in files]
    return _read_once(folder, tuple((file, st.st_size, st.st_mtime_ns, st.st_ctime_ns) for file, st in stats))


# sizes and times are part of the key: where they change, the file is read again
@cache
def _read_once(folder: Path, files: tuple[tuple[Path, int, int, int], ...]) -> str:
    return digest([file for file, *_ in files], folder)


def digest(files: Sequence[Path], root: Path) -> str:
    """16 hex digits of names, relative to ``root``, and contents."""
    whole = hashlib.sha256()
    for file in files:
        own = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):  # 1 MiB at a time: weights may be larger than the memory
                own.update(block)
        # with the name: two files that swap their contents are another model
        whole.update(file.relative_to(root).as_posix().encode() + b"\0" + own.digest())
    return whole.hexdigest()[:16]
