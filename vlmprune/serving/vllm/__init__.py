# SPDX-License-Identifier: Apache-2.0
"""vLLM: an entry point, a processor that promises fewer placeholders, and one subclass per family."""
