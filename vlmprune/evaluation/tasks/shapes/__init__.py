# SPDX-License-Identifier: Apache-2.0
"""A synthetic benchmark: coloured shapes and signs, ten families of questions, no download."""

from .dataset import ShapesSample, ShapesTask, shapes

__all__ = ["ShapesSample", "ShapesTask", "shapes"]
