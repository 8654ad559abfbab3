# Every target works as the first command on a fresh clone: .venv is made and filled when it is missing or outdated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTHON312 ?= python3.12
ifndef PYTHON_GPU
PYTHON_GPU := .venv-gpu/bin/python
INSTALLED_GPU := .venv-gpu/.installed
endif


.PHONY: help setup demo test test-unit test-slow check format bench bench-check gpu-rehearsal clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: $(INSTALLED)  ## make .venv with the tested versions

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: the tested version, before anything else can ask for another build of it
	$(BIN)/python -m pip install -q $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,deepspeed,dev]'
	touch $@

demo: setup  ## fine-tune a real small model on this machine
	$(BIN)/qlora-dist demo

# Two files at a time: many tests start two processes themselves, and some measure silences in seconds.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadscope

test: setup  ## unit, distributed and end-to-end tests
	$(PYTEST) -m 'not slow'

test-unit: setup  ## the unit tests alone
	$(PYTEST) -m 'not slow' tests/unit

test-slow: setup  ## what needs the demo's model or many minutes
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

check: setup  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite formatting and what can be mended automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.bench: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	touch $@

bench: $(VENV)/.bench  ## throughput beside what people use today (after `make demo`)
	$(BIN)/python benchmarks/step.py

bench-check: $(VENV)/.bench  ## fail when the lead over TRL has shrunk (after `make demo`)
	$(BIN)/python benchmarks/step.py --check

# Python 3.12 and the rented machine's packages: its torch is the build for CUDA 13, 5 GB installed.
.venv-gpu/.installed: benchmarks/gpu_machine.txt
	$(PYTHON312) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -q --no-deps -r $<
	touch $@

.site: benchmarks/gpu_carry.py $(INSTALLED_GPU)
	$(PYTHON_GPU) $<
	touch $@

gpu-rehearsal: .site  ## benchmarks/gpu.py on the CPU, as on a rented GPU; not part of `test`: 5 GB once, and minutes
	$(PYTHON_GPU) benchmarks/gpu_rehearsal.py --python $(PYTHON_GPU)

clean:  ## remove what was installed and what runs left
	rm -rf $(VENV) .venv-gpu .site runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
