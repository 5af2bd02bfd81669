#!/usr/bin/env bash
# The main job: makes the environment, pretrains a small LLaMA with AdaDiag on two ranks
# (RANKS=N for another number) and says where the plot and the metrics are.
# Arguments go to examples/pretrain_llama.py, a later --optimizer over the one here.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh examples
# More threads than cores make two ranks on a small machine many times slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# exec: a signal to this script is then one to torchrun, which tells the ranks.
exec torchrun --standalone --nproc-per-node="${RANKS:-2}" \
    examples/pretrain_llama.py --optimizer adadiag "$@"
