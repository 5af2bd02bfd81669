#!/usr/bin/env bash
# The job under DeepSpeed on the hosts of a hostfile. Start it once, on any of them: DeepSpeed's
# launcher starts it on all, by pdsh over ssh without a password. Where there is no pdsh, start
# it on every host with its own NODE_RANK; then nothing goes by ssh.
#
#   HOSTFILE     a line for each host: `node-0 slots=8`, the slots being the ranks on it
#   RUN_DIR      folder of the run, on storage that all hosts see
#   CONFIG       DeepSpeed's config file (examples/deepspeed/ds_config_stage3.json)
#   MASTER_ADDR  the first host, as the others reach it (what `hostname -I` says there)
#   MASTER_PORT  a free port there (29500)
#   SSH_PORT     port of ssh on the hosts (22)
#   NODE_RANK    line of this host in the hostfile, counted from 0; needs MASTER_ADDR
#
# Arguments go to examples/deepspeed/pretrain_llama.py, or to a script of yours, if the
# first is its path (*.py); that one needs no RUN_DIR and no CONFIG, and DeepSpeed knows
# AdaDiag in it by name. Checkout and environment must be at the same path on all hosts.
# Of the variables set here only PYTHON* and NCCL_* reach the others (not
# OMP_NUM_THREADS), and what ~/.deepspeed_env says (NAME=VALUE, a line each). Any host
# that is lost ends the job; start it again, on as many hosts, to continue.
set -euo pipefail
: "${HOSTFILE:?}"
HOSTFILE="$(realpath "$HOSTFILE")"
. "$(dirname "$0")/job.sh"
sharded_adadiag_job deepspeed "$@"
sharded_adadiag_threads "$(sed -n 's/.*slots=\([0-9]*\).*/\1/p' "$HOSTFILE" | sort -n | tail -1)"
flags=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
if [ -n "${NODE_RANK:-}" ]; then
    flags+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?}")
else
    flags+=(--launcher pdsh --force_multi)
    [ -z "${MASTER_ADDR:-}" ] || flags+=(--master_addr "$MASTER_ADDR")
    [ -z "${SSH_PORT:-}" ] || flags+=(--ssh_port "$SSH_PORT")
fi
exec deepspeed "${flags[@]}" "${job[@]}"
