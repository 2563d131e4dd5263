# SPDX-License-Identifier: Apache-2.0
"""Words that engines, requests and environments know us by; imports nothing."""

KEY = "vlmprune"  # of the options of a request and of a server, and of a model's config
VERSION_KEY = "vlmprune_version"  # beside it in cache keys: another version may choose otherwise
VARIABLE = "VLMPRUNE"  # what a server prunes by default
UNTESTED_VARIABLE = "VLMPRUNE_UNTESTED_VLLM"  # any value lets an untested release of vLLM run
PREFIX = "VlmPrune"  # of the names under which our classes are registered with an engine
DENSE = "dense"
FALLBACKS_VARIABLE = "VLMPRUNE_FALLBACKS"  # folder of counts of one server, set by us
