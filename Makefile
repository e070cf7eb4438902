# Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Two tests at a time, each in one thread (tests/conftest.py). Worksteal keeps the tests of a file
# together, which share what they build, and divides what is left at the end.
PYTEST := $(PY) -m pytest -n 2 --dist worksteal

export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo lint types test test-slow test-arithmetic fuzz mutants doctor clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

# Set-up: one stamp per step, so that a finished step is not repeated -------------------------------

setup: $(VENV)/stamp-package ## create .venv with everything that the other targets need

$(VENV)/stamp-venv: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "'$(PYTHON)' is no Python 3.10 or newer: name one that is," \
			"as in 'make setup PYTHON=python3.12'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet setuptools wheel
	@touch $@

# torch before Detectron2, whose build imports it; the pair in one command. Gigabytes, so let pip
# show its progress.
$(VENV)/stamp-torch: $(VENV)/stamp-venv
	$(PY) -m pip install torch torchvision
	@touch $@

$(VENV)/stamp-detectron2: $(VENV)/stamp-torch tools/install_detectron2.py
	$(PY) tools/install_detectron2.py
	@touch $@

$(VENV)/stamp-package: $(VENV)/stamp-detectron2 pyproject.toml setup.py
	$(PY) -m pip install --quiet --no-build-isolation -e '.[dev]'
	@touch $@

# What it is for ----------------------------------------------------------------------------------

demo: setup ## train and evaluate a Mask R-CNN with a VoVNet backbone on handwritten digits
	@$(PY) tools/train_net.py --progress --config-file configs/Digits/mask_rcnn_V_19_slim_eSE_half_FPN.yaml OUTPUT_DIR output/demo
	@$(PY) tools/report.py output/demo
	@echo "Picture: output/demo/predictions.png"
	@echo "Report:  output/demo/report.html"
	@echo "To draw on a picture of yours: $(PY) tools/demo.py --config-file output/demo/config.yaml" \
		"--input PICTURE --output drawn --opts MODEL.WEIGHTS output/demo/model_final.pth"

doctor: ## say what is installed, what is missing, and what mends it
	@$$(test -x $(PY) && echo $(PY) || echo $(PYTHON)) tools/doctor.py

# Checks ------------------------------------------------------------------------------------------

lint: setup ## check style and formatting
	$(PY) -m ruff check
	$(PY) -m ruff format --check

types: setup ## check the types of the package
	$(PY) -m mypy

test: setup lint types ## lint, types and the fast tests
	$(PYTEST) -m "not slow and not gpu"

test-slow: setup ## the tests that take longer
	$(PYTEST) -m "slow and not gpu"

# As CPUs without AVX-512 and without AVX2 compute.
ARITHMETIC := $(addprefix tests/test_,allocation.py benchmark_measures.py folding.py fpn.py \
	inference.py layers.py onednn.py training_step.py vovnet.py)
test-arithmetic: setup ## the tests of arithmetic, as other kinds of CPU compute
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m "not slow and not gpu" $(ARITHMETIC)
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default $(PYTEST) -m "not slow and not gpu" $(ARITHMETIC)

fuzz: setup ## feed damaged files to what reads files from outside, a minute for each reader
	$(PY) -m pip install --quiet --no-build-isolation -e '.[fuzz]'
	for reader in annotations config weights image; do \
		$(PY) tests/fuzz/fuzz_readers.py $$reader -max_total_time=60 || exit 1; done

# For other files than those that changed since main: make mutants MUTANTS='--help', or for example
# MUTANTS='--minutes 30 vovnet_d2/engine/hooks.py'.
MUTANTS ?=
mutants: setup ## break changed code here and there, ten minutes long, and list what no test notices
	$(PY) -m pip install --quiet --no-build-isolation -e '.[mutants]'
	$(PY) tests/mutants/mutate_changes.py $(MUTANTS)

clean: ## remove caches and build products; .venv and results stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
