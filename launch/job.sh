# To be sourced by a launcher: `. job.sh; sharded_adadiag_job KIND "$@"` leaves in
# ${job[@]} what the ranks run, in $python with what, and sets the threads of a rank.
#
# If the first argument ends in .py, that is the job (`bash launch/pretrain.sh train.py
# --lr 1`): it gets the arguments after it, nothing else, and runs in the folder where the
# launcher was called. Otherwise the job is the example, run from the root of the
# checkout. KIND says which, and which flags the launcher adds:
#
#   once        examples/pretrain_llama.py; a new run each time
#   continued   the same, which continues in the folder RUN_DIR
#   deepspeed   examples/deepspeed/pretrain_llama.py, continued
#
# The example's flags are read here, before anything is installed or started: help and
# mistakes are printed once, with exit code 0 and 2.

sharded_adadiag_job() {
    local kind="$1" extras=examples needed=examples checker=examples/settings.py
    shift
    # With Slurm, this file is read from the checkout but the launcher is a copy.
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    [ "$kind" != deepspeed ] || extras=examples,deepspeed needed=examples,deepspeed
    if [[ "${1:-}" == *.py ]]; then
        [ -f "$1" ] || { echo "launch: error: no file $1" >&2; exit 2; }
        job=("$(realpath "$1")" "${@:2}")
        needed=""
        if [ "$kind" = deepspeed ]; then
            needed=deepspeed
            job=(--module sharded_adadiag.run "${job[@]}")
        fi
    else
        [ "$kind" = once ] || : "${RUN_DIR:?}"
        [ "$kind" = once ] || RUN_DIR="$(realpath -m "$RUN_DIR")"
        [ -z "${CONFIG:-}" ] || CONFIG="$(realpath "$CONFIG")"
        cd "$root" || exit
        case "$kind" in
            once) job=(--optimizer adadiag) ;;
            continued) job=(--optimizer adadiag --run-dir "$RUN_DIR" --resume) ;;
            deepspeed)
                checker=examples/deepspeed/starting.py
                CONFIG="${CONFIG:-examples/deepspeed/ds_config_stage3.json}"
                job=(--deepspeed_config "$CONFIG" --run-dir "$RUN_DIR" --resume)
                ;;
        esac
        sharded_adadiag_check "$checker" "${job[@]}" "$@"
        job=("$(dirname "$checker")/pretrain_llama.py" "${job[@]}" "$@")
    fi
    . "$root/launch/environment.sh" "$extras" "$needed" || exit
}

# Ends the launcher if the flags are wrong, or only ask for help.
sharded_adadiag_check() {
    local code=0 any
    # Flags are read with the standard library alone: any Python will do.
    any="$(command -v python3 || command -v python)" || return 0
    "$any" -c "import sys; sys.exit(sys.version_info < (3, 10))" || return 0
    PYTHONPATH="$root/examples" "$any" "$root/$1" "${@:2}" || code=$?
    [ "$code" != 64 ] || exit 0  # the help has been shown
    [ "$code" = 0 ] || exit "$code"
}

# Sets the threads of a rank: the cores of this machine, shared by its ranks. More make
# two ranks on a small machine many times slower.
sharded_adadiag_threads() {
    local ranks="${1:-1}" cores
    cores="$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)"
    case "$ranks" in
        cpu) ranks="$cores" ;;
        gpu | auto) ranks="$("$python" -c \
            'import torch; print(torch.cuda.device_count() or 1)')" ;;
    esac
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
}
