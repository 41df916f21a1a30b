#!/usr/bin/env bash
# Trains on every GPU of one or more nodes. Start the same line on each node; arguments are Hydra overrides:
#   ./launch/torchrun.sh experiment=olmoe_1b_7b_0924 data.dir=/data/olmoe-mix run_dir=/runs/olmoe
#   NNODES=4 RDZV_ENDPOINT=node-0:29400 RDZV_ID=olmoe-1 ./launch/torchrun.sh experiment=...
# Variables:
#   NPROC_PER_NODE  processes a node            (default: its GPUs, or 1)
#   NNODES          nodes; 2:4 is elastic       (default: 1)
#   RDZV_ENDPOINT   host:port of any one node   (needed with NNODES > 1)
#   RDZV_ID         a name that only this job has  (default: olmoe)
# Exit codes are the training's own: 2 bad configuration, 75 stopped by a signal after saving (start again to continue).
set -euo pipefail

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/common.sh"
[ ! -d "$launch/../.venv" ] || PATH=$(cd "$launch/../.venv/bin" && pwd):$PATH

processes=${NPROC_PER_NODE:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
share_cores "$processes"
# Seconds that workers have to save after a signal before torchrun kills them; its own default is 30.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-240}

rendezvous=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
    : "${RDZV_ENDPOINT:?set RDZV_ENDPOINT=host:port, the same on every node}"
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-olmoe}")
fi
exec python "$launch/torchrun.py" "${rendezvous[@]}" --nproc-per-node "$processes" -m olmoe_train.train "$@"
