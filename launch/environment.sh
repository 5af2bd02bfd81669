# To be sourced: `. launch/environment.sh EXTRAS` activates an environment in which
# sharded_adadiag[EXTRAS] is installed, and makes it first if need be.
#
# SHARDED_ADADIAG_PYTHON_ENV=DIR uses a virtual environment of yours, as it is.

sharded_adadiag_environment() {
    local extras="$1" root environment stamp wanted
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    # The examples only report how often they are used if this is not set.
    export HF_HUB_DISABLE_TELEMETRY=1

    if [ -n "${SHARDED_ADADIAG_PYTHON_ENV:-}" ]; then
        echo "environment: $SHARDED_ADADIAG_PYTHON_ENV, as it is"
        . "$SHARDED_ADADIAG_PYTHON_ENV/bin/activate"
        export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi

    environment="$root/.venv"
    # pip comes last when an environment is made: without it, it was not finished.
    if [ ! -x "$environment/bin/pip" ]; then
        echo "environment: making $environment"
        python3 -m venv --clear "$environment" || return
    fi
    . "$environment/bin/activate"

    stamp="$environment/installed-$extras"
    wanted="$(cksum < "$root/pyproject.toml")"
    if [ "$(cat "$stamp" 2> /dev/null)" = "$wanted" ]; then
        echo "environment: $environment"
        return
    fi
    echo "environment: installing sharded_adadiag[$extras] in $environment (minutes)"
    rm -f "$stamp"
    if ! sharded_adadiag_has_torch; then
        python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" \
            || return
    fi
    python -m pip install --quiet --disable-pip-version-check -e "${root}[$extras]" \
        || return
    echo "$wanted" > "$stamp"
}

sharded_adadiag_has_torch() {
    python - 2> /dev/null <<'PYTHON'
import torch

major, minor = torch.__version__.split(".")[:2]
raise SystemExit((int(major), int(minor)) < (2, 11))
PYTHON
}

sharded_adadiag_environment "$@"
