#!/usr/bin/env bash
# torchrun, started by the same line on every node, by hand or by any scheduler:
#   FIRST_NODE=node-a NODES=2 bash torchrun.sh RECIPE [section.key=value ...]
set -euo pipefail

export PYTHONSAFEPATH=1          # do not import modules from the current folder
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) / ${GPUS:-8}))}"     # else 1
# otherwise ranks that start again may read where ranks of the attempt before listened (pytorch/pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# if a rank dies, torchrun restarts all ranks, which resume at the last checkpoint. Nodes agree on that through c10d: with
# --node-rank and --master-addr, a node restarts its own ranks alone, and they wait for ranks of another attempt
# `exec`: a signal reaches torchrun, which would kill its ranks 30 s after it; they need longer to save all weights
exec torchrun --shutdown-timeout=240 --max-restarts="${RESTARTS:-3}" \
    --nnodes="${NODES:-2}" --nproc-per-node="${GPUS:-8}" \
    --rdzv-id=shoal --rdzv-backend=c10d --rdzv-endpoint="$FIRST_NODE:${PORT:-29500}" \
    --module shoal.launch.cli distill --config "$@"
