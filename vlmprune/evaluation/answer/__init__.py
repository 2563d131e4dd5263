# SPDX-License-Identifier: Apache-2.0
"""Asking a model: prompts, batches, one recorded answer after another."""
