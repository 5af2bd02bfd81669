#!/usr/bin/env bash
# Finds or makes the environment, then runs ruff, mypy and the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# An environment of yours is used only if it has every tool, in the versions wanted.
. launch/environment.sh dev,examples,clients dev,examples,clients whole
python -m ruff check .
python -m ruff format --check .
python -m mypy
export OMP_NUM_THREADS=1
# loadgroup: tests that share a costly fixture stay on one worker.
python -m pytest --dist loadgroup -n "${TEST_WORKERS:-$(getconf _NPROCESSORS_ONLN)}" "$@"
