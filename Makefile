# `make demo` and `make test` are all a new machine needs: each sets up .venv first, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := stardist,analysis,spatial,sweeps,loggers,dev
RUN := outputs/demo/make

.PHONY: setup demo test test-fast lint bench quality clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prts needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

# Trains on simulated sections, then predicts a section the model has never seen from its image alone and compares it with the truth.
demo: setup
	rm -rf $(RUN)
	$(BIN)/python train.py hydra.run.dir=$(RUN)
	$(BIN)/prts simulate out=$(RUN)/new_slide cells=2000 genes=1000 seed=7 stain=0.5
	$(BIN)/prts predict bundle=$(RUN)/model image=$(RUN)/new_slide/tissue_image.tif out=$(RUN)/new_slide.h5ad segmentation=watershed
	$(BIN)/prts evaluate prediction=$(RUN)/new_slide.h5ad section=$(RUN)/new_slide out=$(RUN)/new_slide_evaluation

test: setup
	$(BIN)/python -m pytest -q
	$(BIN)/python -m pytest -q --nbmake notebooks

test-fast: setup
	$(BIN)/python -m pytest -q -m "not slow and not real"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Speed and memory, about 15 minutes on two quiet cores; PARTS="counts train" measures some stages only.
bench: setup
	$(BIN)/python -m benchmarks $(PARTS)

# How good the segmenters and the estimate of the noise ceiling are.
quality: setup
	$(BIN)/python benchmarks/segmentation.py
	$(BIN)/python benchmarks/ceiling.py outputs/ceiling.png

clean:
	rm -rf outputs multirun dist .pytest_cache .mypy_cache .ruff_cache
