# `make repro` takes a fresh clone to the comparison table; `make test` runs the tests. Both set up .venv first.

PYTHON ?= python3
VENV := .venv
SOAK := $(addprefix tests/,pipeline/test_kills.py pipeline/test_damage.py pipeline/test_disks.py pipeline/test_dvc_survival.py \
	pipeline/test_headline_shape.py pipeline/test_pipeline.py training/test_distributed.py research/test_study.py \
	cuda/test_cuda_head.py cuda/test_cuda_training.py)
STAMP := $(VENV)/installed
# DVC runs each stage through a shell: with .venv first on PATH, `python` there is this one's
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup repro measure study verify test soak lint smoke plots-page report-picture gpu gpu-bundle

help:
	@echo "make repro       set up, run the pipeline (dvc repro), print the comparison table"
	@echo "make measure     after that: the error of the teacher's cache (probe) and what it saves (ledger)"
	@echo "make verify      after that: replay random windows of the cache through the live teacher"
	@echo "make study       the study: STUDY.md from a grid of runs through the DVC queue; run again, it goes on"
	@echo "make test        set up, run the tests"
	@echo "make soak        the tests that take minutes: hundreds of kills, damaged files, full disks (docs/reliability.md), the"
	@echo "                 headline's real shape"
	@echo "make setup       set up .venv only; then: . .venv/bin/activate"
	@echo "make lint        ruff over the code"
	@echo "make smoke       the whole pipeline at scale smoke, in a temporary clone"
	@echo "make gpu         on a machine with a CUDA device: every figure of it, in at most 8 minutes (bench/README.md)"
	@echo "make gpu-bundle  what has to travel to such a machine, in two halves"
	@echo "make plots-page  make the offline page for dvc plots again"
	@echo "make report-picture  docs/report.png from plots/report.html, with Chromium"

setup: $(STAMP)

# Wheels only, so that nothing is ever compiled; antlr4 is published as Python source alone.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "error: $(PYTHON) -m venv failed; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(VENV)/bin/python -m pip install --quiet --only-binary=:all: --no-binary=antlr4-python3-runtime \
		-c constraints.txt torch==2.13.0 -e '.[test]'
	@touch $@

repro: $(STAMP)
	@touch $(VENV)/started
	python -m dvc repro
	@test metrics/summary.json -nt $(VENV)/started || python -m stages.compare --show  # `compare` has printed it otherwise

measure: $(STAMP)
	python -m dvc repro measure/dvc.yaml

verify: $(STAMP)
	python -m stages.verify

study: $(STAMP)
	python -m stages.study

# Files of tests are dealt to processes, the longest first, one more than there are cores: some tests wait for a disk or a
# clock. Waiting threads give their core to the others. The plugins are named: those of DVC's dependencies, and with them
# these packages, would be loaded by every process.
test: WORKERS = $(shell $(PYTHON) -c "import os; print(min(len(os.sched_getaffinity(0)) + 1, 4))")
test: $(STAMP)
	OMP_WAIT_POLICY=passive PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python -m pytest -p xdist.plugin -p _hypothesis_pytestplugin \
		-q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

soak: $(STAMP)
	MICROLM_SOAK=1 MICROLM_CUDA_TESTS_ON=$${MICROLM_CUDA_TESTS_ON:-cpu} python -m pytest -q $(SOAK)

lint: $(STAMP)
	python -m ruff check .
	python -m ruff format --check .

smoke: $(STAMP)
	MICROLM_SOAK=1 python -m pytest -q tests/pipeline/test_pipeline.py

# Not part of the ordinary set-up: the page is committed, and made again only for a newer vega.
plots-page: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --only-binary=:all: -c constraints.txt vl-convert-python
	python -m microlm.report.offline_page

report-picture: $(STAMP)
	python -m tests.support.report_picture

# No environment is set up on such a machine: it has its own PyTorch, and often no network.
gpu:
	@$$(command -v python || echo $(PYTHON)) -m bench.gpu

gpu-bundle: $(STAMP)
	python -m dvc repro tokenize
	python -m bench.gpu.bundle
