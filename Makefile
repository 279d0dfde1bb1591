# Two targets do everything on a fresh machine that has cargo and Python: `make demo`, `make test`.
# Python packages go into .venv, from the package registries; nothing else is installed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-rust test-python bench format clean extension

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: extension $(VENV)/.demo ## Denoise a real video by dense and sparse attention (demo/out)
	$(BIN)/python -m demo $(DEMO)

test: test-rust test-python ## All tests

# PTXAS is set, so printed kernels must assemble: without it those tests would be skipped.
test-rust: $(VENV)/.ptxas
	PTXAS=$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages/nvidia/cu13/bin/ptxas) \
		cargo test --workspace --quiet

test-python: extension $(VENV)/.test $(VENV)/.demo
	$(BIN)/python -m pytest -q

bench: extension $(VENV)/.bench ## Speed beside other libraries; of a GPU: make bench BENCH='--budget 900'
	$(BIN)/python -m benchmark $(BENCH)
	$(BIN)/python -m benchmark.report

format: $(VENV)/.test ## Format Rust and Python
	cargo fmt
	$(BIN)/ruff format python demo benchmark examples
	$(BIN)/ruff check --fix python demo benchmark examples

clean: ## Remove everything that was built or installed
	rm -rf target $(VENV) demo/out

# The extension, in place. Cargo knows what is to be rebuilt.
extension: $(VENV)/.torch
	PIP_QUIET=1 VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --quiet

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# NVIDIA's assembler alone, without the compiler that the package belongs to.
$(VENV)/.ptxas: | $(BIN)/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps nvidia-cuda-nvcc==13.0.88
	touch $@

$(VENV)/.torch: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --disable-pip-version-check 'maturin>=1.7,<2' 'torch>=2.4' numpy
	touch $@

$(VENV)/.test: $(VENV)/.torch
	$(BIN)/pip install --quiet --disable-pip-version-check pytest hypothesis matplotlib ruff
	touch $@

$(VENV)/.bench: $(VENV)/.torch
	$(BIN)/pip install --quiet --disable-pip-version-check matplotlib tqdm
	touch $@

$(VENV)/.demo: demo/requirements.txt $(VENV)/.torch
	$(BIN)/pip install --quiet --disable-pip-version-check -r demo/requirements.txt
	touch $@
