#!/usr/bin/env bash
# The main job on a number of nodes that may change: the same command on each node, at
# any time. When a node comes or is lost, the others go on from the newest checkpoint
# with the nodes there are: give --save-every.
#
#   MIN_NODES     fewest nodes to train on (1)
#   MAX_NODES     most nodes (2)
#   MAX_RESTARTS  failures that are followed by a new start (3)
#   HOST          name or address of the node where they meet, as that node knows
#                 itself; the only node that may not be lost
#   PORT          a free port there (29500)
#   JOB_ID        the same on all nodes of a job, another for another job (adadiag)
#   RANKS         ranks on each node: a number, or gpu for one per GPU (gpu)
#   RUN_DIR       folder of the run, on storage that all nodes see (not for a script of yours)
#   JOIN_S        seconds to wait for MIN_NODES nodes (600)
#
# Arguments go to examples/pretrain_llama.py, a later --optimizer over the one here; or
# to a script of yours, if the first is its path (*.py).
# --batch must be a multiple of every number of ranks that may come up.
set -euo pipefail
: "${HOST:?}"
JOIN_S="${JOIN_S:-600}"
. "$(dirname "$0")/job.sh"
sharded_adadiag_job continued "$@"
. "$root/launch/end_when_idle.sh"
sharded_adadiag_threads "${RANKS:-gpu}"
# Else the ranks meet in a store that outlives them: after a new start, some would read the
# addresses of the ranks before and hang. So each start has a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
end_when_idle $$ $((JOIN_S + 60)) &  # exec: torchrun will be process $$
exec "$python" "$root/launch/torchrun.py" \
    --nnodes="${MIN_NODES:-1}:${MAX_NODES:-2}" --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HOST:${PORT:-29500}" \
    --rdzv-id="${JOB_ID:-adadiag}" --rdzv-conf="join_timeout=$JOIN_S" \
    --nproc-per-node="${RANKS:-gpu}" \
    "${job[@]}"
