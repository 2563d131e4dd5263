# SPDX-License-Identifier: Apache-2.0
"""Report: a run folder as one page, or as a table; rows that cannot be believed are refused."""

from .write import FORMATS, write_report

__all__ = ["FORMATS", "write_report"]
