#!/usr/bin/env bash
# Makes the environment once, for machines whose compute nodes have no internet: run it on
# the login node. Every launcher then finds it, and installs nothing.
#
#   bash launch/setup.sh [EXTRAS]   of pyproject.toml, such as examples,deepspeed (examples)
#
# If an environment with torch is active (virtual, conda, module), what the examples need
# is added to that one: have it active, too, where the launchers run.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-examples}"
if [[ ! "$extras" =~ ^[a-z]+(,[a-z]+)*$ ]]; then
    echo "launch/setup.sh: error: not extras of pyproject.toml: $extras" >&2
    exit 2
fi
. launch/environment.sh "$extras"
echo "ready: launchers use $python"
