# To be sourced: `. launch/environment.sh EXTRAS [NEEDED [whole]]` leaves in $python a
# Python that can run a job with sharded_adadiag. The first of these that there is:
#
#   1. SHARDED_ADADIAG_PYTHON_ENV=DIR, a virtual environment of yours, as it is
#   2. the environment that is active (virtual, conda, container, module), if it has
#      torch >= 2.11 and the extras NEEDED (default: EXTRAS) of pyproject.toml
#   3. .venv of this checkout, if it is complete
#   4. the active one, if it has torch >= 2.11: pip adds what it lacks, never another
#      torch. Not with `whole`: then only a complete one will do
#   5. .venv, made or completed with EXTRAS
#
# Without internet nothing is installed: an error of one line says what to do.

# Says what is wrong, on one line; fails.
sharded_adadiag_refuse() {
    echo "environment: error: $*" >&2
    return 1
}

sharded_adadiag_environment() {
    local extras="$1" needed="${2-$1}" whole="${3:-}" root venv active lacks=""
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="$root/.venv"
    # The examples only report how often they are used if this is not set.
    export HF_HUB_DISABLE_TELEMETRY=1

    if [ -n "${SHARDED_ADADIAG_PYTHON_ENV:-}" ]; then
        . "$SHARDED_ADADIAG_PYTHON_ENV/bin/activate" || return
        sharded_adadiag_take "$(command -v python || command -v python3)" "as it is"
        return
    fi
    active="$(command -v python || command -v python3 || true)"
    if [ -n "$active" ] && lacks="$("$active" "$root/launch/lacking.py" "$needed" 2> /dev/null)"
    then
        if [ "$(wc -l <<< "$lacks")" = 1 ]; then
            sharded_adadiag_take "$active" "the active environment, $lacks"
            return
        fi
    else
        active=""
    fi
    if [ -e "$venv/complete" ] \
        && [ "$("$venv/bin/python" "$root/launch/lacking.py" "$needed" | wc -l)" = 1 ]; then
        . "$venv/bin/activate"
        sharded_adadiag_take "$venv/bin/python" "made before"
        return
    fi
    if [ -n "$active" ] && [ "$whole" != whole ]; then
        # torch comes first in the list: as it is, so that it stays as it is.
        # shellcheck disable=SC2086 # a list of requirements
        sharded_adadiag_install "$active" $lacks || return
        sharded_adadiag_take "$active" "the active environment"
        return
    fi
    sharded_adadiag_make "$root" "$extras"
}

# Uses a Python, with the package of this checkout.
sharded_adadiag_take() {
    local root
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    python="$1"
    [[ ":${PYTHONPATH:-}:" == *":$root:"* ]] \
        || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    echo "environment: $python ($2)"
    if ! command -v python > /dev/null; then
        python() { "$python" "$@"; }
    fi
}

# Makes or completes .venv.
sharded_adadiag_make() {
    local root="$1" extras="$2" venv="$1/.venv" base
    # pip comes last when an environment is made: without it, it was not finished.
    if [ ! -x "$venv/bin/pip" ]; then
        base="$(sharded_adadiag_base)" || return
        echo "environment: making $venv with $base"
        "$base" -m venv --clear "$venv" || return
    fi
    . "$venv/bin/activate"
    rm -f "$venv/complete"
    if ! python "$root/launch/lacking.py" "" > /dev/null 2>&1; then
        sharded_adadiag_install "$venv/bin/python" "torch==2.13.0" || return
    fi
    sharded_adadiag_install "$venv/bin/python" -e "${root}[$extras]" || return
    touch "$venv/complete"
    sharded_adadiag_take "$venv/bin/python" "new"
}

# The first Python that is new enough to make an environment with.
sharded_adadiag_base() {
    local name
    for name in python3 python python3.1{4,3,2,1,0}; do
        if "$name" -c "import sys; sys.exit(sys.version_info < (3, 10))" 2> /dev/null; then
            command -v "$name"
            return
        fi
    done
    sharded_adadiag_refuse "no Python >= 3.10 found; install or load one"
}

# Installs with pip, which shows its progress; not without internet.
sharded_adadiag_install() {
    local python="$1"
    shift
    if ! "$python" -m pip --version > /dev/null 2>&1; then
        sharded_adadiag_refuse "$python has no pip and lacks $*; install these"
        return
    fi
    # A small question with one try: pip would ask many times, for minutes.
    if ! "$python" -m pip install --dry-run --quiet --ignore-installed --no-deps \
        --retries 0 --timeout 15 --disable-pip-version-check setuptools > /dev/null 2>&1
    then
        sharded_adadiag_refuse "$python lacks $* and nothing can be installed (no" \
            "internet?); run \`bash launch/setup.sh\` on a machine that has it," \
            "with the same environment active"
        return
    fi
    echo "environment: installing $* in $python (minutes)"
    "$python" -m pip install --disable-pip-version-check "$@" && return
    sharded_adadiag_refuse "pip could not install $* in $python (see above); do it" \
        "yourself, or set SHARDED_ADADIAG_PYTHON_ENV, or deactivate that environment"
}

sharded_adadiag_environment "$@"
