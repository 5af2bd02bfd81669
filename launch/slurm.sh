#!/usr/bin/env bash
# The main job under Slurm, from the root of a checkout on storage that all nodes see:
#
#   RUN_DIR=/shared/runs/60m sbatch launch/slurm.sh --model 60m --data c4 --save-every 500
#
#   RUN_DIR      folder of the run, on storage that all nodes see (not for a script of yours)
#   CHECKOUT     root of the checkout, if sbatch is called elsewhere
#   RANKS        ranks on each node: a number, or gpu for one per GPU (gpu)
#   MASTER_ADDR  node 0, as the others reach it (the name of the first node)
#   MASTER_PORT  a free port there (made from the job's number)
#
# Arguments go to examples/pretrain_llama.py; or to a script of yours, if the first is its
# path (*.py). Flags of sbatch override the lines below. The environment that is active
# where sbatch is called is the job's; where nodes have no internet: launch/setup.sh first.
#
#SBATCH --job-name=adadiag
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# After the loss of a node Slurm starts the job again, and it continues.
#SBATCH --requeue
# Before the time is over the ranks are told to leave a checkpoint.
#SBATCH --signal=TERM@180
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# Slurm runs a copy of this file from elsewhere.
export CHECKOUT="${CHECKOUT:-$SLURM_SUBMIT_DIR}"
. "$CHECKOUT/launch/job.sh"
# Here, once: flags are read and the environment is found before all nodes do.
sharded_adadiag_job continued "$@"
export RUN_DIR NNODES="$SLURM_NNODES"
# This script runs on the first node, which srun gives the node number 0.
export MASTER_ADDR="${MASTER_ADDR:-$(hostname)}"
# Two jobs on one node must not meet.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
# From 22.05 on srun does not take this over by itself.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# torchrun's patience with ranks that are told to end: time for a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
# Static rendezvous: a lost node ends every task within --timeout-s, and srun ends the rest.
# shellcheck disable=SC2016 # for the task to expand
srun --kill-on-bad-exit=1 bash -c \
    'NODE_RANK="$SLURM_NODEID" exec bash "$CHECKOUT/launch/torchrun_static.sh" "$@"' task "$@"
