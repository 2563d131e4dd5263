# SPDX-License-Identifier: Apache-2.0
"""Training of methods that choose by weights: a frozen model, a small module, one loop that can go on."""
