# SPDX-License-Identifier: Apache-2.0
"""Lets torchvision be imported in every process of an engine under test.

The wheels of torchvision are built for CUDA. Beside a CPU torch only its Python part loads, which minds the
lack of two operators, which are declared here before it is imported. Found by PYTHONPATH alone.
"""

import sys
from importlib.abc import MetaPathFinder


class DeclareOperators(MetaPathFinder):
    """Declares the operators when somebody asks for torchvision; finds nothing itself."""

    done = False

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not DeclareOperators.done and "torchvision" not in sys.modules:
            DeclareOperators.done = True
            import torch

            try:
                torch.ops.torchvision.nms.default  # noqa: B018
            except (AttributeError, RuntimeError):
                library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                DeclareOperators.kept = library  # a library takes its operators along when it is collected
        return None


sys.meta_path.insert(0, DeclareOperators())
