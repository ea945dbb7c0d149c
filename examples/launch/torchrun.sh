#!/usr/bin/env bash
# Train on the GPUs of one or more nodes that share a file system. Run this on every node:
#
#   examples/launch/torchrun.sh NODES ADDRESS_OF_ONE_NODE RECIPE [--field value ...]
#
# The same command continues a run that was stopped.
set -euo pipefail
nodes=$1 address=$2
shift 2
exec torchrun --nnodes "$nodes" --nproc-per-node "${PROCESSES:-gpu}" \
    --rdzv-id deltify --rdzv-backend c10d --rdzv-endpoint "$address:${PORT:-29400}" \
    -m deltify.cli distill "$@" --resume
