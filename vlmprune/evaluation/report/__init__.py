# SPDX-License-Identifier: Apache-2.0
"""Report: a run folder as one page, or as a table; rows that fail validation are refused."""

from .export import Options
from .write import FORMATS, is_folder, write_report

__all__ = ["FORMATS", "Options", "is_folder", "write_report"]
