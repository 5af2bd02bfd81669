#!/usr/bin/env bash
# The main job on several nodes that find each other: the same command on each node.
# Any node that is lost ends the job; start it again to continue.
#
#   NNODES    number of nodes (2)
#   HOST      name or address of the node where they meet, as that node knows itself
#   PORT      a free port there (29500)
#   JOB_ID    the same on all nodes of a job, another for another job (adadiag)
#   RANKS     ranks on each node: a number, or gpu for one per GPU (gpu)
#   RUN_DIR   folder of the run, on storage that all nodes see
#   IDLE_S    seconds that torchrun may go on without a rank (60)
#
# Arguments go to examples/pretrain_llama.py, a later --optimizer over the one here.
set -euo pipefail
: "${HOST:?}" "${RUN_DIR:?}"
RUN_DIR="$(realpath -m "$RUN_DIR")"
cd "$(dirname "$0")/.."
. launch/environment.sh examples
. launch/end_when_idle.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
end_when_idle $$ "${IDLE_S:-60}" &  # exec: torchrun will be process $$
exec torchrun \
    --nnodes="${NNODES:-2}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HOST:${PORT:-29500}" \
    --rdzv-id="${JOB_ID:-adadiag}" \
    --nproc-per-node="${RANKS:-gpu}" \
    examples/pretrain_llama.py --optimizer adadiag --run-dir "$RUN_DIR" --resume "$@"
