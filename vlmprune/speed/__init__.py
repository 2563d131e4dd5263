# SPDX-License-Identifier: Apache-2.0
"""Speed: what choosing tokens costs and saves on this machine, and from where on it pays."""
