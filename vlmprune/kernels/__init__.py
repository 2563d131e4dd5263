# SPDX-License-Identifier: Apache-2.0
"""Kernels of selection, gathering and greedy choice."""
