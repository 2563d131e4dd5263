# SPDX-License-Identifier: Apache-2.0
"""Writing a text file whole, or leaving the old one."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from .errors import EvaluationError


def replace_text(path: Path, text: str) -> None:
    """Write a file beside the old one, then put it in its place: a full disk leaves an older file whole.

    Raises:
        EvaluationError: the file system refuses; says why and what to do.
    """
    # in the same folder, since a rename is atomic within one file system only
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):  # where nothing can be written, there is nothing to remove
            partial.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "the disk is full: make room" if full else "choose another place with --out"
        raise EvaluationError(f"{path} cannot be written ({error.strerror or error}); {todo}") from error
