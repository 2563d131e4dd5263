# SPDX-License-Identifier: Apache-2.0
"""A synthetic benchmark with redundant pictures: large patterned objects before a place, five families of
questions, no download. The model "natural" was trained on it.
"""

from .dataset import ScenesSample, ScenesTask, scenes, scenes_of_sizes

__all__ = ["ScenesSample", "ScenesTask", "scenes", "scenes_of_sizes"]
