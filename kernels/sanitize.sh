#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The GPU tests of the kernels, then their cases under compute-sanitizer: memory errors, and races inside a program (shared memory).
# Races between programs show in the tests that repeat every case a hundred times. Needs a GPU and the CUDA toolkit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONSAFEPATH=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 # each tensor an allocation of its own: overruns are seen

pytest tests/kernels -m gpu
for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 --kernel-name regex=_kernel \
        "$(command -v python)" "$(command -v pytest)" -q -p no:cacheprovider tests/kernels/test_gpu.py -m "gpu and not slow" -k "means_what or launch_per_pick"
done
