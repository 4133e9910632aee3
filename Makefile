# A new user needs only `make demo` and `make test`; both first install everything into .venv.
PYTHON ?= python3
BIN := .venv/bin
comma := ,
# A folder of images for the demo; by default it uses crops of the photographs in scikit-image and scikit-learn.
SRC ?=
# Set it to 12 if the NVIDIA driver does not support CUDA 13.
CUDA ?= 13
# A folder of wheels, for gpu-check on a machine without a network.
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

# Compares with the peers of the extra `bench`, if they are installed. ARGS=--quick is short. Writes docs/measured/.
bench: setup
	$(BIN)/python -m benchmarks.run $(if $(SRC),--data '$(SRC)') $(ARGS)

# Checks what only a GPU can show. Without a network, PYTHON must have torch and timm, and WHEELS is a folder with the
# other packages (docs/gpu.md); they are installed into .gpu.
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

# Runs the whole fault table and edits every side file: some three hours on 2 cores. The figures are in
# docs/measured/faults.md and docs/measured/robustness.md.
soak: setup
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.side_files --edits 100

# Tests the paper's claims about features on CIFAR-10; it can be stopped and resumed at any time.
# SRC=cifar10.tar.gz; ARGS='--size whole' needs a GPU.
evidence: setup
	$(BIN)/python -m benchmarks.evidence '$(SRC)' $(ARGS)
