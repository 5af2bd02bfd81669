#!/usr/bin/env bash
# The main job: finds or makes the environment, pretrains a small LLaMA with AdaDiag on two
# ranks (RANKS=N for another number) and says where the plot and the metrics are.
# Arguments go to examples/pretrain_llama.py, a later --optimizer over the one here; or
# to a script of yours, if the first is its path (*.py).
set -euo pipefail
. "$(dirname "$0")/job.sh"
sharded_adadiag_job once "$@"
sharded_adadiag_threads "${RANKS:-2}"
# exec: a signal to this script is then one to torchrun, which tells the ranks.
exec "$python" "$root/launch/torchrun.py" --standalone --nproc-per-node="${RANKS:-2}" \
    "${job[@]}"
