# For contributors, in an environment that launch/test.sh has made: `make help`.
# More workers than cores make the tests slower.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 python -m pytest -q --dist loadgroup -n $(WORKERS)
.PHONY: help unit threads processes jobs test lint digests

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

unit: ## tests of one process, under a minute
	OMP_NUM_THREADS=1 python -m pytest -q -m "not slow and not multiprocess"

threads: ## tests whose ranks are threads, and plans for many
	$(PYTEST) -m "slow and not multiprocess"

processes: ## tests whose ranks are processes
	$(PYTEST) -m "multiprocess and not jobs"

jobs: ## whole jobs, as users start them
	$(PYTEST) -m jobs

test: ## all that continuous integration checks
	bash launch/test.sh

lint: ## ruff and mypy
	ruff check . && ruff format --check . && mypy

digests: ## digests of weights and states on every layout; EVERY=N for each N-th
	OMP_NUM_THREADS=1 python tests/digests.py $(EVERY)
