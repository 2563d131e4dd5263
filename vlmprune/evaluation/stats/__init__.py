# SPDX-License-Identifier: Apache-2.0
"""Statistics of answers: estimates with intervals, summaries, curves over budgets, seeds, saliency."""
