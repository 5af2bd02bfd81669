#!/usr/bin/env bash
# The main job on several nodes that find each other: the same command on each node.
# Any node that is lost ends the job; start it again to continue.
#
#   NNODES    number of nodes (2)
#   HOST      name or address of the node where they meet, as that node knows itself
#   PORT      a free port there (29500)
#   JOB_ID    the same on all nodes of a job, another for another job (adadiag)
#   RANKS     ranks on each node: a number, or gpu for one per GPU (gpu)
#   RUN_DIR   folder of the run, on storage that all nodes see (not for a script of yours)
#   IDLE_S    seconds that torchrun may go on without a rank (60)
#
# Arguments go to examples/pretrain_llama.py, a later --optimizer over the one here; or
# to a script of yours, if the first is its path (*.py).
set -euo pipefail
: "${HOST:?}"
. "$(dirname "$0")/job.sh"
sharded_adadiag_job continued "$@"
. "$root/launch/end_when_idle.sh"
sharded_adadiag_threads "${RANKS:-gpu}"
end_when_idle $$ "${IDLE_S:-60}" &  # exec: torchrun will be process $$
exec "$python" "$root/launch/torchrun.py" \
    --nnodes="${NNODES:-2}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HOST:${PORT:-29500}" \
    --rdzv-id="${JOB_ID:-adadiag}" \
    --nproc-per-node="${RANKS:-gpu}" \
    "${job[@]}"
