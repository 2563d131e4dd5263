# SPDX-License-Identifier: Apache-2.0
"""The windows of frames that save most tokens together when their still places are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Window:
    """Frames ``start`` to ``stop - 1``.

    Args:
        places: (n,) bool on the CPU, places that are still in all of them; none in a window of one frame.
    """

    start: int
    stop: int
    places: Tensor

    @property
    def length(self) -> int:
        """Frames."""
        return self.stop - self.start

    @property
    def still(self) -> int:
        """Still places."""
        return int(self.places.sum())

    @property
    def saved(self) -> int:
        """Tokens that are fewer once they are averaged."""
        return self.still * (self.length - 1)


def savings(still: Tensor, longest: int) -> list[list[int]]:
    """Per size of a window, from two frames on, and its first frame: the tokens that it saves.

    Sizes of which no window saves anything, and longer ones, are left out. ``still`` (T-1, n) says which
    places do not change from a frame to the next.
    """
    found, alive, size = [], still, 2
    # alive: (windows, n), places that are still all through a window of this size
    while alive.shape[0] and size <= longest:
        saved = alive.sum(dim=1) * (size - 1)
        if not saved.any():
            break
        found.append(saved.tolist())
        # longer by one frame: still so far, and in the last step; ``size`` on the right is the old one
        alive, size = alive[:-1] & still[size - 1 :], size + 1
    return found


def best_windows(still: Tensor, n: int, longest: int = 1024) -> list[Window]:
    """Windows that save most, by a programme over the whole clip; ``still`` (T-1, n) is on the CPU.

    A frame stays alone, and a window short, unless more saves strictly more.
    """
    frames = still.shape[0] + 1
    saved = savings(still, longest)
    best = [0] * (frames + 1)  # tokens saved by the first e frames
    sizes = [1] * (frames + 1)  # of the window that ends there
    # the best for ``stop`` frames: the best for fewer, and a last window
    for stop in range(1, frames + 1):
        best[stop] = best[stop - 1]
        for size in range(2, min(stop, len(saved) + 1) + 1):
            total = best[stop - size] + saved[size - 2][stop - size]
            if total > best[stop]:
                best[stop], sizes[stop] = total, size
    # from the end of the clip: the window that ends there, then what comes before it
    found, stop = [], frames
    while stop:
        found.append(window(still, stop - sizes[stop], stop, n))
        stop -= sizes[stop]
    return found[::-1]


def window(still: Tensor, start: int, stop: int, n: int) -> Window:
    """The window of these frames."""
    if stop - start == 1:
        return Window(start, stop, torch.zeros(n, dtype=torch.bool))
    return Window(start, stop, still[start : stop - 1].all(dim=0))


def shortened(windows: Sequence[Window], count: int, k: int) -> list[Window]:
    """Windows in pieces of as many frames, at most, as leave at least k of ``count`` tokens."""
    # the longer the pieces, the more is averaged: from long to short, until enough is left
    for most in range(max(w.length for w in windows), 1, -1):
        pieces = [piece for w in windows for piece in in_pieces(w, most)]
        if count - sum(piece.saved for piece in pieces) >= k:
            return pieces
    # frames alone average nothing
    return [piece for w in windows for piece in in_pieces(w, 1)]


def in_pieces(whole: Window, most: int) -> list[Window]:
    """A window in pieces of ``most`` frames, the last one shorter; a frame alone has no still places."""
    if whole.length <= most:
        return [whole]
    found = []
    for start in range(whole.start, whole.stop, most):
        stop = min(start + most, whole.stop)
        found.append(
            Window(start, stop, whole.places if stop - start > 1 else torch.zeros_like(whole.places))
        )
    return found
