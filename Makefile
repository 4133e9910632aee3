# `make demo` and `make test` are all that a new user needs; both set everything up in .venv first.
PYTHON ?= python3
BIN := .venv/bin
comma := ,
# A folder of images for the demo; without one it makes crops of the photographs that scikit-image ships.
SRC ?=
# 12 on a machine whose driver has no CUDA 13.
CUDA ?= 13
# A folder of wheels for gpu-check on a machine without a network.
WHEELS ?=

.PHONY: setup demo test check bench gpu-check soak evidence

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "maelstream needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	@echo "installing torch, DALI and DeepSpeed into .venv: 2 to 4 minutes, 6 GB"
	$(BIN)/pip install --quiet --constraint constraints.txt pip --editable '.[dev$(if $(filter 12,$(CUDA)),$(comma)cuda12)]'
ifeq ($(CUDA),12)
	$(BIN)/pip uninstall --quiet --yes nvidia-dali-cuda130
	$(BIN)/pip install --quiet --constraint constraints.txt --force-reinstall --no-deps nvidia-dali-cuda120
endif
	touch $@

demo: setup
	$(BIN)/maelstream demo $(if $(SRC),--src '$(SRC)')

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Beside the peers of the extra `bench`, where they are installed; ARGS=--quick for a look. Writes docs/measured/.
bench: setup
	$(BIN)/python -m benchmarks.run $(if $(SRC),--data '$(SRC)') $(ARGS)

# What only a GPU can show. Without a network: PYTHON is one that has torch and timm, WHEELS a folder of what else is
# needed (docs/gpu.md); nothing is installed outside of .gpu.
ifneq ($(WHEELS),)
gpu-check: .gpu/installed
	PYTHONPATH=.gpu/site $(PYTHON) -m benchmarks.gpu $(if $(SRC),--src '$(SRC)') $(ARGS)
else
gpu-check: setup
	$(BIN)/python -m benchmarks.gpu $(if $(SRC),--src '$(SRC)') $(ARGS)
endif

.gpu/installed: $(wildcard $(WHEELS)/*.whl)
	rm -rf .gpu
	$(PYTHON) -m pip install --quiet --no-index --no-deps --target .gpu/site $^
	touch $@

# The fault table in full: about an hour on 2 cores; the figures go to docs/measured/faults.md.
soak: setup
	$(BIN)/python -m benchmarks.faults

# What the paper says of features, on CIFAR-10; stops and goes on at any time. SRC=cifar10.tar.gz, ARGS='--size whole' on a GPU.
evidence: setup
	$(BIN)/python -m benchmarks.evidence '$(SRC)' $(ARGS)
