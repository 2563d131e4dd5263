# SPDX-License-Identifier: Apache-2.0
"""lmms-eval: a model plug-in for its command line, overlays of its tasks, and its tasks as tasks of this
package.

Only ``plugin`` may be imported where lmms-eval loads its plug-ins: it stays free of torch.
"""
