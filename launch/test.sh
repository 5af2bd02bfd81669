#!/usr/bin/env bash
# Makes the environment, then runs ruff, mypy and the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh dev,examples
ruff check .
ruff format --check .
mypy
export OMP_NUM_THREADS=1
# loadgroup: tests that share a costly fixture stay on one worker.
python -m pytest --dist loadgroup -n "${TEST_WORKERS:-$(getconf _NPROCESSORS_ONLN)}" "$@"
