# `make demo` and `make test` are all you need on a new machine: each sets up .venv first, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := all,docs,dev
RUN := outputs/demo/make

.PHONY: setup demo test test-fast lint docs audit bench quality clean

# --no-compile: most installed modules are never imported, and Python compiles the others on first use.
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prts needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

# Trains on simulated sections, then predicts a new section from its image alone and scores it.
demo: setup
	rm -rf $(RUN)
	$(BIN)/python train.py hydra.run.dir=$(RUN)
	$(BIN)/prts simulate out=$(RUN)/new_slide cells=2000 genes=1000 seed=7 stain=0.5
	$(BIN)/prts predict bundle=$(RUN)/model image=$(RUN)/new_slide/tissue_image.tif out=$(RUN)/new_slide.h5ad segmentation=watershed
	$(BIN)/prts evaluate prediction=$(RUN)/new_slide.h5ad section=$(RUN)/new_slide out=$(RUN)/new_slide_evaluation

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --nbmake notebooks tests

test-fast: setup
	$(BIN)/python -m pytest -q -m "not slow and not real"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation in docs/_build/html; warnings fail the build, and nothing is downloaded.
docs: setup
	rm -rf docs/reference/generated
	$(BIN)/python -m sphinx -E -b html -W --keep-going -q docs docs/_build/html

# Known vulnerabilities are shown but are no error, since the service is not reachable everywhere.
audit: setup
	timeout 60 $(BIN)/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off || \
		echo "pip-audit: found something, or did not reach its service"

# Speed, memory and the loss on changed images, about half an hour on two idle cores; PARTS="counts train" measures only some stages.
bench: setup
	$(BIN)/python -m benchmarks $(PARTS)

# Quality of the segmenters and of the estimated noise ceiling.
quality: setup
	$(BIN)/python benchmarks/segmentation.py
	$(BIN)/python benchmarks/ceiling.py outputs/ceiling.png

clean:
	rm -rf outputs multirun dist docs/_build docs/reference/generated .pytest_cache .mypy_cache .ruff_cache
