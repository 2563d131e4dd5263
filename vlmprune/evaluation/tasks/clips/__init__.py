# SPDX-License-Identifier: Apache-2.0
"""A synthetic benchmark of clips: shapes that appear, move and change among some that stand still."""

from .dataset import ClipSample, ClipsTask, clips

__all__ = ["ClipSample", "ClipsTask", "clips"]
