# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: samples with images, questions, accepted answers and masks of what is asked about."""
