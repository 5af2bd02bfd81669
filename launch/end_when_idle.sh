# To be sourced: `end_when_idle PID SECONDS &` kills process PID, a torchrun, when it has
# had children, but for SECONDS none that runs.
#
# A torchrun with c10d rendezvous asks the node where the nodes met for news every second.
# If that node is lost, the question waits until the kernel gives the connection up (about
# 15 minutes), and meanwhile torchrun sees neither that its ranks have ended nor SIGTERM.

end_when_idle() {
    local agent="$1" limit="$2" idle=-1 children
    # What ends the job is for torchrun and the ranks; this ends when torchrun does.
    trap '' INT TERM HUP
    while sleep 1; is_running "$agent"; do
        # Threads come and go while cat reads.
        children=" $(cat "/proc/$agent/task/"*/children 2> /dev/null || true) "
        # shellcheck disable=SC2086 # a list of numbers
        if is_running ${children/ $BASHPID / }; then
            idle=0
        elif [ "$idle" -ge 0 ] && [ $((idle += 1)) -gt "$limit" ]; then
            echo "launch: no rank has run on this node for $limit s, but torchrun" \
                "waits for a node that is lost: ending it" >&2
            kill -KILL "$agent"
        fi
    done
}

# Whether one of the processes exists and has not ended.
is_running() {
    local pid stat
    for pid in "$@"; do
        { read -r stat < "/proc/$pid/stat"; } 2> /dev/null || continue
        stat="${stat##*) }"
        [ "${stat%% *}" = Z ] || return 0
    done
    return 1
}
