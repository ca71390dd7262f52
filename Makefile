# make repro      set up, run the pipeline, show the result
# make test       set up, run the tests
# make check      hold every dvc.lock to code and params; needs no data
# make examples   run the pipeline of every example that has one, two at a time: about 20 minutes
# make screenshots  draw the pictures of the docs again, from reports/profiler.html; needs Chromium
# make slow       run the long tests; those of the examples' integers need make examples

VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Two OpenMP threads stall each other as soon as anything else runs on two cores.
THREADS := OMP_NUM_THREADS=1
# Whole files to as many processes as there are cores, in the order of a serial run: the longest come early.
PYTEST := $(THREADS) pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: repro test slow lint check bench examples screenshots clean

repro: $(VENV)/.base
	@dvc repro
	@qatlib summary

test: $(VENV)/.dev
	$(PYTEST)

slow: $(VENV)/.dev
	$(PYTEST) -m slow

lint: $(VENV)/.dev
	ruff check .
	ruff format --check .
	mypy

check: $(VENV)/.dev
	@.ci/locks

bench: $(VENV)/.bench
	python -m bench.emulator
	python -m bench.training

examples: $(VENV)/.dev
	printf '%s\n' $(sort $(wildcard examples/*/dvc.yaml)) | $(THREADS) xargs -P 2 -n 1 dvc --wait-for-lock repro

screenshots: $(VENV)/.dev
	python -m tests.browser.screenshots

clean:
	rm -rf $(VENV) .qatlib

$(VENV)/.base: constraints.txt pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[bench]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev,examples]'
	@touch $@
