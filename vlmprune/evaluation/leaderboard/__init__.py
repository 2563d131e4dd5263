# SPDX-License-Identifier: Apache-2.0
"""Sweeps: models x specs x tasks, one journal per cell, killed and resumed at any moment."""
