#!/usr/bin/env bash
# The main job on several nodes with fixed places: start it on each node with its own
# NODE_RANK. Any node that is lost ends the job; start it again to continue.
#
#   NNODES       number of nodes (2)
#   NODE_RANK    place of this node: 0, 1, ... NNODES - 1
#   MASTER_ADDR  name or address of node 0, as the others reach it
#   MASTER_PORT  a free port there (29500)
#   RANKS        ranks on each node: a number, or gpu for one per GPU (gpu)
#   RUN_DIR      folder of the run, on storage that all nodes see (not for a script of yours)
#
# Arguments go to examples/pretrain_llama.py, a later --optimizer over the one here; or
# to a script of yours, if the first is its path (*.py).
set -euo pipefail
: "${NODE_RANK:?}" "${MASTER_ADDR:?}"
. "$(dirname "$0")/job.sh"
sharded_adadiag_job continued "$@"
sharded_adadiag_threads "${RANKS:-gpu}"
exec "$python" "$root/launch/torchrun.py" \
    --nnodes="${NNODES:-2}" --node-rank="$NODE_RANK" \
    --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
    --nproc-per-node="${RANKS:-gpu}" \
    "${job[@]}"
