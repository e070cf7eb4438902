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
.PHONY: help setup demo docs gpu-report lint types test test-fast test-slow test-arithmetic fuzz mutants doctor clean

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
	@$(PY) tools/train_net.py --progress --config-file configs/Digits/mask_rcnn_V_19_slim_eSE_half_FPN_600.yaml OUTPUT_DIR output/demo
	@$(PY) tools/report.py output/demo
	@echo "Picture: output/demo/predictions.png"
	@echo "Report:  output/demo/report.html"
	@echo "To draw on a picture of yours: $(PY) tools/demo.py --config-file output/demo/config.yaml" \
		"--input PICTURE --output drawn --opts MODEL.WEIGHTS output/demo/model_final.pth"

docs: setup ## build the documentation as a site; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo "Site: build/site/index.html. With the search: $(PY) -m http.server --directory build/site"

# Only the table for deployment has compiled networks, as each case is compiled for a minute.
gpu-report: setup ## on a GPU: its tests, then speed, memory, energy and training, into output/gpu
	$(PY) -m pytest -m gpu
	$(PY) tools/benchmark.py --preset gpu --models V-39-eSE V-19-slim-dw-eSE ResNet-50 --sizes 480x640 \
		--treatments plain plain-tf32 optimized bf16 --warmup 5 --repeats 20 --output output/gpu/backbones
	$(PY) tools/benchmark.py --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml \
		COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_1x.yaml --treatments plain optimized bf16 \
		--modes inference training --device cuda --sizes 800x1344 --output output/gpu/mask_rcnn
	$(PY) tools/benchmark.py --preset deploy --device cuda --models V-39-eSE ResNet-50 --config-file \
		COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_3x.yaml \
		COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml --treatments plain optimized fp16 \
		compiled-fp16 onnxruntime tensorrt tensorrt-fp16 tensorrt-int8 --output output/gpu/deploy
	$(PY) tools/benchmark.py --preset table2 --device cuda --output output/gpu/table2
	$(PY) tools/benchmark.py --preset table4 --device cuda --output output/gpu/table4
	@echo "The tables: output/gpu/*/README.md"

doctor: ## say what is installed, what is missing, and what fixes it
	@$$(test -x $(PY) && echo $(PY) || echo $(PYTHON)) tools/doctor.py

# Checks ------------------------------------------------------------------------------------------

lint: setup ## check style, formatting, and which room of the package imports which
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	@# import-linter has no release for Python 3.10.
	test ! -x $(VENV)/bin/lint-imports || $(VENV)/bin/lint-imports

types: setup ## check the types of the package
	$(PY) -m mypy

# Types and tests side by side: mypy is one process, which would leave the other cores idle.
test: setup lint ## lint, types and the fast tests
	@$(MAKE) --no-print-directory -j 2 types test-fast

test-fast: setup ## the fast tests alone
	$(PYTEST) -m "not slow and not gpu"

test-slow: setup ## the tests that take longer
	$(PYTEST) -m "slow and not gpu"

# As CPUs without AVX-512 and without AVX2 compute.
ARITHMETIC := $(addprefix tests/test_,allocation.py benchmark_measures.py fpn.py fusion.py \
	inference.py layers.py mixed_precision.py onednn.py training_step.py vovnet.py)
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
