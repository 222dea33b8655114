#!/usr/bin/env bash
# torchrun on every node, started by hand or by any scheduler, with this node's number first:
#   FIRST_NODE=node-a NODES=2 bash torchrun.sh 0 RECIPE [section.key=value ...]     # on node-a
#   FIRST_NODE=node-a NODES=2 bash torchrun.sh 1 RECIPE [section.key=value ...]     # on the other
set -euo pipefail

node=$1
shift
export PYTHONSAFEPATH=1          # do not import modules from the current folder
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) / ${GPUS:-8}))}"     # else 1
# if a rank dies, torchrun restarts all ranks, which resume at the last checkpoint
torchrun --max-restarts="${RESTARTS:-3}" \
    --nnodes="${NODES:-2}" --nproc-per-node="${GPUS:-8}" --node-rank="$node" \
    --master-addr="$FIRST_NODE" --master-port="${PORT:-29500}" \
    --module shoal.launch.cli distill --config "$@"
