# SPDX-License-Identifier: Apache-2.0
"""Pictures of plain arrays: kept tokens and scores over the picture, and tables for notebooks."""

# what the blocks of tokens cover: the whole picture, or its largest centred square
VIEWS = ("stretch", "center")
