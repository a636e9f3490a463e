#!/usr/bin/env bash
# One machine with GPUs: bash launch/gpu_box.sh CONFIG.yaml DIR
# Several without a scheduler: the same on each, with JAX_COORDINATOR_ADDRESS=HOST_OF_0:PORT, JAX_NUM_PROCESSES=N and
# JAX_PROCESS_ID=0 ... N-1.
set -euo pipefail
exec bash launch/host.sh "$@"
