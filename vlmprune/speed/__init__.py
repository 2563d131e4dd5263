# SPDX-License-Identifier: Apache-2.0
"""Speed: what choosing tokens costs and what it saves, measured on this machine, and from where on it
pays."""
